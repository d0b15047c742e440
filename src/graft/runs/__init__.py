"""The run folder and its commands."""
