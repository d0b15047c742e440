"""The frozen base: loading a model and its tokenizer from a folder, the hub or Graft itself, and its memory."""

from graft.bases.loading import Base, check_device, load_base, load_model, load_tokenizer, own_classes, own_task, pad_id
from graft.bases.memory import MemoryReport, memory_report

__all__ = [
    "Base",
    "MemoryReport",
    "check_device",
    "load_base",
    "load_model",
    "load_tokenizer",
    "memory_report",
    "own_classes",
    "own_task",
    "pad_id",
]
