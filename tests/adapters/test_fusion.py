"""AdapterFusion against its equations, written with other operations on the outputs of the trained adapters alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import graft
from graft.attaching.parameters import parameters, penalty
from graft.errors import GraftError
from graft.injection.state import state_of
from tests.contract.table import base, ids, logits, loss, randomise, with_adapters

KINDS = {
    "series": {"kind": "series", "bottleneck": 4, "sites": "mlp"},
    "stream": {"kind": "series", "bottleneck": 4, "reads": "stream", "sites": "mlp"},
    "parallel-stream": {"kind": "parallel", "bottleneck": 4, "reads": "stream", "sites": "mlp"},
    "parallel": {"kind": "parallel", "bottleneck": 5, "sites": "mlp"},
    "compacter": {"kind": "compacter", "rule": 4, "bottleneck": 8, "shared_rule": False, "sites": "mlp"},
    "lora": {"kind": "lora", "rank": 3, "sites": "mlp.down"},
    "dora": {"kind": "dora", "rank": 2, "sites": "mlp.down"},
}


def folders(tmp_path: Path, *kinds: str) -> list[str]:
    """Trained adapters of these kinds, each with weights of its own."""
    model = with_adapters("llama", **{f"t{number}": KINDS[kind] for number, kind in enumerate(kinds)})
    return [str(graft.save(model, name, tmp_path / name)) for name in graft.names(model)]


@pytest.mark.parametrize(
    ("kinds", "reads"),
    [
        (("series", "series", "series"), "output"),
        (("parallel", "series"), "input"),
        (("series", "series"), "input"),
        (("lora", "dora"), "output"),
    ],
)
@pytest.mark.parametrize("value", [True, False])
def test_fusion_is_attention_over_what_each_adapter_adds(
    kinds: tuple[str, ...], reads: str, value: bool, tmp_path: Path
) -> None:
    found = folders(tmp_path, *kinds)
    model = base("llama").double()
    graft.attach(model, {"f": {"kind": "fusion", "of": found, "reads": reads, "temperature": 1.5, "value": value}})
    randomise(model, "f")
    alone = base("llama").double()
    for number, folder in enumerate(found):
        graft.load(alone, folder, name=f"t{number}", any_base=True)
    for layer, block in enumerate(model.model.layers):
        module: Any = state_of(model).adapters["f"].installs[layer].module
        seen: dict[str, Any] = {}
        host = block.mlp if kinds[0] in ("series", "parallel") else block.mlp.down_proj
        twin = alone.model.layers[layer].mlp
        twin = twin if host is block.mlp else twin.down_proj
        host.register_forward_hook(lambda m, args, out, seen=seen: seen.update(x=args[0], y=out))
        model(ids())
        with torch.no_grad(), graft.use(alone, None):
            h = twin(seen["x"])
        added = []
        for number in range(len(found)):
            with torch.no_grad(), graft.use(alone, f"t{number}"):
                added.append(twin(seen["x"]) - h)
        asks = seen["x"] if reads == "input" else h
        query = asks @ module.query.weight.T + module.query.bias
        scores = [(query * (d @ module.key.weight.T + module.key.bias)).sum(-1, keepdim=True) / 1.5 for d in added]
        total = sum(score.exp() for score in scores)
        values = [d @ module.value.T if value else d for d in added]
        wanted: Tensor = h + sum(s.exp() / total * v for s, v in zip(scores, values, strict=True))  # pyright: ignore
        torch.testing.assert_close(seen["y"], wanted, atol=1e-5, rtol=1e-5)  # LLaMA's norms compute in float32


def test_only_the_fusion_trains_and_is_saved(tmp_path: Path) -> None:
    found = folders(tmp_path, "series", "series")
    model = base("llama")
    graft.attach(model, {"f": {"kind": "fusion", "of": found}})
    hidden = 32
    assert sum(p.numel() for _, p in parameters(model, "f")) == 2 * (3 * hidden**2 + 2 * hidden)  # of two layers
    first = penalty(model, "f")
    assert first is not None and float(first.detach()) == pytest.approx(
        2 * 0.01 * 1e-12 * (hidden**2 - hidden), rel=1e-3
    )
    randomise(model, "f")
    loss(model, ids()).backward()
    assert all(p.grad is not None for _, p in parameters(model, "f"))
    wanted = logits(model, ids())
    graft.save(model, "f", tmp_path / "fused")
    assert set(load_file(tmp_path / "fused" / "adapter_model.safetensors")) == {
        name for name, _ in parameters(model, "f")
    }
    again = graft.load(base("llama"), tmp_path / "fused", name="again")
    torch.testing.assert_close(logits(again, ids()), wanted, atol=0, rtol=0)
    with graft.route(again, ["again", None, "again"]):
        mixed = logits(again, ids())
    torch.testing.assert_close(mixed[[0, 2]], wanted[[0, 2]], atol=1e-5, rtol=1e-5)
    with pytest.raises(GraftError, match="cannot be merged"):
        graft.merge(again, "again")


def test_a_fusion_learns_which_adapter_to_take(tmp_path: Path) -> None:
    """Taught by the outputs of the second adapter, it puts most of its weight there."""
    found = folders(tmp_path, "series", "series")
    teacher = graft.load(base("llama"), found[1], name="t")
    wanted = logits(teacher, ids(8)).softmax(-1)
    model = base("llama")
    graft.attach(model, {"f": {"kind": "fusion", "of": found}})
    optimizer = torch.optim.Adam([p for _, p in parameters(model, "f")], lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        value = torch.nn.functional.kl_div(model(ids(8)).logits.log_softmax(-1), wanted, reduction="batchmean")
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0] / 20


@pytest.mark.parametrize(
    ("kinds", "settings", "message"),
    [
        (["series"], {}, "of"),
        (["series", "lora"], {}, "act at different sites, 'mlp' and 'mlp.down'"),
        (["series", "series"], {"sites": "attn"}, "a fusion acts where its adapters do, at 'mlp'; given sites: 'attn'"),
        (["series", "series"], {"temperature": 0}, "temperature"),
        (["series", "series"], {"value": False, "penalty": 0.1}, "with value: false there is no V"),
        (
            ["stream", "series"],
            {"reads": "stream"},
            "for bottlenecks that read the stream, and the one in .*t1 does not",
        ),
        (["parallel", "stream"], {}, "one adapter reads the site's input and another the residual stream"),
    ],
)
def test_adapters_that_cannot_be_fused_are_named(kinds: list[str], settings: Any, message: str, tmp_path: Path) -> None:
    found = folders(tmp_path, *kinds)
    model = base("llama")
    with pytest.raises(GraftError, match=message):
        graft.attach(model, {"f": {"kind": "fusion", "of": found, **settings}})
    assert graft.names(model) == ()


@pytest.mark.parametrize("kind", ["prefix", "ia3", "vera", "oft"])
def test_kinds_that_do_more_than_add_are_refused(kind: str, tmp_path: Path) -> None:
    model = with_adapters("llama", a=kind, b=kind)
    found = [str(graft.save(model, name, tmp_path / name)) for name in "ab"]
    with pytest.raises(GraftError, match=f"kind '{kind}' does (something else|not act)|cannot act|takes"):
        graft.attach(base("llama"), {"f": {"kind": "fusion", "of": found}})
    with pytest.raises(GraftError, match="`of` takes a list of adapter folders; given: 'runs/a'"):
        graft.attach(base("llama"), {"f": {"kind": "fusion", "of": "runs/a"}})


def test_a_trained_bottleneck_in_a_gate_is_asked_for_what_it_reads(tmp_path: Path) -> None:
    """Its gate reads the stream with the output, as that of a bottleneck that is no reference."""
    own = with_adapters("llama", t=KINDS["stream"])
    folder = graft.save(own, "t", tmp_path / "t")
    outputs = []
    for of in ({"from": str(folder)}, KINDS["stream"]):
        model = base("llama")
        graft.attach(model, {"g": {"kind": "gate", "of": of, "reads": "output", "per": "token"}})
        gates = {name: tensor for name, tensor in parameters(model, "g") if ".gate." in name}
        inner = {name.replace(".of.", "."): tensor for name, tensor in parameters(model, "g") if ".of." in name}
        with torch.no_grad():
            for number, tensor in enumerate(gates.values()):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
            for name, tensor in inner.items():
                tensor.copy_(load_file(folder / "adapter_model.safetensors")[name])
        outputs.append(logits(model, ids()))
    torch.testing.assert_close(outputs[0], outputs[1], atol=0, rtol=0)
