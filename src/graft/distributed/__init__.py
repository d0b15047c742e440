"""Several processes for one run: who is there, who runs which rows, and what happens when one is lost."""
