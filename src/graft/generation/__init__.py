"""Generate answers to prompts: batches, beam search, KV caches, engines."""
