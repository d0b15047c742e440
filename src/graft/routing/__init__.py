"""What is known of one forward pass: which adapter serves which row, the dropout seeds, and where each sequence lies."""
