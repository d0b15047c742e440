"""Adapter folders of AdapterHub's library `adapters`, read and written as version 1.3 does."""

from graft.formats.adapterhub.reading import detect, read

__all__ = ["detect", "read"]
