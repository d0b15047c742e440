"""The tokenizer and the chat template that lie beside an adapter, as TRL and transformers' Trainer leave them. They are the adapter's.

An adapter answers the prompts that it was trained on, so it is asked with these and not with the base's own. Graft's own folders hold
`template.json` instead, which says more, and comes first.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from graft.bases.loading import TOKENIZER_FILES
from graft.data.chat import ChatTemplate
from graft.data.template import FILE, JINJA, Template
from graft.data.templates import template_of
from graft.errors import GraftError
from graft.formats.guarding import named_errors
from graft.utils.strict_json import read_object

SETTINGS = "tokenizer_config.json"
BELONGING = (FILE, JINJA, SETTINGS, *TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt")
"""The files beside an adapter that say how it is asked."""
_MARKS = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_for(folders: Sequence[Path], base_tokenizer: Any, model: Any) -> Any:
    """Return the tokenizer that all these adapters were trained with: the one beside them, or the base's.

    model: the base. Raises `GraftError` for adapters with different tokenizers, which cannot answer side by side, and
    for a tokenizer with tokens that the base has no rows for.
    """
    found = [(folder, _beside(folder, base_tokenizer)) for folder in folders]
    own = [(folder, tokenizer) for folder, tokenizer in found if tokenizer is not None]
    if not own:
        return base_tokenizer
    folder, tokenizer = own[0]
    for other, its in found:
        if _content(its or base_tokenizer) != _content(tokenizer):
            raise GraftError(
                f"the tokenizer in {folder} differs from that of {other}: adapters with different tokenizers do not answer side by side, "
                "so load them one at a time"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows > max(base_tokenizer.get_vocab().values(), default=0):
        raise GraftError(
            f"the tokenizer in {folder} has tokens up to id {highest}, and this base has an embedding of {rows} rows: its tokens were "
            "added to the base, so resize it (--resize, or base.resize: auto)"
        )
    return tokenizer


def refuse_other_tokens(folder: Path, base_tokenizer: Any, tokenizer: Any, model: Any) -> None:
    """Raise `GraftError` for an adapter that was trained with another tokenizer than the one in use. model: the base."""
    its = tokenizer_for([folder], base_tokenizer, model)
    if its is not tokenizer and _content(its) != _content(tokenizer):
        raise GraftError(f"the adapter in {folder} was trained with another tokenizer than those that answer here")


def template_beside(folder: Path, tokenizer: Any) -> Template | None:
    """Return the template of an adapter's folder, None if it holds none. tokenizer: the result of `tokenizer_for`."""
    if (folder / FILE).is_file():
        return template_of(folder, tokenizer)
    if (folder / JINJA).is_file():
        return template_of(folder / JINJA, tokenizer)
    own = _chat_template(folder)
    return None if own is None else ChatTemplate.of(own, tokenizer)


def template_source(folder: Path) -> str | None:
    """Return which file beside an adapter its template comes from, None if there is none."""
    if (folder / FILE).is_file() or (folder / JINJA).is_file():
        return FILE if (folder / FILE).is_file() else JINJA
    return SETTINGS if _chat_template(folder) is not None else None


def _chat_template(folder: Path) -> str | None:
    """Return the chat template in a tokenizer's settings, as transformers up to 4 wrote it; of several, the one called `default`."""
    if not (folder / SETTINGS).is_file():
        return None
    found = read_object(folder / SETTINGS).get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
        if found is None:
            raise GraftError(
                f"{folder / SETTINGS} holds the chat templates {', '.join(map(str, named))}, none of them 'default'"
            )
    if found is not None and not isinstance(found, str):
        raise GraftError(f"{folder / SETTINGS}: chat_template is no text, but {type(found).__name__}")
    return found or None


def _beside(folder: Path, base_tokenizer: Any) -> Any:
    """Return the tokenizer in an adapter's folder, None if there is none. Settings alone change the marks of the base's tokenizer."""
    if not (folder / SETTINGS).is_file():
        return None
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        with named_errors(folder):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    changed, settings = copy.deepcopy(base_tokenizer), read_object(folder / SETTINGS)
    for name in _MARKS:
        mark = settings.get(name)
        mark = mark.get("content") if isinstance(mark, dict) else mark
        if mark is not None and mark != getattr(changed, name):
            if mark not in changed.get_vocab():
                raise GraftError(f"{folder / SETTINGS}: {name} is {mark!r}, which this base's tokenizer does not have")
            setattr(changed, name, mark)
    return changed


def _content(tokenizer: Any) -> str:
    """Return all that decides which ids a text becomes, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {} if backend is None else json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    marks = {name: getattr(tokenizer, name, None) for name in _MARKS}
    return json.dumps([parts or tokenizer.get_vocab(), marks], sort_keys=True, default=str)
