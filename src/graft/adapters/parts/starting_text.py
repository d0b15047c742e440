"""The text that virtual tokens start from: `init: text` with `init_text`, which becomes `init_ids` once a tokenizer is available."""

from __future__ import annotations

from typing import Any

from graft.errors import GraftError


def text_ids(config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids of a config's text, without special tokens. A config that has `init_ids` already keeps them."""
    if not config.init_text or config.init_ids:
        return config.init_ids
    ids = tuple(tokenizer(config.init_text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise GraftError(f"init_text {config.init_text!r} has no tokens: give a longer text")
    return ids


def require_ids(config: Any) -> None:
    """Raise `GraftError` if the config starts from a text but has no token ids yet."""
    if config.init == "text" and not config.init_ids:
        raise GraftError("init_text has no token ids yet: attach config.tokenised(tokenizer), or give init_ids")
