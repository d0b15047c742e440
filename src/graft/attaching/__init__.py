"""Attach adapters, choose the active ones, merge, save and summarise them."""
