"""Every kind on every causal-LM type of the installed transformers: it works, or one `GraftError` says why, and the model is as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graft
from graft.adapters.parsing import parse
from graft.adapters.registry import BY_REFERENCE, entries
from graft.attaching.summary import spans
from tests.architectures import TYPES, UNBUILT, build, tokens

SAMPLE = {"deepseek_v3", "falcon_h1", "gemma4_text", "llama4_text", "rwkv"}
SMALL: dict[str, dict[str, Any]] = {
    **{kind: {"tokens": 3} for kind in ("prefix", "prompt", "p-tuning", "llama-adapter")},
    **{kind: {"bottleneck": 2} for kind in ("series", "parallel")},
    "sum": {"of": [{"kind": "lora", "rank": 2}, {"kind": "miss", "rank": 2}]},
    "gate": {"of": {"kind": "lora", "rank": 2}, "per": "token"},
    "mixture": {"of": {"kind": "lora", "rank": 2}},
}
EXTRA = [
    {"kind": kind, "bottleneck": 2, "sites": sites}
    for kind in ("series", "parallel")
    for sites in ("attn", "mlp", "layer")
]
WORKS = [
    *(
        ("prompt", name)
        for name in (
            "gemma4_text",
            "falcon_h1",
            "nemotron_h",
            "rwkv",
            "mamba",
            "mamba2",
            "jamba",
            "qwen3_next",
            "zamba2",
        )
    ),
    *(("prefix", name) for name in ("deepseek_v2", "deepseek_v3", "gemma4_text")),
    ("parallel", "llama4_text"),
    ("series", "llama4_text"),
]
"""What was a crash, or was refused, and has to work."""


def specs() -> list[dict[str, Any]]:
    kinds = [
        kind
        for kind, entry in entries().items()
        if entry.origin == "graft" and kind not in ("stack", "head", *BY_REFERENCE)
    ]
    return [*({"kind": kind, **SMALL.get(kind, {})} for kind in kinds), *EXTRA]


def logits(model: Any) -> torch.Tensor:
    out = model(input_ids=tokens(), use_cache=False)
    return out.logits if hasattr(out, "logits") else out[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.slow]) for name in TYPES if name not in UNBUILT],
)
@pytest.mark.filterwarnings("ignore:kind .* does not adapt")
def test_a_kind_works_or_says_why_not(name: str) -> None:
    model = build(name).requires_grad_(False)
    with torch.no_grad():
        before = logits(model)
    for spec in specs():
        try:
            graft.attach(model, {"a": spec})
        except graft.GraftError as error:
            assert str(error) and not any(works == (spec["kind"], name) and "sites" not in spec for works in WORKS), (
                spec,
                error,
            )
            assert "graft_state" not in model.__dict__
            continue
        with torch.no_grad():
            after = logits(model)
        assert torch.isfinite(after).all(), spec
        if parse(spec).starts_as_identity:
            assert torch.equal(after, before) or name == "falcon" and spec["kind"] == "llama-adapter", spec
        if name != "reformer":  # its reversible layers pass no gradient
            logits(model).float().square().mean().backward()
            grads = [parameter.grad for _, parameter in graft.parameters(model, "a")]
            assert any(grad is not None and bool(grad.any()) for grad in grads), spec
        graft.detach(model)
        assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("kind", "name"), WORKS)
def test_what_crashed_works(kind: str, name: str) -> None:
    spec = {"kind": kind, **SMALL[kind], **({"sites": "mlp"} if kind in ("series", "parallel") else {})}
    model = build(name).requires_grad_(False)
    graft.attach(model, {"a": spec})
    logits(model).float().square().mean().backward()
    assert any(each.grad is not None and bool(each.grad.any()) for _, each in graft.parameters(model, "a"))


def test_an_exception_of_the_trial_pass_names_kind_model_and_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    mlp = type(model.model.layers[1].mlp)
    own = mlp.forward

    def breaks(always: bool) -> Any:
        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            if always or model.__dict__["graft_state"].current.rows is not None:
                raise KeyError("attn")
            return own(self, x)

        return forward

    for always, message in (
        (False, "kind 'series' does not work on LlamaForCausalLM: a trial pass fails .KeyError: 'attn'"),
        (True, "LlamaForCausalLM fails on a few tokens without any adapter .KeyError: 'attn'"),
    ):
        monkeypatch.setattr(mlp, "forward", breaks(always))
        with pytest.raises(graft.GraftError, match=message):
            graft.attach(model, {"a": graft.Series(bottleneck=2, sites="attn")})
    monkeypatch.undo()
    assert "graft_state" not in model.__dict__ and torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v32",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("axk2", "dots3_note_text", "glm_moe_dsa", "hy_v4")),
    ],
)
def test_the_indexer_of_sparse_attention_learns_nothing_and_is_no_site(name: str) -> None:
    model = build(name).requires_grad_(False)
    graft.attach(model, {"a": [graft.LoRA(rank=1, sites="linear"), graft.Full(sites="norm")]})
    logits(model).float().square().mean().backward()
    assert all(parameter.grad is not None for _, parameter in graft.parameters(model, "a"))
    graft.detach(model)
    with pytest.raises(graft.GraftError, match="no linear layer and no norm of this model has a bias"):
        graft.attach(model, {"a": graft.BitFit()})
    graft.attach(model, {"a": graft.LoRA(rank=1, sites=r"re:.*\.indexer\.wk")})  # named, it is adapted


def test_the_summary_says_which_layers_lack_a_site() -> None:
    model = build("lfm2_moe")
    graft.attach(model, {"a": graft.LoRA(rank=1, sites="attn.q"), "b": graft.Series(bottleneck=2, sites="layer")})
    said = str(graft.summary(model))
    assert "a: no attn.q in layer 0\n" in said and "b: no" not in said
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
