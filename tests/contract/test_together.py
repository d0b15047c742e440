"""Several adapters on one row: differences of weights are their sum, and others act one after another, as in a stack."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters.hooks import AttentionAdapter, EmbeddingAdapter
from graft.attaching.active import running
from graft.attaching.together import name_of
from graft.attention.install import flat_attention
from graft.errors import GraftError
from graft.injection.state import state_of
from graft.routing.context import ForwardContext
from tests.contract.table import Row, base, base_tensors, ids, logits, outputs, rows, with_adapters

OTHER = {"kind": "lora", "rank": 3, "alpha": 6, "sites": "linear"}


def difference(model: Any, name: str) -> dict[str, Tensor]:
    """What merging an adapter adds to the weights of its base."""
    plain = {key: tensor.clone() for key, tensor in base_tensors(model)}
    merged = copy.deepcopy(model)
    graft.merge(merged, name)
    return {key: tensor - plain[key] for key, tensor in base_tensors(merged) if tensor.is_floating_point()}


def added(family: str, *terms: tuple[float, dict[str, Tensor]]) -> Any:
    """A base with these differences in its weights."""
    model = base(family)
    own = dict(base_tensors(model))
    with torch.no_grad():
        for weight, deltas in terms:
            for key, delta in deltas.items():
                own[key].add_(weight * delta)
    return model


def stacked(model: Any, row: Row) -> Any:
    """A base with one stack of both adapters that has their weights."""
    other = base(row.family)
    graft.attach(other, {"both": [*row.config.parts(), OTHER]})
    (a, b), both = (state_of(model).adapters[name] for name in "ab"), state_of(other).adapters["both"]
    given = [*(each.module for each in (*a.installs, *b.installs)), *a.shared.values(), *b.shared.values()]
    fresh = [*(each.module for each in both.installs), *both.shared.values()]
    for own, module in zip(fresh, given, strict=True):
        own.load_state_dict(module.state_dict())
    return other


def differences(model: Any) -> list[dict[str, Tensor]] | None:
    """What both adapters add to the weights, if everything that adapter a does is a difference of weights that can be merged here."""
    installs = state_of(model).adapters["a"].installs
    if not all(each.site.type == "linear" and each.config.folds and not each.module.acts_before for each in installs):
        return None
    try:
        return [difference(model, name) for name in "ab"]
    except GraftError:  # a bias where the base has none, or a weight that other modules share
        return None


CHOSEN = (
    "llama-series-into-mlp llama-prefix-projection bloom-prompt-text gptj-llama-adapter-stack gpt2-llama-adapter-peft bert-prompt "
    "t5-prompt-stack qwen3-parallel-mlp gptj-hadamard gptj-oft llama-ia3 gptj-pissa bert-full-head t5-head-whole"
)


@rows(CHOSEN)
def test_two_adapters_on_one_row(row: Row) -> None:
    check_two(row)


@pytest.mark.slow
@rows(where=lambda row: row.id not in CHOSEN.split())
def test_any_kind_beside_another_on_one_row(row: Row) -> None:
    check_two(row)


def check_two(row: Row) -> None:
    model = with_adapters(row.family, a=row.config, b=OTHER)
    apart = differences(model)
    wanted = stacked(model, row) if apart is None else added(row.family, *((1.0, each) for each in apart))
    with graft.use(model, ["a", "b"]):
        close(model, wanted)
    if apart is not None:
        with graft.use(model, ["b", "a"]):
            close(model, wanted)
        with graft.use(model, {"b": 2, "a": -0.5}):
            close(model, added(row.family, (-0.5, apart[0]), (2.0, apart[1])))
    elif not has_virtual_tokens(model):
        with graft.use(model, {"a": 0.0, "b": 0}):
            close(model, base(row.family))
        with graft.use(model, {"a": 0, "b": 1.0}):
            alone = logits(model, ids())
        with graft.use(model, "b"):
            torch.testing.assert_close(alone, logits(model, ids()), atol=2e-4, rtol=1e-3)


def close(model: Any, wanted: Any) -> None:
    torch.testing.assert_close(logits(model, ids()), logits(wanted, ids()), atol=2e-4, rtol=1e-3)


def has_virtual_tokens(model: Any) -> bool:
    modules = [each.module for each in state_of(model).adapters["a"].installs]
    return any(
        isinstance(each, EmbeddingAdapter) or isinstance(each, AttentionAdapter) and not each.adds_attention
        for each in modules
    )


CHOICES: list[Any] = ["a", ["a", "b"], None, {"c": 0.5, "a": 1}, ["c", "b", "a"], "b"]
THREE = {
    "a": {"kind": "lora", "rank": 2, "sites": "attn.q mlp.down"},
    "b": [{"kind": "prefix", "tokens": 3}, {"kind": "series", "bottleneck": 4, "sites": "mlp"}],
    "c": {"kind": "parallel", "bottleneck": 4, "sites": "mlp"},
}


def test_rows_with_unlike_choices_equal_each_alone() -> None:
    model = with_adapters("llama", **THREE)
    with graft.route(model, CHOICES):
        mixed = logits(model, ids(len(CHOICES)))
    for number, choice in enumerate(CHOICES):
        with graft.use(model, choice):
            torch.testing.assert_close(mixed[number], logits(model, ids(len(CHOICES)))[number], atol=1e-4, rtol=1e-4)


def test_flat_rows_with_several_adapters_equal_padded_ones() -> None:
    model = with_adapters("llama", **THREE)
    names = tuple(name_of(model, choice) for choice in CHOICES)
    with graft.route(model, CHOICES):
        wanted = logits(model, ids(6))
    flat, positions = ids(6).view(1, -1), torch.arange(7).repeat(6)[None]
    with flat_attention(model), running(model, ForwardContext(names, lengths=(7,) * 6, flat=True)):
        found = logits(model, flat, position_ids=positions, use_cache=False)
    torch.testing.assert_close(found.view(wanted.shape), wanted, atol=1e-4, rtol=1e-4)


def test_generation_and_copies_take_several_adapters() -> None:
    model = with_adapters("llama", **THREE)
    with graft.route(model, CHOICES):
        wanted, tokens = logits(model, ids(6)), model.generate(ids(6), max_new_tokens=4, do_sample=False)
        torch.testing.assert_close(logits(copy.deepcopy(model), ids(6)), wanted, atol=0, rtol=0)
        torch.testing.assert_close(logits(pickle.loads(pickle.dumps(model)), ids(6)), wanted, atol=0, rtol=0)  # noqa: S301
    for number, choice in enumerate(CHOICES):
        with graft.use(model, choice):
            alone = model.generate(ids(6)[number : number + 1], max_new_tokens=4, do_sample=False)
        assert torch.equal(alone[0], tokens[number, : alone.shape[1]])


@pytest.mark.slow
def test_compiled_code_takes_several_adapters_without_compiling_again() -> None:
    model = with_adapters("llama", **THREE)
    with graft.route(model, CHOICES):
        wanted = logits(model, ids(6))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with graft.route(model, CHOICES):
        torch.testing.assert_close(logits(compiled, ids(6)), wanted, atol=1e-4, rtol=1e-4)
    with graft.route(model, CHOICES[::-1]), torch.compiler.set_stance("fail_on_recompile"):
        reverse = logits(compiled, ids(6))
    with graft.route(model, CHOICES[::-1]):
        torch.testing.assert_close(reverse, logits(model, ids(6)), atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_adapter_of_a_row() -> None:
    """A derivative equals a difference quotient, in fp64."""

    def loss() -> Tensor:
        return outputs(model, ids()).log_softmax(-1)[..., 3].mean()

    model = with_adapters("gpt2", a=THREE["a"], b=THREE["c"]).double()  # its norms stay in fp64
    graft.set_active(model, {"a": 0.5, "b": 2.0})
    parameters = {f"{name}.{key}": p for name in "ab" for key, p in graft.parameters(model, name)}
    assert all(p.requires_grad for p in parameters.values())
    loss().backward()
    for name in "ab":
        key, parameter = next(
            (key, p) for key, p in parameters.items() if key.startswith(name) and p.grad.abs().max() > 1e-6
        )
        at = parameter.grad.abs().argmax()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[at] += step
                values.append(loss())
                parameter.view(-1)[at] -= step
        assert float(parameter.grad.view(-1)[at]) == pytest.approx(float(values[0] - values[1]) / 2e-5, rel=1e-6), key


def test_detaching_one_of_several_leaves_the_others() -> None:
    model = with_adapters("llama", **THREE)
    graft.set_active(model, ["a", "c"])
    with pytest.raises(GraftError, match=r"'a' serves rows together with others \(a\+c\)"):
        graft.rename(model, "a", "d")
    with graft.use(model, ["a", "b", "c"]):
        graft.detach(model, "c")
        assert state_of(model).current.rows == "a+b"
    assert state_of(model).current.rows == "a"
    assert set(state_of(model).combinations) == {"a+b"}
    graft.rename(model, "a", "d")
    with graft.use(model, ["d", "b"]):
        assert torch.isfinite(logits(model, ids())).all()
    graft.detach(model)
    torch.testing.assert_close(logits(model, ids()), logits(base("llama"), ids()), atol=0, rtol=0)


def test_what_takes_one_adapter_says_so(tmp_path: Path) -> None:
    model = with_adapters("llama", **THREE)
    for act in (
        graft.merge,
        lambda m, name: graft.save(m, name, tmp_path),
        lambda m, name: graft.export(m, name, tmp_path),
    ):
        with pytest.raises(
            GraftError, match=r"takes the name of one adapter; given: \['a', 'c'\]. graft.combine makes one"
        ):
            act(model, ["a", "c"])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ([], "the list of adapters is empty: name one, or write None for the bare base"),
        (["a", "a"], "'a' is named twice"),
        (["a", "d"], "no adapter 'd' is attached"),
        ({"a": float("nan")}, "weight of adapter 'a' must be a finite number; given: nan"),
        ({"a": True}, "weight of adapter 'a' must be a finite number; given: True"),
        ({"a": 10**400}, "weight of adapter 'a' must be a finite number; given: 1000"),
        ({"b": 0.5}, "'b' has virtual tokens, which are there or not: its weight must be 1; given: 0.5"),
        (["h", "i"], "'i' computes model.layers.0.input_layernorm anew, without what 'h' did there: name 'i' first"),
        ([3], "a list of adapters holds names; given: 3"),
        (3, "adapters are one name, a list of names, a mapping from names to weights, or None; given: 3"),
    ],
)
def test_choices_that_mean_nothing_are_refused(choice: Any, message: str) -> None:
    model = with_adapters("llama", **THREE, h={"kind": "full", "sites": "norm"}, i={"kind": "full", "sites": "norm"})
    with pytest.raises(GraftError, match=re.escape(message)), graft.use(model, choice):
        pass
    assert state_of(model).combinations == {}
