"""Gates: UniPELT's limits, what the mean runs over, where a gate has no meaning, and gates computed here from the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters.parsing import parse
from graft.adapters.presets import Preset
from tests.contract.table import base, ids, logits, loss, randomise

QV = "attn.q attn.v"
SMALL = {"preset": "papers/unipelt", "tokens": 3, "projection": 6, "rank": 2, "alpha": 2.0, "bottleneck": 6}
UNION = [
    graft.Prefix(tokens=3, projection=6),
    graft.LoRA(rank=2, alpha=2.0, sites=QV),
    graft.Series(bottleneck=6, reads="stream", init="bert", sites="mlp"),
]
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])


def unipelt(**biases: float) -> Any:
    """UniPELT on BERT in float64 with random weights, and constant gates at the parts that are named with a bias."""
    model = base("bert").double()
    graft.attach(model, {"a": SMALL})
    randomise(model, "a")
    constant(model, "a", biases)
    return model


@torch.no_grad()
def constant(model: Any, name: str, biases: dict[str, float]) -> None:
    for key, parameter in graft.parameters(model, name):
        part = next((part for part in biases if f".{part}.gate." in key or f".{part}_1.gate." in key), None)
        if part is not None:
            parameter.fill_(biases[part] if key.endswith("bias") else 0.0)


def without_gates(model: Any, parts: list[Any]) -> Any:
    """The union of these parts without gates, with the weights of a model with them."""
    plain = base("bert").double()
    graft.attach(plain, {"a": parts})
    found = {key.replace(".of.", "."): parameter for key, parameter in graft.parameters(model, "a")}
    with torch.no_grad():
        for key, parameter in graft.parameters(plain, "a"):
            parameter.copy_(found[key])
    return plain


def test_open_gates_are_the_union_with_scale_one_and_closed_ones_leave_the_prefix() -> None:
    model = unipelt(prefix=30.0, linear=30.0, mlp=30.0)
    wanted = logits(without_gates(model, UNION), ids(3, 6), attention_mask=MASK)
    torch.testing.assert_close(logits(model, ids(3, 6), attention_mask=MASK), wanted, atol=1e-10, rtol=0)
    model = unipelt(prefix=30.0, linear=-30.0, mlp=-30.0)
    wanted = logits(without_gates(model, UNION[:1]), ids(3, 6), attention_mask=MASK)
    torch.testing.assert_close(logits(model, ids(3, 6), attention_mask=MASK), wanted, atol=1e-10, rtol=0)


def test_permuting_the_batch_permutes_the_outputs_and_padding_is_left_out() -> None:
    model, order = unipelt(), torch.tensor([2, 0, 1])
    found = logits(model, ids(3, 6), attention_mask=MASK)
    moved = logits(model, ids(3, 6)[order], attention_mask=MASK[order])
    torch.testing.assert_close(moved, found[order], atol=1e-12, rtol=0)
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = logits(model, ids(3, 6)[row : row + 1, :length])
        torch.testing.assert_close(found[row : row + 1, :length], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mean", ["tokens", "positions"])
def test_a_gate_is_the_mean_of_sigmoids_over_tokens_or_over_all_positions(mean: str) -> None:
    """One LoRA at the queries of the first layer, whose input is known: the output of the embeddings."""
    model = base("bert").double()
    lora = {"kind": "lora", "rank": 2, "sites": "attn.q@0"}
    graft.attach(model, {"gated": {"kind": "gate", "of": lora, "mean": mean}, "plain": lora})
    randomise(model, "gated")
    seen: dict[str, Tensor] = {}
    query = model.bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda _module, args, out: seen.update(x=args[0], h=out))
    logits(model, ids(3, 6), attention_mask=MASK)
    own = {key.rpartition("linear.")[2]: parameter.detach() for key, parameter in graft.parameters(model, "gated")}
    each = torch.sigmoid(seen["x"] @ own["gate.weight"].t() + own["gate.bias"])
    weights = (MASK.double() if mean == "tokens" else torch.ones(3, 6).double())[..., None]
    g = (each * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    plain = seen["x"] @ query.weight.t() + query.bias
    wanted = plain + g * 8.0 * (seen["x"] @ own["of.A"].t() @ own["of.B"].t())  # alpha / rank = 16 / 2
    torch.testing.assert_close(seen["h"], wanted, atol=1e-12, rtol=0)


def test_gradients_reach_gates_and_what_is_in_them() -> None:
    model = unipelt().train()
    loss(model, ids(3, 6), attention_mask=MASK).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in graft.parameters(model, "a"))


def test_over_all_positions_a_causal_model_runs_whole_sequences_and_refuses_to_continue_a_cache() -> None:
    model = base("llama")
    graft.attach(model, {"a": {"kind": "gate", "of": {"kind": "prefix", "tokens": 3}, "mean": "positions"}})
    randomise(model, "a")
    assert logits(model, ids()).isfinite().all()
    with pytest.raises(graft.GraftError, match="a call that continues a cache of 4 tokens"):
        model.generate(ids(2, 4), max_new_tokens=3, do_sample=False, attention_mask=torch.ones(2, 4, dtype=torch.long))
    out = model.generate(ids(2, 4), max_new_tokens=3, do_sample=False, use_cache=False)
    assert out.shape == (2, 7)


GATE = {"kind": "gate"}
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"of": "lora"}, "set per: token"),
    ("t5", {"of": {"kind": "lora", "sites": "decoder.attn.q"}}, "set per: token"),
    ("llama", {"of": "prefix", "per": "token"}, "keys and values that all tokens of a row share"),
    ("bert", {"of": "prefix", "reads": "output"}, "reads: output is after the softmax"),
    ("llama", {"of": "prompt", "per": "token"}, "puts tokens before the sequence"),
    ("llama", {"of": {"kind": "llama-adapter", "adds": "after_o"}, "per": "token"}, "after the output projection"),
    ("llama", {"of": "head", "per": "token"}, "replaces weights of the base"),
    ("llama", {"of": {"kind": "lora", "sites": "embed"}, "per": "token"}, "token ids, which a gate cannot read"),
    ("llama", {"of": {"kind": "series", "position": "before", "sites": "mlp"}, "per": "token", "reads": "output"}, "changes the input"),
    ("llama", {"of": "lora", "per": "token", "mean": "positions"}, "with per: token there is no mean"),
    ("llama", {"of": "lora", "per": "tokens"}, "per must be 'row' or 'token'"),
    ("llama", {"of": "llm-adapters/lora", "per": "token"}, "but it is a preset"),
    ("llama", {"of": ["lora", "ia3"], "per": "token"}, "but it is a list of adapters"),
    ("llama", {}, "of"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields", "said"), REFUSALS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_where_a_gate_has_no_meaning_it_says_so(family: str, fields: dict[str, Any], said: str) -> None:
    model = base(family)
    with pytest.raises(graft.GraftError, match=said):
        graft.attach(model, {"a": {**GATE, **fields}})
    assert "graft" not in model._modules


def test_a_gate_cannot_be_merged_and_says_why() -> None:
    model = base("llama")
    graft.attach(model, {"a": {**GATE, "of": "lora", "per": "token"}})
    with pytest.raises(graft.GraftError, match="a gate depends on the input"):
        graft.merge(model, "a")


def test_changes_of_a_preset_reach_the_kinds_inside_gates() -> None:
    found = parse({"preset": "papers/unipelt", "tokens": 4, "rank": 2, "init_bias": 1.0, "dropout": 0.1})
    assert isinstance(found, Preset)
    prefix, lora, series = found.resolve(frozenset()).parts()
    assert [part.of.kind for part in (prefix, lora, series)] == ["prefix", "lora", "series"]  # pyright: ignore
    assert (prefix.of.tokens, lora.of.rank, lora.of.dropout, series.of.dropout) == (4, 2, 0.1, 0.1)  # pyright: ignore
    assert all(part.init_bias == 1.0 for part in (prefix, lora, series))  # pyright: ignore
    assert (lora.sites, series.sites) == (QV, "mlp")
    with pytest.raises(graft.GraftError, match="has no field 'tokenz'"):
        parse({"preset": "papers/unipelt", "tokenz": 4})


def test_a_saved_unipelt_is_deployed_without_the_projection(tmp_path: Any) -> None:
    model = unipelt()
    graft.save(model, "a", tmp_path / "a")
    again = graft.load(base("bert").double(), tmp_path / "a", name="a")
    found, wanted = (logits(each, ids(3, 6), attention_mask=MASK) for each in (again, model))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    assert not any("shared" in name for name, _ in graft.parameters(again, "a"))
