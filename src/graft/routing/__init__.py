"""One forward pass: whose rows run, what seeds their dropout, where each sequence lies."""
