"""Every loss and its gradient through the wire, against float64 autograd written apart from the code under test.

The gradient is read from the weights: AdamW without moments and with a large epsilon e moves them by lr g / (|g| + e), so lr = e moves them
by g, up to |g| / e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from tests.serving.conftest import Running
from tests.serving.tinker.conftest import IDS, TARGETS, Wire, plain

READ = {"learning_rate": 1e7, "beta1": 0.0, "beta2": 0.0, "eps": 1e7}
RANK, ALPHA = 4, 32.0
TWO = [np.stack([each, np.roll(each, 1)], 1).tolist() for each in TARGETS]
"""Two targets for each token."""


def _ratio_loss(low: float, high: float) -> Callable[..., Tensor]:
    def loss(logp: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        ratio = torch.exp(logp - own["logprobs"])
        clipped = torch.clamp(ratio, low, high)
        return -torch.minimum(ratio * own["advantages"], clipped * own["advantages"]).sum()

    return loss


def _cispo(logp: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    weight = torch.exp(logp - own["logprobs"]).clamp(0.5, 1.5).detach()
    return -(weight * logp * own["advantages"]).sum()


def _dro(logp: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    return -(logp * own["advantages"] - 0.35 * (logp - own["logprobs"]) ** 2).sum()


def _gspo(logp: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    kept = own["sequence_ratio_mask"] != 0
    whole = torch.exp((logp - own["logprobs"])[kept].mean()).detach()
    ratio = whole * torch.exp(logp - logp.detach())
    return -torch.minimum(ratio * own["advantages"], ratio.clamp(0.9, 1.1) * own["advantages"]).sum()


LOSSES: dict[str, tuple[str, Callable[..., Tensor], dict[str, float], tuple[str, ...]]] = {
    "plain": ("cross_entropy", lambda logp, own: -logp.sum(), {}, ()),
    "weights, some below 0": ("cross_entropy", lambda logp, own: -(own["weights"] * logp).sum(), {}, ("weights",)),
    "two targets": ("cross_entropy", lambda logp, own: -(own["weights"] * logp).sum(), {}, ("weights", "two")),
    "importance": (
        "importance_sampling",
        lambda logp, own: -(torch.exp(logp - own["logprobs"]) * own["advantages"]).sum(),
        {},
        (),
    ),
    "ppo": ("ppo", _ratio_loss(0.8, 1.2), {}, ()),
    "ppo, own clips": ("ppo", _ratio_loss(0.5, 1.05), {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}, ()),
    "cispo": ("cispo", _cispo, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}, ()),
    "dro": ("dro", _dro, {"beta": 0.7}, ()),
    "gspo": ("gspo", _gspo, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, ("sequence_ratio_mask",)),
}
FAST = ("two targets", "gspo")
"""What the default suite runs: a loss over several targets of a token, and one over whole sequences."""


class Reference:
    """The base in float64 with the adapter of a checkpoint folded into its weights."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        self.tensors = {
            key: value.double().requires_grad_()
            for key, value in load_file(folder / "adapter_model.safetensors").items()
        }

    def logprobs(self, ids: list[int], targets: list[Any]) -> Tensor:
        weights: dict[str, Tensor] = dict(self.model.named_parameters())
        for key in {each.rpartition(".linear.")[0] for each in self.tensors}:
            down, up = self.tensors[f"{key}.linear.A"], self.tensors[f"{key}.linear.B"]
            weights[f"{key}.weight"] = weights[f"{key}.weight"].detach() + ALPHA / RANK * up @ down
        logits = functional_call(self.model, weights, (torch.tensor([ids]),)).logits[0]
        wanted = torch.tensor(targets)
        found = torch.log_softmax(logits, -1).gather(1, wanted.reshape(len(ids), -1))
        return found.reshape(wanted.shape)


@pytest.fixture(scope="module")
def moved(server: Running, base: Path) -> Iterator[tuple[Wire, str]]:
    """A client and a checkpoint whose adapter does something."""
    wire = Wire(server.url)
    model = wire.model(str(base), RANK)
    wire.pass_over(model, 1, plain())
    wire.step(model, 2, learning_rate=3e-2)
    yield wire, wire.wait(wire.post("save_weights", model_id=model, seq_id=3, path="start"))["path"]
    wire.http.close()


def folder_of(server: Running, path: str) -> Path:
    from graft.serving.tinker.places import place_of

    return server.app.state.training.service.places.checkpoint(place_of(path))


@pytest.mark.parametrize(
    "name", [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in LOSSES]
)
def test_losses_and_gradients(server: Running, moved: tuple[Wire, str], base: Path, name: str) -> None:
    loss, formula, config, more = LOSSES[name]
    wire, start = moved
    reference = Reference(base, folder_of(server, start))
    draw = np.random.default_rng(1)
    rows, total = [], torch.zeros((), dtype=torch.float64)
    for ids, targets in zip(IDS, TWO if "two" in more else TARGETS, strict=True):
        logp = reference.logprobs(ids, targets)
        shape = tuple(logp.shape)
        fields: dict[str, Any] = {"target_tokens": targets}
        if loss != "cross_entropy":
            fields["logprobs"] = (logp.detach().numpy() + draw.normal(size=shape) * 0.4).astype(np.float32)
            fields["advantages"] = draw.normal(size=shape).astype(np.float32)
        if "weights" in more:
            fields["weights"] = draw.normal(size=shape).astype(np.float32)
        if "sequence_ratio_mask" in more:
            fields["sequence_ratio_mask"] = np.array([0.0] + [1.0] * (len(ids) - 1), np.float32)
        rows.append((ids, fields))
        own = {key: torch.as_tensor(each).double() for key, each in fields.items() if key != "target_tokens"}
        total = total + formula(logp, own)
        fields["expected"] = logp.detach()
    expected = [fields.pop("expected") for _, fields in rows]
    total.backward()

    session, number = wire.session, wire.models
    wire.models += 1
    promise = wire.post("load_weights", session_id=session, model_seq_id=number, path=start, optimizer=False)
    model = wire.wait(promise)["model_id"]
    logprobs, metrics = wire.wait(wire.pass_over(model, 1, rows, loss, False, **config))
    for own, its in zip(expected, logprobs, strict=True):
        assert tuple(own.shape) == its.shape
        np.testing.assert_allclose(its, own.numpy(), atol=5e-5)
    assert metrics["loss:sum"] == pytest.approx(float(total.detach()), abs=2e-3)
    wire.step(model, 2, **READ)
    after = wire.wait(wire.post("save_weights", model_id=model, seq_id=3, path=f"after-{number}"))["path"]
    ends = load_file(folder_of(server, after) / "adapter_model.safetensors")
    assert set(ends) == set(reference.tensors)
    for key, begin in reference.tensors.items():
        assert begin.grad is not None
        scale = float(begin.grad.abs().max())
        moved_by = begin.detach() - ends[key].double()
        np.testing.assert_allclose(moved_by.numpy(), begin.grad.numpy(), atol=2e-4 * max(scale, 1.0))
