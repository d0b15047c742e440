"""A prefix is the same as the same keys and values in the model's own cache, or, where the cache says something else, as attention
computed from the formula by a function written here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

import graft
from graft.injection.state import sites_of
from tests.families.zoo import TABLE, WITH_INTERFACE, batch, tiny

WINDOWED = ("mistral", "gemma2", "gemma3_text")
ALIBI = ("bloom", "falcon-mha")
ONE_BACKEND = {"gemma2": "eager", "gptj": "eager", "bloom": "eager"}
BACKENDS = [
    (name, backend) for name in TABLE for backend in ("eager", "sdpa") if ONE_BACKEND.get(name, backend) == backend
]
TOKENS = 3


def _with_prefix(name: str, backend: str, positions: str, tokens: int = TOKENS) -> Any:
    model = tiny(name, backend)
    torch.manual_seed(3)
    return graft.attach(model, {"p": graft.Prefix(tokens=tokens, init_std=1.0, positions=positions)})  # pyright: ignore


def _keys_values(model: Any) -> list[tuple[Tensor, Tensor]]:
    """[P, K, D] of every layer."""
    stored = {name: parameter.detach() for name, parameter in graft.parameters(model, "p")}
    sites = sites_of(model, graft.Prefix())
    return [(stored[f"{site.module}.prefix.keys"], stored[f"{site.module}.prefix.values"]) for site in sites]


def _by_cache(model: Any, family: str, inputs: dict[str, Tensor], offset: int) -> Tensor:
    """Logits of the bare model with the prefix in its cache and the sequence at positions from `offset` on."""
    rows, length = inputs["input_ids"].shape
    copies = 2 if family == "falcon" else 1  # the new decoder caches each key-value head once per query head
    pairs = [
        tuple(part.repeat_interleave(copies, 1).transpose(0, 1)[None].expand(rows, -1, -1, -1) for part in pair)
        for pair in _keys_values(model)
    ]
    mask = torch.cat([torch.ones(rows, TOKENS, dtype=torch.long), inputs["attention_mask"]], 1)
    more = {}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        counted = inputs["attention_mask"].cumsum(1) - 1 if family == "opt" else torch.arange(length).expand(rows, -1)
        more["position_ids"] = counted.clamp(min=0) + offset
    with torch.no_grad(), graft.use(model, None):
        return model(
            input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=DynamicCache(pairs), **more
        ).logits


def _check(model: Any, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        got = model(**inputs).logits
        with graft.use(model, None):
            base = model(**inputs).logits
    assert (got - expected)[real].abs().max() < 1e-5
    assert (got - base)[real].abs().max() > 1e-2


BY_CACHE = [
    (family, backend, positions)
    for family, backend in BACKENDS
    for positions in ("zero", "after_prefix")
    if family not in WINDOWED and not (family in ALIBI and positions == "zero")
] + [(family, "sdpa", "after_prefix") for family in WITH_INTERFACE]
"""A cache hides its keys behind a sliding window and gives them an ALiBi bias; both are tested below."""


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("family", "backend", "positions"), BY_CACHE)
def test_a_prefix_equals_the_same_keys_and_values_in_the_cache(
    family: str, backend: str, positions: str, padded: bool
) -> None:
    model, inputs = _with_prefix(family, backend, positions), batch(padded=padded)
    expected = _by_cache(model, family, inputs, TOKENS if positions == "after_prefix" else 0)
    _check(model, expected, inputs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("family", "backend"), [case for case in BACKENDS if case[0] in ALIBI])
def test_at_positions_zero_virtual_tokens_have_no_alibi_bias(
    family: str, backend: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = _with_prefix(family, backend, "zero"), batch(padded=padded)
    module = importlib.import_module(type(model).__module__)
    own = module.build_alibi_tensor

    def without_bias(mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        bias = own(mask[:, TOKENS:], num_heads, dtype)
        return torch.cat([torch.zeros_like(bias[..., :1]).expand(-1, -1, TOKENS), bias], -1)

    with monkeypatch.context() as patched:
        patched.setattr(module, "build_alibi_tensor", without_bias)
        expected = _by_cache(model, family, inputs, 0)
    _check(model, expected, inputs)


REFERENCE: dict[str, Any] = {}


def _reference(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1.0, **kwargs: Any
) -> tuple[Tensor, None]:
    """softmax over the prefix and the window of real tokens, from the formula; the model's own mask is not read."""
    keys, values = REFERENCE["pairs"][module.layer_idx]
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key = torch.cat([keys.transpose(0, 1)[None].expand(len(key), -1, -1, -1), key], 2).repeat_interleave(groups, 1)
    value = torch.cat([values.transpose(0, 1)[None].expand(len(value), -1, -1, -1), value], 2).repeat_interleave(
        groups, 1
    )
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    window = kwargs.get("sliding_window") or length
    seen = (j <= i) & (j > i - window) & REFERENCE["mask"][:, None, None].bool()
    seen = torch.cat([torch.ones(*seen.shape[:-1], len(keys), dtype=torch.bool), seen], -1)
    scores = query @ key.transpose(-1, -2) * scaling
    if cap := kwargs.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    return (scores.masked_fill(~seen, -1e9).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("from_the_formula", _reference)


@contextmanager
def _from_the_formula(model: Any, mask: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    REFERENCE.update(pairs=pairs, mask=mask)
    backend = model.config._attn_implementation
    model.config._attn_implementation = "from_the_formula"
    yield
    model.config._attn_implementation = backend


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("positions", ["zero", "after_prefix"])
@pytest.mark.parametrize(("family", "backend"), [case for case in BACKENDS if case[0] in (*WINDOWED, "llama")])
def test_a_sliding_window_hides_no_virtual_token_and_a_soft_cap_holds_for_them(
    family: str, backend: str, positions: str, padded: bool
) -> None:
    model, inputs = _with_prefix(family, backend, positions), batch(padded=padded)
    bare = tiny(family, backend)
    offset = TOKENS if positions == "after_prefix" else 0
    with torch.no_grad(), _from_the_formula(bare, inputs["attention_mask"], _keys_values(model)):
        expected = bare(**inputs, position_ids=torch.arange(9).expand(3, -1) + offset).logits
    _check(model, expected, inputs)


@pytest.mark.parametrize("family", [name for name in TABLE if name not in ONE_BACKEND and name != "falcon-mha"])
def test_eager_and_sdpa_agree_under_a_prefix(family: str) -> None:
    inputs = batch()
    eager, sdpa = (_with_prefix(family, backend, "zero") for backend in ("eager", "sdpa"))
    with torch.no_grad():
        difference = (eager(**inputs).logits - sdpa(**inputs).logits)[inputs["attention_mask"].bool()]
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("positions", ["zero", "after_prefix"])
@pytest.mark.parametrize("family", TABLE)
def test_rows_with_two_prefixes_and_with_none_equal_each_alone(family: str, positions: str) -> None:
    model, inputs = _with_prefix(family, ONE_BACKEND.get(family, "sdpa"), positions), batch()
    graft.attach(model, {"longer": graft.Prefix(tokens=TOKENS + 2, init_std=1.0, positions=positions)})  # pyright: ignore
    graft.attach(model, {"lora": graft.LoRA(rank=2, sites="attn.o")})
    for _, parameter in graft.parameters(model, "lora"):
        parameter.data.normal_()
    rows = ["longer", None, "p"]
    with torch.no_grad(), graft.route(model, rows):
        mixed = model(**inputs).logits
    for row, name in enumerate(rows):
        with torch.no_grad(), graft.use(model, name):
            alone = model(**inputs).logits
        real = inputs["attention_mask"][row].bool()
        assert (mixed[row] - alone[row])[real].abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_two_prefixes_in_a_stack_are_one_long_prefix(family: str) -> None:
    parts = [graft.Prefix(tokens=1, init_std=1.0, positions="after_prefix")] * 2
    stack, whole = (
        graft.attach(tiny(family), {"p": parts}),
        _with_prefix(family, ONE_BACKEND.get(family, "sdpa"), "after_prefix", tokens=2),
    )
    given = dict(graft.parameters(stack, "p"))
    for name, parameter in graft.parameters(whole, "p"):
        second = name.replace(".prefix.", ".prefix_1.")
        parameter.data.copy_(torch.cat([given[name], given[second]]))
    inputs = batch()
    with torch.no_grad():
        difference = (stack(**inputs).logits - whole(**inputs).logits)[inputs["attention_mask"].bool()]
    assert difference.abs().max() < 1e-5
