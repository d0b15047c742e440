"""How it is fast: fused low-rank products, the gated MLP, cross-entropy in chunks."""
