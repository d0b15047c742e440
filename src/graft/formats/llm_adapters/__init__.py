"""LLM-Adapters' folders, read and written."""
