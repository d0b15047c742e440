"""The reference checkpoints of other libraries and what those computed with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import graft


def cases(shared: Path, library: str) -> list[str]:
    """The names of one library's cases."""
    return sorted(path.name for path in (shared / "oracle" / library).iterdir() if (path / "meta.json").is_file())


def base_of(folder: Path, meta: dict[str, Any]) -> Any:
    """The base that a case was made for, as the model class of its task."""
    import transformers

    name = meta["base"]
    root = folder.parents[2] if name.startswith("models/") else folder.parents[1]
    classes = {"causal-lm": "AutoModelForCausalLM", "seq-cls": "AutoModelForSequenceClassification",
               "seq2seq": "AutoModelForSeq2SeqLM", "seq2seq-lm": "AutoModelForSeq2SeqLM"}  # fmt: skip
    cls = getattr(transformers, classes.get(meta["task"], "AutoModel"))
    return cls.from_pretrained(root / name, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def largest_difference(folder: Path) -> float:
    """Load the checkpoint of a case with Graft; the largest difference of its outputs from the expected ones, relative to the tolerance."""
    meta = json.loads((folder / "meta.json").read_text())
    model = base_of(folder, meta)
    graft.load(model, folder / "checkpoint", name="a")
    expected = load_file(folder / "expected.safetensors")
    return max(_difference(model, meta, expected, batch) for batch in ("unpadded", "padded"))


def _difference(model: Any, meta: dict[str, Any], expected: dict[str, Tensor], batch: str) -> float:
    output, mask = meta["output"], expected[f"{batch}.attention_mask"]
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    got = model(**{name: expected[f"{batch}.{name}"] for name in names if f"{batch}.{name}" in expected})[output]
    # What the library computes after loading, where that is not what it saved.
    wanted = expected.get(f"{batch}.reloaded_{output}", expected[f"{batch}.{output}"])
    if meta["task"] != "seq-cls" and f"{batch}.decoder_input_ids" not in expected:
        got, wanted = got[mask.bool()], wanted[:, -mask.shape[1] :][mask.bool()]
    assert got.shape == wanted.shape
    tolerance = max(1e-4, 1e-5 * float(wanted.abs().max()))
    return float((got - wanted).abs().max()) / tolerance
