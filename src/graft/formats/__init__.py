"""Adapter folders: ours and other libraries'."""
