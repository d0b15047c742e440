"""Outputs and gradients of a reversible base equal ordinary autograd through the equations (`reference.py`), and do not depend on memory.

Legend: B rows, L length, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.architectures.two_streams import two_streams_of
from tests.contract.variants import VARIANTS as KINDS
from tests.reversible.bases import FAMILIES, VARIANTS, tiny, tokens
from tests.reversible.reference import Partner, Reference, blocks_of

LORA = {"kind": "lora", "rank": 4, "alpha": 4, "sites": "linear"}
STREAM = {"kind": "parallel", "sites": "stream", "bottleneck": 8, "activation": "gelu", "init": "bert"}
OUTSIDE = ("prompt", "p-tuning")
"""Kinds that do not act inside the blocks."""


def randomise(model: Any, name: str = "a", scale: float = 0.05) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = dict(graft.parameters(model, name))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale)
    return parameters


def alike(base: Any, plain: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters of the adapters of two models, with the same random values. The first may have more of them."""
    own: dict[str, Tensor] = randomise(base)
    other: dict[str, Tensor] = dict(graft.parameters(plain, "a"))
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(own[name])
    return own, other


def pair(
    family: str, variant: Any, layers: int, every: int | None, dtype: torch.dtype
) -> tuple[Any, Any, dict[str, tuple[Tensor, Tensor]]]:
    """A reversible base with LoRA and, where it has one, an adapter at each stream; the reference; their parameters in pairs."""
    base = tiny(family, layers, dtype)
    plain = copy.deepcopy(base)
    graft.make_reversible(base, variant, anchor_every=every)
    graft.attach(base, {"a": [LORA] if variant == "meft3" else [LORA, STREAM]})
    graft.attach(plain, {"a": LORA})
    own, other = alike(base, plain)
    if variant == "meft3":
        Reference(plain, variant)
    else:
        hosts = [block.stream._modules["graft"]._modules["a"]._modules["stream"] for block in blocks_of(base)]
        partners = [Partner(host) for host in hosts]
        Reference(plain, variant, partners)
        for number, partner in enumerate(partners):
            other |= {
                name: partner.get_parameter(name.split(".f.")[1]) for name in own if f".{number}.stream.stream" in name
            }
    return base, plain, {name: (own[name], other[name]) for name in own}


