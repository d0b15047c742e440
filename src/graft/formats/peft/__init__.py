"""Adapter folders of PEFT (huggingface/peft, read and written against 0.21): which modules a file speaks of, reading, writing."""

from graft.formats.peft.reading import detect, read

__all__ = ["detect", "read"]
