"""Reversible bases (MEFT): blocks that carry two streams, and whose inputs are computed again from their outputs."""
