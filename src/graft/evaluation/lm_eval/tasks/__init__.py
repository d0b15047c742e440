"""Functions that the harness's task files name."""
