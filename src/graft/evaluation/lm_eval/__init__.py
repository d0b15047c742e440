"""Graft's adapters in EleutherAI's lm-evaluation-harness."""
