"""Attention of ours with a cache and left padding: token by token equals all at once, and rows without an adapter equal the bare base."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import graft
from tests.families.zoo import TABLE, batch, tiny

OWN_FORWARDS = ("gptj", "bloom", "falcon", "falcon-mq", "falcon-mha")
CACHES = ("dynamic", "static")
IMPOSSIBLE = (("bloom", "static"), ("falcon-mha", "static"))
"""ALiBi in transformers is made for the keys that are real: the bare base fails on a static cache."""
PROMPT = 6


def _positions(model: Any, mask: Tensor) -> dict[str, Tensor]:
    known = "position_ids" in inspect.signature(type(model).forward).parameters
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if known else {}


def _stepwise(model: Any, inputs: dict[str, Tensor], cache: str | None) -> Tensor:
    """Logits of a prompt and of the tokens after it, fed one at a time into a cache."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = _positions(model, mask)
    if cache is None:
        return model(input_ids=ids, attention_mask=mask, **positions).logits
    config = model.config
    past = (
        DynamicCache(config=config)
        if cache == "dynamic"
        else StaticCache(config=config, max_cache_len=ids.shape[1] + 4)
    )
    found, start = [], 0
    for stop in range(PROMPT, ids.shape[1] + 1):
        cut = {name: value[:, start:stop] for name, value in positions.items()}
        step = model(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True, **cut
        )
        found.append(step.logits)
        start = stop
    return torch.cat(found, 1)


def _difference(one: Tensor, other: Tensor, inputs: dict[str, Tensor], rows: Sequence[int] = (0, 1, 2)) -> float:
    real = inputs["attention_mask"].bool()
    return max((one[row] - other[row])[real[row]].abs().max().item() for row in rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("family", "cache"),
    [(name, cache) for name in OWN_FORWARDS for cache in (None, *CACHES) if (name, cache) not in IMPOSSIBLE],
)
def test_our_forward_equals_the_original_on_rows_without_an_adapter(
    family: str, cache: str | None, padded: bool
) -> None:
    model, inputs = tiny(family), batch(padded=padded)
    with torch.no_grad():
        expected = _stepwise(model, inputs, cache)
        graft.attach(model, {"p": graft.Prefix(tokens=3, init_std=1.0)})
        with graft.route(model, [None, "p", None]):  # one row with a prefix sends all rows through our forward
            got = _stepwise(model, inputs, cache)
    assert _difference(got, expected, inputs, rows=(0, 2)) < 1e-5
    assert _difference(got, expected, inputs, rows=(1,)) > 1e-2


@pytest.mark.parametrize("positions", ["zero", "after_prefix"])
@pytest.mark.parametrize(
    ("family", "cache"), [(name, cache) for name in TABLE for cache in CACHES if (name, cache) not in IMPOSSIBLE]
)
def test_a_prefix_with_a_cache_equals_a_prefix_without(family: str, cache: str, positions: str) -> None:
    model, inputs = tiny(family), batch()
    graft.attach(model, {"p": graft.Prefix(tokens=3, init_std=1.0, positions=positions)})  # pyright: ignore
    with torch.no_grad():
        expected = _stepwise(model, inputs, None)
        assert _difference(_stepwise(model, inputs, cache), expected, inputs) < 1e-5


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gptj", "bloom", "falcon"])
def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(
    family: str, implementation: str | None
) -> None:
    model, inputs = tiny(family), batch()
    graft.attach(model, {"p": graft.Prefix(tokens=3, init_std=1.0, positions="after_prefix"), "l": graft.LoRA(rank=2)})
    for _, parameter in graft.parameters(model, "l"):
        parameter.data.normal_(std=0.3)
    rows = ["p", None, "l"]
    more = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    with graft.route(model, rows):
        together = model.generate(**inputs, **more, cache_implementation=implementation)[:, -4:]
    for row, name in enumerate(rows):
        real = inputs["attention_mask"][row].bool()
        with graft.use(model, name):
            alone = model.generate(input_ids=inputs["input_ids"][row, real][None], use_cache=False, **more)[0, -4:]
        assert together[row].tolist() == alone.tolist()


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_beam_search_repeats_the_routing_of_each_row(family: str) -> None:
    model, inputs = tiny(family), batch(padded=False)
    graft.attach(model, {"p": graft.Prefix(tokens=3, init_std=1.0)})
    rows = ["p", None, "p"]
    more = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": -1}
    with graft.route(model, rows):
        together = model.generate(**inputs, **more)
    for row, name in enumerate(rows):
        with graft.use(model, name):
            alone = model.generate(**{key: value[row : row + 1] for key, value in inputs.items()}, **more)
        assert together[row].tolist() == alone[0].tolist()
