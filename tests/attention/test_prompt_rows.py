"""Prompts that run as rows of the batch give what they give when they run before it: outputs, gradients, and what later passes keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.attaching.active import running, set_trainable
from graft.attention import flat_attention, prompts
from graft.attention.segments import led
from graft.injection.state import state_of
from graft.routing.context import ForwardContext
from graft.training.forward.modes import set_training
from tests.families.zoo import tiny

LENGTHS = (5, 3, 7, 4)
ROWS = ("a", None, "b", "a")
FAMILIES = [
    "llama",
    "bloom",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "falcon-mha", "gptj", "gemma2", "mistral")),
]
ADAPTERS: dict[str, Any] = {
    "a": [{"kind": "prompt", "tokens": 4}, {"kind": "lora", "rank": 2, "dropout": 0.4, "sites": "linear"}],
    "b": [{"kind": "p-tuning", "tokens": 2}, {"kind": "prefix", "tokens": 3}],
}


def exact(family: str) -> Any:
    model = tiny(family, "eager").double()
    torch.manual_seed(0)
    graft.attach(model, ADAPTERS)
    set_trainable(model, ["a", "b"])
    return model


def results(model: Any, family: str, layout: str, recomputed: bool) -> list[Tensor]:
    """The outputs of all tokens, and the gradients of all parameters of both adapters."""
    parts = [torch.arange(length) * (row + 3) % 61 for row, length in enumerate(LENGTHS)]
    more: dict[str, Any] = {"use_cache": False}
    takes_positions = family != "bloom"
    seeds = tuple(range(11, 11 + len(ROWS)))
    model.zero_grad()
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    set_training(model, ["a", "b"])
    if layout == "flat":
        more["attention_mask"] = None if family in ("bloom", "falcon-mha") else torch.zeros(1, 1, 1, 1).double()
        if takes_positions:
            more["position_ids"] = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        context = ForwardContext(ROWS, LENGTHS, flat=True, seeds=seeds)
        with flat_attention(model), running(model, context):
            out = model(input_ids=torch.cat(parts)[None], **more).logits[0]
    else:
        longest = max(LENGTHS) if layout == "padded" else 3  # shorter than the prompt
        cut = [part[:longest] for part in parts]
        ids = torch.stack([torch.nn.functional.pad(part, (0, longest - len(part))) for part in cut])
        mask = torch.stack([torch.arange(longest) < len(part) for part in cut]).long()
        if takes_positions:
            more["position_ids"] = torch.arange(longest).expand(len(ids), -1)
        context = ForwardContext(ROWS, tuple(map(len, cut)), seeds=seeds)
        with running(model, context):
            out = model(input_ids=ids, attention_mask=mask, **more).logits[mask.bool()]
    out.square().sum().backward()
    found = [parameter.grad for name in "ab" for _, parameter in graft.parameters(model, name)]
    assert all(each is not None for each in found)
    return [out.detach(), *(each.clone() for each in found if each is not None)]


@pytest.mark.parametrize("layout", ["flat", "padded", "short"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_batch_equal_a_pass_before_it(family: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "float32", torch.float64)  # what families round to, in norms and softmax
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    model, passes = exact(family), []
    monkeypatch.setattr(prompts, "led", lambda *given: passes.append(led(*given)) or passes[-1])
    recomputed = layout == "flat" and family in ("llama", "gpt2")
    got = results(model, family, layout, recomputed)
    assert len(passes) == 1 and passes[0] is not None
    monkeypatch.setattr(prompts, "led", lambda *given: None)
    wanted = results(model, family, layout, recomputed)
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-12 * max(1.0, float(other.abs().max()))


def test_a_pass_without_gradients_keeps_the_prompt_for_later_ones() -> None:
    model = exact("llama").eval()
    ids = torch.arange(1, 8)[None]
    with torch.no_grad(), graft.use(model, "a"):
        whole = model(input_ids=ids, use_cache=False).logits
        kept = state_of(model).prompt_caches["a"][2]
        step = model(input_ids=ids[:, :6], use_cache=True)
        last = model(input_ids=ids[:, 6:], past_key_values=step.past_key_values).logits
        assert state_of(model).prompt_caches["a"][2] is kept
    torch.testing.assert_close(last[:, 0], whole[:, 6], atol=1e-12, rtol=1e-10)
