"""Adapter folders of AdapterHub's `adapters` library (read and written against 1.3)."""

from graft.formats.adapterhub.reading import detect, read

__all__ = ["detect", "read"]
