"""The fast paths: fused low-rank products, the gated MLP and cross-entropy in chunks."""
