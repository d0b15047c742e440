"""Attention with virtual keys and values, and attention by segments for token-flat batches.

`functions.py` is the attention function; `shadow.py` leads a model's attention modules to it without touching the config that other
models may share; `bloom.py`, `gptj.py` and `falcon.py` are forwards for the families that do not use transformers' attention interface.
"""

from graft.attention.install import flat_attention, install, uninstall

__all__ = ["flat_attention", "install", "uninstall"]