def gradients(model: Any, parameters: list[Tensor], ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits [B, L, V] and the gradient of a random weighting of them."""
    out = model(input_ids=ids, use_cache=False).logits
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), parameters))


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def default(family: str, variant: Any, layers: int) -> bool:
    """Whether a case is in the default suite: the three couplings through twelve blocks on one family, meft3 (halves) on the others."""
    return (layers == 12) == (family == "llama") and (family == "llama" or variant == "meft3")


@pytest.mark.parametrize(
    ("family", "variant", "layers"),
    [
        pytest.param(*case, marks=() if default(*case) else pytest.mark.slow)
        for case in itertools.product(FAMILIES, VARIANTS, (4, 12))
    ],
)
def test_gradients_with_anchors_are_those_of_ordinary_autograd(family: str, variant: Any, layers: int) -> None:
    base, plain, pairs = pair(family, variant, layers=layers, every=3, dtype=torch.float32)
    out, own = gradients(base, [first for first, _ in pairs.values()], tokens())
    expected_out, expected = gradients(plain, [second for _, second in pairs.values()], tokens())
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    assert min(map(cosine, own, expected)) > 0.99999
    assert all(float((a - b).norm()) < 2e-3 * float(b.norm()) for a, b in zip(own, expected, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_plain_inverse_is_exact_in_float64(family: str, variant: Any) -> None:
    base, plain, pairs = pair(family, variant, layers=4, every=None, dtype=torch.float64)
    _, own = gradients(base, [first for first, _ in pairs.values()], tokens())
    _, expected = gradients(plain, [second for _, second in pairs.values()], tokens())
    assert all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-7 * float(b.abs().max())) for a, b in zip(own, expected, strict=True)
    )


@pytest.mark.parametrize("variant", ["meft1", pytest.param("meft2", marks=pytest.mark.slow)])
def test_streams_of_float64_need_no_anchors_through_twelve_blocks_of_float32(variant: Any) -> None:
    """With streams of float32, the cosine at the lowest blocks is 0.1 to 0.7."""
    base, plain, pairs = pair("bert", variant, layers=12, every=None, dtype=torch.float32)
    _, own = gradients(base, [first for first, _ in pairs.values()], tokens())
    _, expected = gradients(plain, [second for _, second in pairs.values()], tokens())
    assert min(map(cosine, own, expected)) > 0.9999


@pytest.mark.parametrize("variant", VARIANTS)
def test_anchors_change_no_gradient_and_half_precision_loses_nothing(variant: Any) -> None:
    base, _, pairs = pair("llama", variant, layers=7, every=3, dtype=torch.float32)
    base = base.to(torch.bfloat16)
    streams = two_streams_of(base)
    assert streams is not None
    found = []
    for streams.anchor_every in (1, 3):  # noqa: B007
        found.append(gradients(base, [first for first, _ in pairs.values()], tokens())[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


CASES = [name for name, config in KINDS.items() if not name.startswith(OUTSIDE) and not callable(config)]
"""All but adapters by reference, which were trained on another base."""
PLAINEST = {
    next(name for name in CASES if name.split("-")[0] == kind) for kind in {name.split("-")[0] for name in CASES}
}


@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=() if name in PLAINEST else pytest.mark.slow) for name in CASES]
)
def test_every_kind_that_acts_inside_the_blocks_trains(kind: str) -> None:
    variant = VARIANTS[CASES.index(kind) % 3]
    if "layer" in str(getattr(KINDS[kind], "sites", "")) and variant == "meft3":
        variant = "meft1"
    base = tiny("gpt2" if kind == "bitfit" else "llama", 3)  # a LLaMA has no biases
    plain = copy.deepcopy(base)
    graft.make_reversible(base, variant, anchor_every=2)
    for model in (base, plain):
        torch.manual_seed(0)  # for what a kind draws that is no parameter
        graft.attach(model, {"a": KINDS[kind]})
    own, other = alike(base, plain)
    Reference(plain, variant)
    assert list(own) == list(other)
    out, found = gradients(base, list(own.values()), tokens())
    expected_out, expected = gradients(plain, list(other.values()), tokens())
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    for name, a, b in zip(own, found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-9), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_draws_the_same_numbers_again(variant: Any) -> None:
    """Dropout of the base and of adapters without seeds comes from torch's generator, in the order of the reference."""
    off: dict[str, Any] = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    base = tiny("bert", 5, **off)
    plain = copy.deepcopy(base)
    graft.make_reversible(base, variant, anchor_every=2)
    for model in (base, plain):
        graft.attach(model, {"a": {**LORA, "dropout": 0.4}})
    own, other = alike(base, plain)
    Reference(plain, variant)
    found = []
    for model, parameters in ((base, own), (plain, other)):
        model.train()
        torch.manual_seed(0)
        found.append((*gradients(model, list(parameters.values()), tokens()), torch.rand(1)))
    (out, a, after), (expected_out, b, expected_after) = found
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    assert torch.equal(after, expected_after)  # the backward pass leaves the generator where it was
    assert min(map(cosine, a, b)) > 0.99999


def test_the_embedding_gets_its_gradient() -> None:
    base = tiny("llama", 4)
    plain = copy.deepcopy(base)
    graft.make_reversible(base, "meft1")
    for model in (base, plain):
        graft.attach(model, {"a": {**LORA, "sites": "embed"}})
    own, other = alike(base, plain)
    Reference(plain, "meft1")
    _, found = gradients(base, list(own.values()), tokens())
    _, expected = gradients(plain, list(other.values()), tokens())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-3)
