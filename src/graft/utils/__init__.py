"""Atomic file writing, JSON lines, and the clock of a run."""
