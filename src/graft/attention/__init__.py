"""Attention with virtual keys and values, and attention by segments for padding-free batches.

`functions.py` is the attention function. `install.py` makes attention modules call it: through a view of their config
(`injection/config_view.py`) or, in families that do not use transformers' attention interface, through a forward of Graft's (`bloom.py`,
`gptj.py`, `falcon.py`, `deberta.py`), which `proof.py` compares with the installed transformers first. `virtual.py` gathers the virtual
tokens of a batch; `prompts.py` and `prepending.py` run soft prompts through causal and bidirectional models.
"""

from graft.attention.install import flat_attention, install, uninstall

__all__ = ["flat_attention", "install", "uninstall"]
