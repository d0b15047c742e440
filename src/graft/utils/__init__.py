"""Files that a crash cannot halve, JSON lines, the clock."""
