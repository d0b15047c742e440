"""Padding changes nothing: 64 prompts of mixed length, one at a time and thirty-two at a time, answer the same tokens.

Every kind of the registry is asked, as its defaults are; a kind made of others gets two of them. What does not apply to a kind is read
off what it declares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import graft
from graft.adapters.base import AdapterConfig
from graft.adapters.parsing import parse
from graft.generation.generate import generate
from graft.generation.reading import PROMPTS as JOIN
from graft.generation.requests import Decoding, Generated, Request
from tests.small import small_model

KINDS = graft.kinds()
FAMILIES = ("llama", "bloom", "gptj")
PARTS = ({"kind": "lora", "sites": "attn.q attn.v"}, {"kind": "series", "bottleneck": 8})
VARIANTS: dict[str, dict[str, Any]] = {
    "lora everywhere": {"kind": "lora", "rank": 4, "sites": "linear"},
    "series behind attention too": {"kind": "series", "bottleneck": 8, "sites": "attn mlp"},
    "prefix that takes positions": {"kind": "prefix", "tokens": 5, "positions": "after_prefix"},
}
"""Settings that change where an adapter acts in a padded batch, besides the defaults of its kind."""
PROMPTS, AT_ONCE, NEW, LONGEST = 64, 32, 4, 60


def example(kind: type[AdapterConfig]) -> dict[str, Any]:
    """The least that a user can write of a kind."""
    needed = {name for name, field in kind.model_fields.items() if field.is_required()}
    if "of" in needed:  # a kind made of others
        return kind.example()
    given: dict[str, Any] = {"adapters": list(PARTS), "adapter": PARTS[0]}
    assert needed <= given.keys(), f"say here what {kind.__name__} is to be tried with: {needed - given.keys()}"
    return {"kind": kind.model_fields["kind"].default, **{name: given[name] for name in needed}}


def attached(family: str, spec: dict[str, Any]) -> Any:
    """A base with an adapter that shows."""
    model = small_model(family)
    sites = parse(spec).sites
    lacking = set(sites.split() if isinstance(sites, str) else sites) - set(graft.sites(model))
    if lacking:
        pytest.skip(f"{family} has no {', '.join(lacking)}, where this kind acts")
    graft.attach(model, {"own": spec})
    draw = torch.Generator().manual_seed(3)
    # What starts as the identity is added to something; what does not stands for itself and has to be heard beside the base.
    scale = 0.3 if parse(spec).starts_as_identity else 2.0
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "own"):
            parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
    return model


class Rows:
    """How many rows the forward passes of a model had, as its head sees them."""

    def __init__(self, model: Any) -> None:
        self.counts: list[int] = []
        model.get_output_embeddings().register_forward_pre_hook(lambda _, args: self.counts.append(args[0].shape[0]))

    def most(self) -> int:
        found, self.counts = max(self.counts), []
        return found


def cases() -> Iterator[Any]:
    """Every kind on every family. What acts in linear layers and sublayers sees no positions: on families of other attention it is slow."""
    specs = {**{name: example(kind) for name, kind in KINDS.items()}, **VARIANTS}
    for name, spec in specs.items():
        for family in FAMILIES:
            alike = parse(spec).takes <= {"linear", "sublayer", "norm", "other", "experts"} and family != FAMILIES[0]
            yield pytest.param(family, spec, id=f"{name}-{family}", marks=[pytest.mark.slow] if alike else [])


@pytest.mark.parametrize(("family", "spec"), cases())
def test_sixty_four_prompts_alone_and_in_batches_of_thirty_two(family: str, spec: dict[str, Any]) -> None:
    model = attached(family, spec)
    rows = Rows(model)
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, LONGEST + 1, (PROMPTS,), generator=draw).tolist()
    prompts = [tuple(torch.randint(2, 258, (length,), generator=draw).tolist()) for length in lengths]

    def answers(adapter: str | None, budget: int) -> dict[int, Generated]:
        requests = [Request(prompt, adapter, frozenset({1})) for prompt in prompts]
        return dict(generate(model, requests, Decoding(NEW), token_budget=budget))

    alone = answers("own", 1)
    assert rows.most() == 1
    batched = answers("own", AT_ONCE * (max(lengths) + NEW))
    assert AT_ONCE - JOIN < rows.most() <= AT_ONCE  # a row may have ended before the last ones join
    assert next(model.parameters()).dtype == torch.float32
    assert batched == alone
    bare = answers(None, 10**6)
    assert any(bare[number] != alone[number] for number in bare), "the adapter changes what is answered"
