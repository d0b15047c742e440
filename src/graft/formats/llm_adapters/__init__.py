"""Adapter folders of LLM-Adapters, read and written."""
