"""Check from outside whether a server applies an adapter: its log-probabilities against Graft's own."""
