"""A text that virtual tokens start from: `init: text` with `init_text`, which becomes `init_ids` once a tokenizer is at hand."""

from __future__ import annotations

from typing import Any

from graft.errors import GraftError


def ids_of(config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The token ids of a config's text, without the tokenizer's own special tokens; those that it has already stay."""
    if not config.init_text or config.init_ids:
        return config.init_ids
    ids = tuple(tokenizer(config.init_text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise GraftError(f"init_text {config.init_text!r} has no tokens")
    return ids


def ready(config: Any) -> None:
    """Raise `GraftError` for a text without token ids."""
    if config.init == "text" and not config.init_ids:
        raise GraftError("init_text has no token ids yet: attach config.tokenised(tokenizer), or give init_ids")
