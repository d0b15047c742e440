"""Tokens that a run adds to its base: in the tokenizer, in the tables of the model, and in the adapter that trains their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.full import Full
from graft.adapters.kinds.stack import Stack
from graft.adapters.presets import Preset
from graft.attaching.resizing import resize_tables, table_rows
from graft.config.base import BaseConfig
from graft.errors import GraftError, listed
from graft.injection.state import site_table_of, sites_of, unwrapped


def add_tokens(tokenizer: Any, config: BaseConfig) -> None:
    """Add the tokens of `base.new_tokens` to a tokenizer. Raises `GraftError` for those that it has, and for empty ones."""
    wanted = config.new_tokens
    known = tokenizer.get_vocab()
    if wrong := [token for token in wanted if not token.strip() or token in known]:
        raise GraftError(
            f"base.new_tokens: {listed([repr(token) for token in wrong])}: the tokenizer has it already, or it is empty. Name tokens that "
            "the base does not know"
        )
    if len(set(wanted)) != len(wanted):
        raise GraftError(f"base.new_tokens names a token twice: {listed(list(wanted))}")
    if wanted:
        tokenizer.add_tokens(list(wanted))


def fit_tables(model: nn.Module, tokenizer: Any, config: BaseConfig) -> tuple[int, ...]:
    """Give a base's tables a row for each token where the config asks for it. Return the ids of tokens that the base never learnt."""
    if not config.new_tokens and (config.resize == "off" or config.tokenizer is None):
        return ()
    before = table_rows(model)
    if len(tokenizer) > before:
        resize_tables(model, len(tokenizer))
    named = tokenizer.convert_tokens_to_ids(list(config.new_tokens))
    return tuple(sorted({*named, *range(before, len(tokenizer))}))


def with_tokens(model: nn.Module, adapter: AdapterConfig | Preset, added: Sequence[int]) -> AdapterConfig | Preset:
    """Add the rows of new tokens to an adapter. It stays as it is if it trains them itself, or the whole embedding."""
    if not added:
        return adapter
    root: Any = unwrapped(model)
    config = adapter.resolve(site_table_of(root).names()) if isinstance(adapter, Preset) else adapter
    tables = [root.get_input_embeddings(), root.get_output_embeddings()]
    for part in config.parts():
        if isinstance(part, Full) and any(
            root.get_submodule(site.module) is tables[0] for site in sites_of(root, part)
        ):
            if part.tokens and (left := sorted(set(added) - set(part.tokens))):
                raise GraftError(
                    f"the adapter trains rows of tokens, but not all of base.new_tokens: add {left} to `tokens`, or remove it"
                )
            return config
    rows = Full(tokens=tuple(added), sites="embed" if tables[1] is None else "embed head")
    return Stack(adapters=(*config.parts(), rows))


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """The files of a tokenizer by name, as texts, to be written beside an adapter."""
    with TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(scratch).iterdir())}
