"""Keys and values that depend on the row: the same for each row they are the plain prefix, in every layout; and each row gets its own."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters.base import Adapter
from graft.adapters.composite import Composite, WrapsAttention, wrap
from graft.adapters.hooks import ALL_ROWS
from graft.adapters.registry import _registered
from graft.architectures.site import SiteSpec
from graft.attaching.active import running
from graft.attention import flat_attention
from graft.routing.context import AdapterContext, ForwardContext
from tests.contract.table import base, ids, logits, loss, randomise

LENGTHS = (4, 2, 5, 3)
FAMILIES = ["llama", "bloom", "gptj", "gemma2", "gpt2"]
BOTH = [graft.Prefix(tokens=3), graft.Prefix(tokens=2, positions="after_prefix"), graft.LoRA(rank=2, sites="attn.q")]
ROUTE = ("a", None, "b", "a")


class PerRow(Composite):
    """Give each row the inner prefix, times one number per row: 1, or the mean of its inputs."""

    kind: Literal["per-row"] = "per-row"
    factor: Literal["one", "mean"] = "one"

    def build(self, spec: SiteSpec) -> Adapter:
        return wrap(spec, self.of.build(spec), attention={"one": Copied, "mean": Scaled}[self.factor])


class Copied(WrapsAttention):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reads, self.per_row, self.reads_mask = "input", True, True

    def factor(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        return x.new_ones(len(ctx.lengths or ()) if ctx.flat else len(x))

    def keys_values(self, x: Tensor | None = None, ctx: AdapterContext = ALL_ROWS) -> tuple[Tensor, Tensor]:
        assert x is not None
        factor = self.factor(x, ctx)[:, None, None, None]
        keys, values = self.of.keys_values(x, ctx)
        return factor * keys, factor * values


class Scaled(Copied):
    def factor(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        return ctx.mean(x).mean(-1) * 10


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registered, "per-row", PerRow)


def model_of(family: str, around: Any = None, attention: str | None = None) -> Any:
    """A base in float64 with BOTH as "a" and another prefix as "b", with something around each prefix."""
    parts = [part if around is None or part.kind != "prefix" else around(part) for part in BOTH]
    model = base(family, attention).double()
    torch.manual_seed(3)
    graft.attach(model, {"a": parts, "b": parts[0]})
    for number, name in enumerate("ab"):
        randomise(model, name, number)
    return model


def copied(part: Any) -> Any:
    return PerRow(of=part)


def scaled(part: Any) -> Any:
    return PerRow(of=part, factor="mean")


def flat(model: Any, rows: Any) -> Tensor:
    tokens = torch.cat([ids(1, length, seed=length) for length in LENGTHS], 1)
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    more = (
        {}
        if model.config.model_type == "bloom"
        else {"position_ids": places, "attention_mask": torch.zeros(1, 1, 1, 1)}
    )
    with flat_attention(model), running(model, ForwardContext(rows, LENGTHS, flat=True)):
        return logits(model, tokens, use_cache=False, **more)


@pytest.mark.parametrize("family", [*FAMILIES, "bert", "t5"])
def test_rows_with_equal_tokens_are_the_plain_prefix_in_every_layout(family: str) -> None:
    plain, rowwise = model_of(family), model_of(family, copied)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, :2] = mask[2, :3] = 0

    def everywhere(model: Any) -> list[Tensor]:
        found = [logits(model, ids(4, 6), attention_mask=mask)]
        with graft.route(model, ROUTE):
            found.append(logits(model, ids(4, 6), attention_mask=mask))
        if family in FAMILIES:
            found += [flat(model, "a"), flat(model, ROUTE), flat(model, ("b",) * 4)]
            with graft.route(model, ROUTE[:2]):  # beams repeat rows
                settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 2}
                found.append(model.generate(ids(2, 5), attention_mask=torch.ones(2, 5), **settings).double())
        return found

    for one, other in zip(everywhere(rowwise), everywhere(plain), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("family", "attention"), [("llama", "eager"), ("bloom", None), ("gpt2", "sdpa")])
def test_each_row_gets_its_own_tokens(family: str, attention: str | None) -> None:
    model = model_of(family, scaled, attention)
    rows = [ids(1, length, seed=length) for length in LENGTHS]
    with torch.no_grad():
        alone = {
            name: [logits(model, row, use_cache=False) for row in rows]
            for name in "ab"
            if graft.set_active(model, name) is None
        }
    for route in (ROUTE, ("b", "a", None, "b")):
        together = flat(model, route)[0].split(LENGTHS)
        for number, name in enumerate(route):
            if name is not None:
                torch.testing.assert_close(together[number], alone[name][number][0], atol=1e-11, rtol=0)
    equal = torch.cat([ids(1, 5, seed=seed) for seed in (1, 2, 3)])
    with graft.use(model, "a"):
        batch, ones = logits(model, equal), torch.cat([logits(model, row[None]) for row in equal])
        torch.testing.assert_close(batch, ones, atol=1e-11, rtol=0)


def test_gradients_reach_the_row_and_are_the_same_under_checkpointing() -> None:
    found = []
    for checkpointed in (False, True):
        model = model_of("llama", lambda part: PerRow(of=part)).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        with graft.route(model, ("a", None, "a")):
            total = loss(model, ids(3), use_cache=False)
        total.backward()
        found.append([p.grad for _, p in graft.parameters(model, "a")])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_one_compiled_graph_serves_every_row() -> None:
    model = model_of("llama", copied)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for choice in (ROUTE, (None, "b", "b", "a")):
        with graft.route(model, choice):
            wanted = logits(model, ids(4), use_cache=False)
            torch.testing.assert_close(logits(compiled, ids(4), use_cache=False), wanted, atol=1e-10, rtol=0)
    torch._dynamo.reset()
