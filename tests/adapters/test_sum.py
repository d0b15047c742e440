"""A sum: what its parts change at a site is added, whatever their order, and its parts draw dropout of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from tests.contract.table import base, ids, logits, randomise

LORA, SERIES, IA3 = {"kind": "lora", "rank": 2}, {"kind": "series", "bottleneck": 4}, {"kind": "ia3", "inputs": []}
SITE = "mlp.down@1"


def output(model: Any, rows: Any) -> tuple[Tensor, Tensor]:
    """Input and output of the last down projection."""
    found: list[Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda _module, args, out: found.extend((args[0], out))
    )
    with graft.use(model, rows):
        logits(model, ids())
    handle.remove()
    return found[0], found[1]


def filled(model: Any, name: str, source: str, part: int | None = None) -> None:
    """Copy the weights of an adapter into one part of a sum, or of a stack."""
    prefix = f"linear.{part}." if part is not None else "linear."
    theirs = {key.rpartition("linear.")[2]: p for key, p in graft.parameters(model, source)}
    with torch.no_grad():
        for key, p in graft.parameters(model, name):
            if prefix in key:
                p.copy_(theirs[key.rpartition(prefix)[2]])


@pytest.mark.parametrize("parts", [(LORA, SERIES), (SERIES, LORA, IA3), (IA3, IA3)])
def test_changes_are_added_to_the_same_output(parts: tuple[dict[str, Any], ...]) -> None:
    model = base("llama").double()
    single = {f"p{number}": {**part, "sites": SITE} for number, part in enumerate(parts)}
    graft.attach(model, {**single, "sum": {"kind": "sum", "of": list(parts), "sites": SITE}})
    for number, name in enumerate(single):
        randomise(model, name, number)
        filled(model, "sum", name, number)
    _, h = output(model, None)
    wanted = h + sum(output(model, name)[1] - h for name in single)
    torch.testing.assert_close(output(model, "sum")[1], wanted, atol=1e-12, rtol=0)
    if all(part in (LORA, IA3) for part in parts):
        alone = logits(model, ids())
        with graft.use(model, "sum"):
            wanted = logits(model, ids())
        graft.merge(model, "sum")
        torch.testing.assert_close(logits(model, ids()), wanted, atol=1e-10, rtol=0)
        assert not torch.allclose(alone, wanted)


def test_parts_draw_dropout_of_their_own() -> None:
    from graft.attaching.active import running
    from graft.routing.context import ForwardContext

    part = {"kind": "lora", "rank": 2, "dropout": 0.5}
    model = base("llama").double()
    graft.attach(model, {"one": {**part, "sites": SITE}, "sum": {"kind": "sum", "of": [part, part], "sites": SITE}})
    randomise(model, "one")
    for number in (0, 1):
        filled(model, "sum", "one", number)
    model.train()
    changes = {}
    for name in ("one", "sum"):
        found: list[Tensor] = []
        handle = model.model.layers[1].mlp.down_proj.register_forward_hook(
            lambda _module, _args, out, found=found: found.append(out)
        )
        with torch.no_grad(), running(model, ForwardContext((name,) * 3, lengths=(7,) * 3, seeds=(1, 2, 3))):
            model(ids())
        with torch.no_grad(), running(model, ForwardContext((None,) * 3, lengths=(7,) * 3, seeds=(1, 2, 3))):
            model(ids())
        handle.remove()
        changes[name] = found[0] - found[1]
    second = changes["sum"] - changes["one"]  # the first part draws what the part alone draws
    assert not torch.allclose(second, changes["one"]) and second.abs().sum() > 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"of": [LORA]}, "at least 2"),
        ({"of": LORA}, "takes a list of adapters"),
        ({"of": [LORA, [LORA, IA3]], "sites": SITE}, "not a preset or a list"),
        ({"of": [LORA, "papers/mam"], "sites": SITE}, "not a preset or a list"),
        ({"of": [LORA, SERIES]}, "its parts act at one site"),
        ({"of": [{**LORA, "sites": "attn.q"}, SERIES], "sites": SITE}, "its parts act at one site"),
        ({"of": ["prefix", "prefix"]}, "has nothing to add: write a list"),
        ({"of": ["head", "head"], "sites": "head"}, "replaces weights of the base"),
        ({"of": [SERIES, {"kind": "parallel", "reads": "stream"}, {"kind": "parallel"}], "sites": "mlp"}, "in a sum all read the same"),
    ],
)  # fmt: skip
def test_parts_that_have_no_sum_are_named(spec: dict[str, Any], said: str) -> None:
    model = base("llama")
    with pytest.raises(graft.GraftError, match=said):
        graft.attach(model, {"a": {"kind": "sum", **spec}})


@pytest.mark.parametrize("of", [[], ["lora"]])
def test_a_sum_of_less_than_two_is_refused(of: list[str]) -> None:
    with pytest.raises(graft.GraftError, match=f"a sum has at least 2 parts; given: {len(of)}"):
        graft.Sum(of=of)
