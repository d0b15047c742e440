"""The run folder, and the commands to a run."""
