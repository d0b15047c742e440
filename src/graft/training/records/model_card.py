"""Write the README.md of a trained adapter: what it is, its data and settings, its losses, and how to load it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from graft.architectures.walk import public_name
from graft.version import __version__

if TYPE_CHECKING:
    from graft.config import RunConfig
    from graft.training.job import Job


def model_card(
    config: RunConfig, job: Job, losses: dict[str, float | None], facts: dict[str, Any], classes: int = 0
) -> str:
    """Return the model card as Markdown.

    losses: by name; None leaves one out. facts: further lines of the table (data, template, hardware). classes: their number.
    """
    model, options = CLASSES[config.data.task]
    base = public_name(config.base.model)
    method = config.train.method
    adapter: Any = (
        {"kind": method.kind, "parts": method.parts}
        if config.adapter is None
        else config.adapter.model_dump(mode="json")
        if isinstance(config.adapter, BaseModel)
        else config.adapter
    )
    rows = {
        "Base": base + (f" @ {config.base.revision}" if config.base.revision else ""),
        "Method" if config.adapter is None else "Adapter": ", ".join(
            f"{key} {_short(value)}" for key, value in _plain(adapter).items() if value not in ({}, [], None, False)
        ),
        "Parameters": f"{job.trainable.count:,}",
        **facts,
        "Steps": f"{job.step} of {job.steps} ({job.epochs_done:.2f} epochs), {config.train.batch_size} samples each",
        "Settings": _changed(config) or "all at their defaults",
        **{name: f"{loss:.4f}" for name, loss in losses.items() if loss is not None},
        "Versions": f"graft {__version__}, torch {importlib.metadata.version('torch')}, "
        f"transformers {importlib.metadata.version('transformers')}",
    }
    table = "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items())
    table = table.replace(f"{Path.home()}/", "~/")  # the card is for others
    whole, folder = config.adapter is None, "path/to/this/folder"
    kind, imported = _plain(adapter).get("kind", "adapter"), "" if whole else "import graft\n"
    loading = "" if whole else f'\ngraft.load(model, "{folder}")'
    return f"""---
library_name: {"transformers" if whole else "graft"}
base_model: {base}
tags: [{"" if whole else "adapter, "}{kind}]
---

# {job.name}

{f"`{base}`, trained with Graft: its own weights changed." if whole else f"An adapter for `{base}`, trained with Graft."}

| | |
|---|---|
{table}

```python
{imported}from transformers import {model}

model = {model}.from_pretrained("{folder if whole else base}"{"" if whole else options.format(count=classes)}){loading}
```

{LAST_WORDS[config.data.task]}
"""


CLASSES = {
    "causal": ("AutoModelForCausalLM", ""),
    "preference": ("AutoModelForCausalLM", ""),
    "seq2seq": ("AutoModelForSeq2SeqLM", ""),
    "classification": ("AutoModelForSequenceClassification", ", num_labels={count}"),
    "regression": ("AutoModelForSequenceClassification", ", num_labels=1"),
}
"""The class of transformers that a base is loaded with and the options that it needs, by `data.task`."""
_TEMPLATE = "The template of its prompts is saved beside it; `graft chat` and `graft eval` take it from there."
_TASK = "What it predicts is saved beside it (task.json); `graft predict` and `graft eval` take it from there."
LAST_WORDS = {
    "causal": _TEMPLATE,
    "seq2seq": _TEMPLATE,
    "classification": _TASK,
    "regression": _TASK,
    "preference": _TEMPLATE,
}


def _plain(adapter: Any) -> dict[str, Any]:
    if isinstance(adapter, dict):
        return adapter
    preset = getattr(adapter, "preset", None)
    return {"preset": preset} if preset else {"kind": str(adapter)}


def _short(value: Any) -> str:
    if isinstance(value, BaseModel) and hasattr(value, "kind"):
        fields = value.model_dump()
        return f"{fields.pop('kind')} ({', '.join(f'{name} {field}' for name, field in fields.items())})"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _changed(config: RunConfig) -> str:
    """The settings of data and training that differ from the defaults."""
    found = []
    for section in (config.data, config.train):
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if not field.is_required() and value != field.get_default(call_default_factory=True):
                found.append(f"{name} {_short(value)}")
    return ", ".join(found)
