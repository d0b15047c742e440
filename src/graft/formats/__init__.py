"""Adapter folders: Graft's own format, and those of other libraries, read and written."""
