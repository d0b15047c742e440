"""Evaluate adapters with EleutherAI's lm-evaluation-harness: its command with Graft's model, and `graft eval --harness`."""
