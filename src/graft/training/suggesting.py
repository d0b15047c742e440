"""Settings to start from, for a base, a kind and data: `graft init` writes them.

What lies on this machine is looked at: the columns of the data, their lengths, the base's room and chat template. What does not, or
cannot be read, keeps its defaults, and a note says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graft.adapters.learning_rates import learning_rate
from graft.bases import load_base, load_tokenizer
from graft.bases.loading import SEEDLING, own_task
from graft.bases.tokens import special_among, unlearnt
from graft.config import RunConfig, load_run
from graft.config.base import BaseConfig
from graft.config.data import SourceConfig
from graft.data.datasets import TokenDataset
from graft.data.file_readers import read_rows
from graft.data.folders import local_files
from graft.data.pair_shapes import SIDES
from graft.data.preparing import prepare
from graft.data.reading import read
from graft.errors import GraftError
from graft.seedling import path as seedling_path
from graft.training.reading import room_of

MOST_TOKENS = 2048
"""Longest samples that are kept whole without being asked for."""
MOST_ROWS = 50_000
"""Rows whose lengths are measured."""
_LONGEST = 10**7
MOST_BYTES = 4 * 2**30
"""Largest base whose weights are read, to see whether it has learnt its end mark."""
METHOD_RATES = {"full": 1e-5, "qft": 2e-5, "mezo": 1e-4}
"""Usual learning rates of methods of training; those of adapters depend on the kind."""
_SAME: dict[str, dict[str, tuple[str, ...]]] = {
    "causal": {
        "instruction": ("instruction", "question", "prompt", "query", "input", "source", "mr", "problem", "article", "document"),
        "output": ("output", "response", "answer", "completion", "target", "ref", "solution", "summary", "reply"),
    },
    "preference": {
        "prompt": ("prompt", "question", "instruction", "query"),
        "chosen": ("chosen", "preferred", "accepted", "winner", "better"),
        "rejected": ("rejected", "dispreferred", "loser", "worse"),
    },
    "classification": {
        "text": ("text", "sentence", "review", "content", "comment", "message", "question", "title"),
        "label": ("label", "class", "category", "sentiment", "target", "intent"),
    },
    "regression": {
        "text": ("text", "sentence", "review", "content", "comment"),
        "label": ("label", "score", "value", "rating", "target"),
    },
}  # fmt: skip
"""For each task: a column that its rows need, and names under which data have it."""


@dataclass
class Suggestion:
    """The settings of a run that differ from the defaults, as its YAML has them, and notes about them."""

    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def suggest(
    base: str, data: str, adapter: Any, task: str | None = None, method: str = "adapter", quantize: str | None = None
) -> Suggestion:
    """Return settings for a run with this base, data and adapter (None where the method trains the base).

    task: None takes the one that suits the base and the data. quantize: how the base is held in few bits.
    Raises `GraftError` for an unknown kind or preset, or a wrong name.
    """
    found = Suggestion({"base": {"model": base}, "adapter": adapter, "data": {"train": data}, "train": {}})
    if method != "adapter":
        found.settings["train"]["method"] = method
    if quantize is not None:
        found.settings["base"]["quantize"] = quantize
    rows = _first_rows(data, found.notes)
    here = base == SEEDLING or Path(base).expanduser().is_dir()
    task = task or _task(base if here else None, rows)
    found.settings["data"]["task"] = task
    if task == "preference":
        # A base that trains is no reference to compare with.
        found.settings["train"]["objective"] = "dpo" if adapter is not None else "orpo"
    config = _config(found)
    found.settings["train"]["lr"] = (
        METHOD_RATES[method] if config.adapter is None or method in METHOD_RATES else learning_rate(config.adapter)
    )
    if method == "mezo":
        found.settings["train"]["schedule"] = "constant"
    if not here:
        found.notes.append(f"{base} is not on this machine: data.max_length and data.template keep their defaults")
    elif rows:
        try:
            _look(found, rows, task)
        except GraftError as error:
            found.notes.append(f"the data were not looked at: {str(error).splitlines()[0]}")
    _config(found)
    return found


def _config(found: Suggestion) -> RunConfig:
    return load_run(found.settings)


def _first_rows(data: str, notes: list[str]) -> list[dict[str, Any]]:
    """Return rows of the first file, to see its columns; none, with a note, if there is no readable file."""
    try:
        files = local_files(SourceConfig(path=data))
        if files is None:
            notes.append(f"{data} is not on this machine: data.max_length keeps its default")
            return []
        return list(read_rows(files[0])[:100])
    except GraftError as error:
        notes.append(str(error).splitlines()[0])
        return []


def _task(base: str | None, rows: list[dict[str, Any]]) -> str:
    """Return the task that suits a base on this machine (None: it is elsewhere) and the columns of the data."""
    try:
        own = "causal" if base is None else own_task(BaseConfig(model=base))
    except GraftError:
        own = "causal"
    return "preference" if own == "causal" and rows and set(SIDES) <= set(rows[0]) else own


def _look(found: Suggestion, rows: list[dict[str, Any]], task: str) -> None:
    """Set the columns, the template and the lengths."""
    data, base = found.settings["data"], BaseConfig(model=found.settings["base"]["model"])
    if fields := _fields(data["train"], rows, task):
        data["train"] = {"path": data["train"], "fields": fields}
        pairs = ", ".join(f"{theirs} as {ours}" for ours, theirs in fields.items())
        found.notes.append(f"the columns were taken by their names: {pairs}")
    tokenizer = load_tokenizer(base)
    if task in ("causal", "preference"):
        sample = read(SourceConfig(**_source(data["train"], limit=1)), task=task)[0]
        is_text = len(sample.messages) == 1 and sample.messages[0]["role"] == "assistant"
        data["template"] = "plain" if is_text else "chat" if getattr(tokenizer, "chat_template", None) else "alpaca"
    whole = {**data, "train": _source(data["train"], limit=MOST_ROWS), "max_length": _LONGEST, "cache": False}
    prepared = prepare(_config(Suggestion({**found.settings, "data": whole})).data, tokenizer)
    report = prepared.report
    longest, room = report.train.longest, room_of(_config(found)) or MOST_TOKENS
    most = min(room, MOST_TOKENS)
    data["max_length"] = max(2, min(most, -(-longest // 8) * 8))
    if longest > most:
        data["overlong"] = "truncate_prompt"
        found.notes.append(
            f"the longest sample has {longest:,} tokens, and {most:,} are kept: longer questions are cut (data.overlong)"
        )
    found.settings["train"]["batch_size"] = min(16, report.train.samples)
    if (
        task in ("causal", "preference") and found.settings["adapter"] is not None
    ):  # a base that trains learns them itself
        _cure(found, base, prepared.train)


def _cure(found: Suggestion, config: BaseConfig, train: TokenDataset) -> None:
    """Train the rows of special tokens that the data use and the base has not learnt, its end mark above all."""
    folder = Path(seedling_path() if config.model == SEEDLING else config.model).expanduser()
    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) > MOST_BYTES:
        found.notes.append("the weights of the base were not read: graft check says whether it has learnt its end mark")
        return
    base, kind = load_base(config.model_copy(update={"device": "cpu"})), found.settings["adapter"]
    read, written = (
        special_among(base.tokenizer, ids) for ids in (np.unique(train.input_ids).tolist(), train.ids_written)
    )
    odd = unlearnt(base.model, "", base.tokenizer, read, written)
    if not odd:
        return
    named = ", ".join(str(base.tokenizer.convert_ids_to_tokens(token)) for token in odd)
    found.settings["adapter"] = [kind, {"kind": "full", "sites": "embed head", "tokens": sorted(odd)}]
    try:
        _config(found)
    except GraftError:
        found.settings["adapter"] = kind
        found.notes.append(f"the base has not learnt {named}, so answers may never end: graft check says what helps")
        return
    found.notes.append(
        f"the base has not learnt {named}, so answers may never end: the adapter trains the rows of these tokens too (kind full)"
    )


def _source(train: Any, limit: int) -> dict[str, Any]:
    return {**(train if isinstance(train, dict) else {"path": train}), "limit": limit}


def _fields(path: str, rows: list[dict[str, Any]], task: str) -> dict[str, str]:
    """Return the columns to rename, by their names; none if the rows are understood as they are, or no names fit."""
    try:
        read(SourceConfig(path=path, limit=1), task=task)
        return {}
    except GraftError:
        columns = {str(column).lower(): str(column) for column in rows[0]}
    wanted = _SAME.get(task, _SAME["causal"])
    taken: dict[str, str] = {}
    for ours, names in wanted.items():
        name = next((name for name in names if name in columns and columns[name] not in taken.values()), None)
        if name is None:
            return {}
        taken[ours] = columns[name]
    return {ours: theirs for ours, theirs in taken.items() if ours != theirs}
