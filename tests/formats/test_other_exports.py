"""Folders for LLM-Adapters and AdapterHub: our readers, which the reference checkpoints prove, read them back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.attaching.parameters import tensors
from graft.injection.state import state_of
from tests.contract.table import base, ids, logits, randomise

PLAIN: dict[str, Any] = {"bottleneck": 4, "activation": "tanh", "biases": False}
HELD: dict[str, tuple[str, str, Any]] = {
    "lora": ("llm-adapters", "llama", graft.LoRA(rank=3, alpha=6, sites="attn.q mlp.up")),
    "lora-layers": ("llm-adapters", "gptj", graft.LoRA(rank=3, alpha=6, sites="attn.q@1")),
    "adapterp": ("llm-adapters", "bloom", graft.Series(**PLAIN, sites="mlp.down")),
    "parallel": ("llm-adapters", "llama", graft.Parallel(**PLAIN, scale="learned", sites="mlp.up mlp.down")),
    "prefix": ("llm-adapters", "llama", graft.Prefix(tokens=3, positions="after_prefix")),
    "prefix-bloom": ("llm-adapters", "bloom", graft.Prefix(tokens=3, positions="after_prefix")),
    "seq-bn": ("adapterhub", "bert", graft.Series(bottleneck=4, reads="stream", sites="mlp")),
    "seq-bn-norms": ("adapterhub", "llama", {"kind": "series", "bottleneck": 4, "reads": "stream", "skip": "stream", "norm": True,
                                             "norm_after": True, "sites": "mlp"}),
    "double-seq-bn": ("adapterhub", "gpt2", graft.Series(bottleneck=4, activation="silu", scale="learned", sites="attn mlp")),
    "leave-out": ("adapterhub", "bert", graft.Series(bottleneck=4, scale="channel", sites="attn@1 mlp@1")),
    "par-bn": ("adapterhub", "llama", graft.Parallel(bottleneck=4, reads="stream", scale=4.0, init="mam", sites="mlp")),
    "t5": ("adapterhub", "t5", graft.Series(bottleneck=4, sites="mlp")),
    "hub-lora": ("adapterhub", "bert", graft.LoRA(rank=3, alpha=6, sites="attn.q attn.v mlp.down")),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_there_and_back_every_tensor_is_the_same(name: str, tmp_path: Path) -> None:
    format, family, spec = HELD[name]
    model = base(family)
    graft.attach(model, {"a": spec})
    randomise(model, "a")
    graft.export(model, "a", tmp_path / "out", format=format)
    again = graft.load(base(family), tmp_path / "out", name="a")
    first, second = (sorted(tensors(m, state_of(m), "a")) for m in (model, again))
    assert [key for key, _ in first] == [key for key, _ in second]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(first, second, strict=True))
    assert torch.equal(logits(again, ids()), logits(model, ids()))


@pytest.mark.parametrize(
    ("format", "spec", "reason"),
    [
        ("llm-adapters", graft.Series(bottleneck=4, sites="mlp.down"), "biases"),
        ("llm-adapters", graft.LoRA(rank=2, rslora=True), "alpha / sqrt"),
        ("llm-adapters", graft.ReFT(), "holds one of lora, series, parallel, prefix"),
        ("adapterhub", graft.Series(position="before", sites="mlp"), "before a sublayer"),
        ("adapterhub", graft.VeRA(), "what vera does"),
        ("nowhere", graft.LoRA(rank=2), "unknown format 'nowhere'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(
    format: str, spec: Any, reason: str, tmp_path: Path
) -> None:
    model = base("llama")
    graft.attach(model, {"a": spec})
    with pytest.raises(graft.GraftError, match=reason):
        graft.export(model, "a", tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
