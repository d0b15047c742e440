"""Answers to prompts: batches, beams, caches, engines."""
