"""The adapter kinds, one file each."""
