"""Segments in one kernel: with a plain function of the same contract in its place, flat batches give what sequences give alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graft.attention import varlen
from tests.attention.test_flat import LENGTHS, _adapted, _alone, _flat, _sequences


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What torch documents of `varlen_attn`: query [T, H, D], key and value [T, K, D], a window of (left, right) keys, -1 for all."""
    assert enable_gqa == (query.shape[1] != key.shape[1]) and cu_seq_q.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()),) * 2 and torch.equal(cu_seq_q, cu_seq_k)
    groups, out = query.shape[1] // key.shape[1], []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (
            query[start:end],
            key[start:end].repeat_interleave(groups, 1),
            value[start:end].repeat_interleave(groups, 1),
        )
        scores = torch.einsum("lhd,shd->hls", q, k) * (query.shape[-1] ** -0.5 if scale is None else scale)
        at = torch.arange(end - start)
        distance = at[:, None] - at[None]
        left, right = window_size
        hidden = (distance > left) & (left >= 0) | (-distance > right) & (right >= 0)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hls,shd->lhd", weights, v))
    return torch.cat(out)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        found.append(kwargs["window_size"])
        return plain_varlen(*args, **kwargs)

    monkeypatch.setattr(varlen, "kernel", lambda: noted)
    monkeypatch.setattr(varlen, "runs_on", lambda query: True)
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
@pytest.mark.parametrize("name", [None, "lora"])
def test_segments_in_one_kernel_are_what_each_gives_alone(calls: list[Any], family: str, name: str | None) -> None:
    model = _adapted(family, "sdpa")
    for got, sequence in zip(_flat(model, family, (name,) * len(LENGTHS)), _sequences(), strict=True):
        assert (got - _alone(model, name, sequence)).abs().max() < 1e-5
    assert len(calls) == model.config.num_hidden_layers


def test_a_sliding_window_reaches_the_kernel(calls: list[Any]) -> None:
    model = _adapted("mistral", "sdpa")
    window = model.config.sliding_window
    _flat(model, "mistral", None)
    assert set(calls) == {(window - 1, 0) if window else (-1, 0)}


def test_virtual_tokens_keep_the_calls_by_segment(calls: list[Any]) -> None:
    model = _adapted("llama", "sdpa")
    for got, name, sequence in zip(_flat(model, "llama", ("short", None, "lora", "both")), ("short", None, "lora", "both"),
                                   _sequences(), strict=True):  # fmt: skip
        assert (got - _alone(model, name, sequence)).abs().max() < 1e-5
    assert not calls


@pytest.mark.parametrize("more", [{"softcap": 30.0}, {"dropout": 0.1}, {"is_causal": False}, {"s_aux": torch.ones(2)}])
def test_what_the_kernel_does_not_know_is_left_to_the_backend(calls: list[Any], more: dict[str, Any]) -> None:
    query = torch.zeros(1, 2, 3, 8)
    assert varlen.serves(query, {"scaling": 0.5, "sliding_window": 4, "dropout": 0.0, "softcap": None})
    assert not varlen.serves(query, more)


def test_on_a_cpu_each_segment_is_a_call_of_its_own() -> None:
    assert not varlen.runs_on(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_and_its_gradients_are_those_of_the_plain_function(window: int | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 22, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    key, value = (torch.randn(1, 2, 22, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(2))
    if not varlen.serves(query, {"sliding_window": window}):
        pytest.skip("this GPU or torch has no varlen attention")
    found = varlen.by_varlen(query, key, value, LENGTHS, 0.2, window)
    leaves = [tensor.detach().cpu().float().requires_grad_() for tensor in (query, key, value)]
    ends = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    wanted = plain_varlen(
        *(leaf[0].transpose(0, 1) for leaf in leaves), ends, ends, max(LENGTHS), max(LENGTHS), scale=0.2,
        window_size=(window - 1 if window else -1, 0), enable_gqa=True,
    )[None]  # fmt: skip
    torch.testing.assert_close(found.float().cpu(), wanted, atol=3e-2, rtol=3e-2)
    weight = torch.randn_like(wanted)
    own = torch.autograd.grad(found, (query, key, value), weight.to(found))
    for gradient, other in zip(own, torch.autograd.grad(wanted, leaves, weight), strict=True):
        torch.testing.assert_close(gradient.float().cpu(), other, atol=5e-2, rtol=5e-2)
