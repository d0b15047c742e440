"""The frozen base: loading a model and its tokenizer from a folder, the hub or Graft itself, and what it weighs."""

from graft.bases.loading import Base, check_device, load_base, load_model, load_tokenizer
from graft.bases.memory import MemoryReport, memory_report

__all__ = ["Base", "MemoryReport", "check_device", "load_base", "load_model", "load_tokenizer", "memory_report"]
