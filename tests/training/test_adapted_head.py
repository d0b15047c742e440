"""A head with adapters on supervised tokens in chunks: the same losses and gradients as the model's own forward on all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.data.batches import Layout
from graft.ops import cross_entropy
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.forward.layout import laid_out
from graft.training.forward.modes import set_training
from graft.training.rows import Row
from tests.training.conftest import VOCABULARY, examples, tiny

KINDS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 3, "sites": "head attn.q", "dropout": 0.4},
    "dora": {"kind": "dora", "rank": 2, "sites": "head", "dropout": 0.2},
    "ia3": {"kind": "ia3", "sites": "head mlp.down"},
    "series": {"kind": "series", "bottleneck": 4, "sites": "head"},
    "two": [{"kind": "ia3", "sites": "head"}, {"kind": "lora", "rank": 2, "sites": "head", "dropout": 0.3}],
    "body": {"kind": "lora", "rank": 2, "sites": "attn.v"},
}
"""All but the last act at the head."""


def model_with(kinds: dict[str, Any], family: str = "gpt2") -> Any:
    model = graft.attach(tiny(family, torch.float64), kinds)
    torch.manual_seed(1)
    with torch.no_grad():
        for name in kinds:
            for _, parameter in graft.parameters(model, name):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    set_training(model, list(kinds))
    for name in kinds:
        for _, parameter in graft.parameters(model, name):
            parameter.requires_grad_()
    return model


def rows_of(names: list[str | None]) -> list[Row]:
    pairs = enumerate(zip(names, examples(len(names), seed=5), strict=True))
    return [Row(str(name), name, each, at, at, 0, "adapter", 100 + at, 7) for at, (name, each) in pairs]


def losses(model: Any, forward: Forward, rows: list[Row], layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each target, and the gradient of a weighted sum of them for every parameter."""
    batch, context = Batcher(10_000, layout, 0).inputs(rows, forward.device)
    with laid_out(model, layout):
        found = forward.losses(batch, context)
        (found * torch.linspace(0.2, 1.7, len(found), dtype=found.dtype)).sum().backward()
    names = dict.fromkeys(row.adapter for row in rows if row.adapter is not None)
    grads = {f"{name}/{key}": each.grad.clone() for name in names for key, each in graft.parameters(model, name)}
    model.zero_grad()
    return found.detach(), grads


def proved(model: Any, row: Row) -> Forward:
    forward = Forward(model)
    batch, context = Batcher(100, "padded", 0).inputs([row], forward.device, seeded=False)
    assert forward.prove_head(batch, context) == "chunks"
    return forward


@pytest.mark.parametrize("layout", ["padded", "flat"])
@pytest.mark.parametrize("tokens", [5, 10_000])
def test_chunks_equal_the_models_own_forward(layout: Layout, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds in one batch, beside rows of the base; several chunks, and one."""
    model = model_with(KINDS)
    rows = rows_of([*KINDS, None, "lora", "lora"])
    rows = sorted(rows, key=lambda row: str(row.adapter))
    whole = Forward(model)  # not proved: the model's own forward
    wanted, gradient = losses(model, whole, rows, layout)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", tokens * VOCABULARY * 8)
    forward = proved(model, rows[0])
    sizes: list[int] = []
    monkeypatch.setattr(forward.root, "forward", None)  # it is not asked
    hook = forward.head.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[1]))
    found, other = losses(model, forward, rows, layout)
    hook.remove()
    assert max(sizes) <= max(tokens, 6)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    assert gradient.keys() == other.keys() and all(grad.abs().max() > 0 for grad in gradient.values())
    for key, grad in gradient.items():
        torch.testing.assert_close(other[key], grad, atol=1e-12, rtol=1e-11, msg=key)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_logits_that_are_scaled_or_capped(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with({"a": KINDS["lora"]}, family).float()
    rows = rows_of(["a"] * 3)
    wanted, gradient = losses(model, Forward(model), rows, "padded")
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * VOCABULARY * 4)
    found, other = losses(model, proved(model, rows[0]), rows, "padded")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    for key, grad in gradient.items():
        torch.testing.assert_close(other[key], grad, atol=1e-4, rtol=1e-3)


def test_a_kind_that_reads_whole_rows_keeps_the_models_own_forward() -> None:
    gate = {
        "kind": "gate",
        "of": {"kind": "lora", "rank": 2, "sites": "head"},
        "per": "row",
        "mean": "positions",
        "init_std": 0.5,
    }
    model = model_with({"a": gate, "b": KINDS["lora"]})
    rows = rows_of(["a", "a", "b"])
    forward = proved(model, rows[0])
    wanted, gradient = losses(model, Forward(model), rows, "padded")
    for _ in range(2):
        found, other = losses(model, forward, rows, "padded")
        assert torch.equal(found, wanted) and all(torch.equal(other[key], grad) for key, grad in gradient.items())
    assert forward.adapted.uncut
