"""Token-flat batches: segments laid end to end give what each sequence gives alone, with any adapter on any segment."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.attaching.active import running
from graft.attention import flat_attention
from graft.routing.context import ForwardContext
from tests.families.zoo import TABLE, WITH_INTERFACE, tiny

LENGTHS = (9, 1, 7, 5)
MASK_IS_READ = ("bloom", "falcon", "falcon-mq", "falcon-mha")
BACKENDS = [(name, backend) for name in TABLE for backend in ("eager", "sdpa")
            if (name, backend) not in (("gemma2", "sdpa"), ("gptj", "sdpa"), ("bloom", "sdpa"))]  # fmt: skip


def _sequences(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [torch.arange(length) * (row + 3) % 61 for row, length in enumerate(lengths)]


def _flat(model: Any, family: str, rows: Any, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    ids = torch.cat(_sequences(lengths))[None]
    more: dict[str, Any] = {"attention_mask": None if family in MASK_IS_READ else torch.zeros(1, 1, 1, 1)}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        more["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad(), flat_attention(model), running(model, ForwardContext(rows, lengths, flat=True)):
        return list(model(input_ids=ids, use_cache=False, **more).logits[0].split(lengths))


def _alone(model: Any, name: str | None, sequence: Tensor) -> Tensor:
    with torch.no_grad(), graft.use(model, name):
        return model(input_ids=sequence[None], use_cache=False).logits[0]


def _adapted(family: str, backend: str | None, positions: str = "zero") -> Any:
    model = tiny(family, backend)
    graft.attach(model, {
        "short": graft.Prefix(tokens=2, init_std=1.0, positions=positions),  # pyright: ignore
        "long": graft.Prefix(tokens=4, init_std=1.0, positions=positions),  # pyright: ignore
        "lora": graft.LoRA(rank=2, sites="attn.q attn.v mlp.down"),
        "both": [graft.Parallel(sites="mlp", bottleneck=4), graft.Prefix(tokens=3, init_std=1.0)],
    })  # fmt: skip
    for name in ("lora", "both"):
        for _, parameter in graft.parameters(model, name):
            parameter.data.normal_(std=0.5)
    return model


@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_segments_of_the_bare_base_do_not_mix(family: str, backend: str) -> None:
    model = _adapted(family, backend)
    for got, sequence in zip(_flat(model, family, None), _sequences(), strict=True):
        assert (got - _alone(model, None, sequence)).abs().max() < 1e-5


@pytest.mark.parametrize("positions", ["zero", "after_prefix"])
@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_each_segment_has_its_own_adapter(family: str, backend: str, positions: str) -> None:
    model = _adapted(family, backend, positions)
    for rows in (
        ("short",) * 4,
        ("long", None, "short", "long"),
        ("both", "lora", None, "short"),
        ("lora", "lora", "both", None),
    ):
        for got, name, sequence in zip(_flat(model, family, rows), rows, _sequences(), strict=True):
            assert (got - _alone(model, name, sequence)).abs().max() < 1e-5


@pytest.mark.parametrize("family", WITH_INTERFACE)
def test_a_family_that_is_not_in_the_table_runs_flat_too(family: str) -> None:
    model = tiny(family)
    graft.attach(model, {"prefix": graft.Prefix(tokens=2, init_std=1.0), "lora": graft.LoRA(rank=2, sites="attn.o")})
    for rows in (None, ("prefix", "lora", None, "prefix")):
        for row, (got, sequence) in enumerate(zip(_flat(model, family, rows), _sequences(), strict=True)):
            assert (got - _alone(model, rows and rows[row], sequence)).abs().max() < 1e-5


@pytest.mark.parametrize("family", TABLE)
def test_one_segment_is_a_plain_forward_pass(family: str) -> None:
    model = _adapted(family, None)
    for rows in (None, "short", "lora"):
        (got,) = _flat(model, family, rows, lengths=(9,))
        assert (got - _alone(model, rows, _sequences((9,))[0])).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["bloom", "falcon-mha"])
def test_long_segments_round_alibi_as_the_model_rounds_it(family: str) -> None:
    """Falcon multiplies positions by its slopes in bfloat16, which shows beyond position 256."""
    model = _adapted(family, None)
    lengths = (331, 20, 290)
    for got, sequence in zip(_flat(model, family, None, lengths), _sequences(lengths), strict=True):
        assert (got - _alone(model, None, sequence)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "gptj", "falcon"])
def test_gradients_of_a_flat_batch_are_those_of_its_sequences(family: str) -> None:
    model = _adapted(family, None)
    graft.set_active(model, "both")
    parameters = [parameter for _, parameter in graft.parameters(model, "both")]
    weights = [torch.randn(length, 64) for length in LENGTHS]
    loss = torch.zeros(())
    for sequence, weight in zip(_sequences(), weights, strict=True):
        loss = loss + (model(input_ids=sequence[None], use_cache=False).logits[0] * weight).sum()
    expected = torch.autograd.grad(loss, parameters)
    ids = torch.cat(_sequences())[None]
    more: dict[str, Any] = {"attention_mask": None if family in MASK_IS_READ else torch.zeros(1, 1, 1, 1)}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        more["position_ids"] = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with flat_attention(model), running(model, ForwardContext("both", LENGTHS, flat=True)):
        logits = model(input_ids=ids, use_cache=False, **more).logits[0]
        got = torch.autograd.grad((logits * torch.cat(weights)).sum(), parameters)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() < 1e-4 * (1 + other.abs().max())


def test_a_family_whose_attention_cannot_keep_segments_apart_is_refused() -> None:
    model = tiny("mpt")
    graft.attach(model, {"a": graft.LoRA(rank=2)})
    with pytest.raises(graft.GraftError, match="does not use transformers' attention interface"), flat_attention(model):
        pass


@pytest.mark.parametrize("family", TABLE)
def test_leaving_a_flat_block_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny(family)
    graft.attach(model, {"a": graft.LoRA(rank=2, sites="mlp.down")})
    classes = [type(module) for module in model.modules()]
    configs = [getattr(module, "config", None) for module in model.modules()]
    with flat_attention(model):
        pass
    assert [type(module) for module in model.modules()] == classes
    assert all(
        one is other
        for one, other in zip((getattr(module, "config", None) for module in model.modules()), configs, strict=True)
    )
