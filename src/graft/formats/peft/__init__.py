"""Adapter folders of PEFT (huggingface/peft), read and written as version 0.21 does."""

from graft.formats.peft.reading import detect, read

__all__ = ["detect", "read"]
