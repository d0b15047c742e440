"""Attach adapters, choose who is active, merge, save, summarise."""
