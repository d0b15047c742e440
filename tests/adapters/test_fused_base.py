"""A frozen linear layer and its LoRAs as one node equal plain operations; layers that read one x add its gradient up in one tensor."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graft
from graft.attaching.active import running, set_trainable
from graft.ops import low_rank_linear as fused_base
from graft.ops.low_rank import LowRankUpdate
from graft.ops.low_rank_linear import linear_low_rank, shared_input
from graft.routing.context import AdapterContext, ForwardContext
from tests.small import small_model

I, O = 6, 5  # noqa: E741


def layer(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(I, O, bias=bias, dtype=dtype).requires_grad_(False)


def terms(p: float) -> list[LowRankUpdate]:
    """Two adapters on rows of their own; the row between them has none."""
    torch.manual_seed(2)
    made = []
    for number, (rank, rows) in enumerate([(2, slice(0, 1)), (3, slice(2, 4))]):
        A = torch.randn(rank, I, dtype=torch.float64).requires_grad_()
        B = torch.randn(O, rank, dtype=torch.float64).requires_grad_()
        ctx = AdapterContext(None, False, tuple(range(rows.stop - rows.start)))
        made.append(LowRankUpdate(A, B, 1.5 + number, p, number, ctx, rows))
    return made


def with_factors(given: Sequence[LowRankUpdate], factors: Sequence[Tensor]) -> list[LowRankUpdate]:
    pairs = zip(given, factors[::2], factors[1::2], strict=True)
    return [LowRankUpdate(A, B, t.scale, t.p, t.site_index, t.ctx, t.rows) for t, A, B in pairs]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_pass_gradcheck(bias: bool, p: float) -> None:
    host, given = layer(bias), terms(p)
    x = torch.randn(4, 3, I, dtype=torch.float64).requires_grad_()
    factors = [factor for term in given for factor in (term.A, term.B)]

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        return linear_low_rank(host, x, with_factors(given, factors))

    assert torch.autograd.gradcheck(run, (x, *factors))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_it_equals_plain_operations(p: float) -> None:
    host, given = layer(), terms(p)
    x = torch.randn(4, 3, I, dtype=torch.float64).requires_grad_()
    leaves = [x, *(factor for term in given for factor in (term.A, term.B))]
    wanted = torch.cat([host(x[:1]) + given[0].plain(x[:1]), host(x[1:2]), host(x[2:]) + given[1].plain(x[2:])])
    found = linear_low_rank(host, x, given)
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=0)
    weight = torch.randn_like(wanted)
    for own, other in zip(
        torch.autograd.grad(found, leaves, weight), torch.autograd.grad(wanted, leaves, weight), strict=True
    ):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_may_change_views_of_the_output_in_place(bias: bool) -> None:
    host, given = layer(bias), terms(0.0)
    x = torch.randn(4, 3, I, dtype=torch.float64).requires_grad_()
    found, wanted = (linear_low_rank(host, x, given) for _ in range(2))
    view = found.view(4, 3, O, 1).permute(0, 2, 1, 3)
    view /= 2.0
    for own, other in zip(*(torch.autograd.grad(h.square().sum(), x) for h in (found, wanted / 2.0)), strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=0)


def whole(dtype: torch.dtype = torch.float64) -> LowRankUpdate:
    torch.manual_seed(3)
    A, B = torch.randn(2, I, dtype=dtype).requires_grad_(), torch.randn(O, 2, dtype=dtype).requires_grad_()
    return LowRankUpdate(A, B, 0.5, 0.0, 0, AdapterContext())


def test_the_lowest_layer_computes_no_gradient_of_its_input_and_keeps_x_once() -> None:
    host, term, x = layer(), whole(), torch.randn(4, 3, I, dtype=torch.float64)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.untyped_storage().data_ptr()), t)[1], lambda t: t
    ):
        out = linear_low_rank(host, x, [term])
    assert kept.count(x.data_ptr()) == 1 and kept.count(host.weight.data_ptr()) == 1
    assert shared_input(x) == (x, None)
    out.sum().backward()
    assert x.grad is None and term.A.grad is not None


def test_layers_that_read_one_x_hand_on_one_gradient_and_no_sum_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts, given = [layer(), layer(), layer()], [whole(), whole(), whole()]
    source = torch.randn(4, 3, I, dtype=torch.float64).requires_grad_()
    x = source * 1.0
    outs = [linear_low_rank(host, x, [term]) for host, term in zip(hosts, given, strict=True)]
    made: list[Tensor] = []
    mm = torch.mm
    monkeypatch.setattr(fused_base.torch, "mm", lambda a, b, **more: (made.append(mm(a, b, **more)), made[-1])[1])
    (found,) = torch.autograd.grad(sum(out.sum() for out in outs), x, retain_graph=True)
    shared = [each for each in made if each.shape == (12, I)]
    assert len(shared) == 1 and shared[0].data_ptr() == found.data_ptr()
    monkeypatch.undo()
    wanted = sum(host.weight.sum(0) + 0.5 * (term.B @ term.A).sum(0) for host, term in zip(hosts, given, strict=True))
    torch.testing.assert_close(found, wanted.detach().expand_as(found))  # type: ignore[union-attr]
    again = torch.autograd.grad(outs[0].sum(), x, retain_graph=True)[0]  # a part of what reads x, and twice
    torch.testing.assert_close(
        again, (hosts[0].weight + 0.5 * given[0].B @ given[0].A).sum(0).detach().expand_as(found)
    )
    rest = torch.autograd.grad(outs[1].sum() + outs[2].sum(), source)[0]
    torch.testing.assert_close(again + rest, found)


def test_a_backward_pass_that_breaks_off_leaves_nothing_to_the_next() -> None:
    host, term, second = layer(), whole(), whole()
    x = torch.randn(4, 3, I, dtype=torch.float64).requires_grad_() * 1.0
    first_out, second_out = linear_low_rank(host, x, [term]), linear_low_rank(host, x, [second])
    torch.autograd.grad(first_out.sum() + second_out.sum(), [term.A], retain_graph=True)  # never comes to x

    def fail(gradient: Tensor) -> None:
        raise ValueError("broken off")

    handle = first_out.register_hook(fail)  # the second output's layer has run by then
    with pytest.raises(ValueError, match="broken off"):
        torch.autograd.grad(first_out.sum() + second_out.sum(), [x], retain_graph=True)
    handle.remove()
    (found,) = torch.autograd.grad(second_out.sum(), [x])
    torch.testing.assert_close(found, (host.weight + 0.5 * second.B @ second.A).sum(0).detach().expand_as(found))


def test_an_x_that_was_written_to_is_another_x() -> None:
    host, terms_ = layer(), [whole(), whole()]
    source = torch.randn(4, I, dtype=torch.float64).requires_grad_()
    x = source * 1.0
    first = shared_input(x)[0]
    assert shared_input(x)[0] is first
    x.mul_(3.0)
    second = linear_low_rank(host, x, [terms_[1]])
    assert shared_input(x)[0] is not first
    (found,) = torch.autograd.grad(second.sum(), source)
    slope = (host.weight + 0.5 * terms_[1].B @ terms_[1].A).sum(0).detach()
    torch.testing.assert_close(found, 3.0 * slope.expand_as(found))


def test_x_dies_with_those_who_hold_it() -> None:
    x = torch.randn(4, I, dtype=torch.float64).requires_grad_() * 1.0
    gone, read = weakref.ref(x), weakref.ref(shared_input(x)[0])
    del x
    gc.collect()
    assert gone() is None and read() is None


def test_without_gradients_now_a_later_pass_still_gets_them() -> None:
    host, term = layer(), whole()
    x = torch.randn(4, I, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        linear_low_rank(host, x, [term])
    linear_low_rank(host, x, [term]).sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0


def test_what_is_not_a_frozen_layer_in_one_dtype_is_left_alone() -> None:
    x = torch.randn(4, I, dtype=torch.float64)
    assert linear_low_rank(layer(), x, [whole()]) is not None
    assert linear_low_rank(layer().requires_grad_(True), x, [whole()]) is None
    assert linear_low_rank(layer(), x.float(), [whole()]) is None
    assert linear_low_rank(layer(), x.to("meta"), [whole()]) is None
    seedless = LowRankUpdate(*(getattr(whole(), name) for name in ("A", "B", "scale")), 0.1, 0, AdapterContext())
    assert linear_low_rank(layer(), x, [seedless]) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_low_rank(layer(), x, [whole()]) is None
    quantised = layer()
    quantised.weight = nn.Parameter(torch.zeros(O, I, dtype=torch.int8), requires_grad=False)
    assert linear_low_rank(quantised, x, [whole()]) is None
    hooked = layer()
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    assert linear_low_rank(hooked, x, [whole()]) is None


def lora_model(dtype: torch.dtype, dropout: float = 0.0, layers: str = "") -> Any:
    model = small_model(num_hidden_layers=3, scale=2.0).to(dtype)
    graft.attach(model, {"a": graft.LoRA(rank=2, dropout=dropout, sites=f"linear{layers}")})
    torch.manual_seed(0)
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    set_trainable(model, ["a"])
    return model.train()


def trained(model: Any, recomputed: bool = False) -> list[Tensor]:
    """Output and gradients of a pass with seeds."""
    ids = torch.arange(2, 14).view(2, 6)
    model.zero_grad()
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with running(model, ForwardContext("a", (6, 6), False, (3, 4))):
        out = model(input_ids=ids, use_cache=False).logits
        out.float().square().mean().backward()
    return [out.detach(), *(p.grad.clone() for _, p in graft.parameters(model, "a"))]


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the base out of the node, and the MLP apart."""
    monkeypatch.setattr("graft.injection.gated_mlp._run", lambda *given: None)
    monkeypatch.setattr("graft.injection.container.linear_low_rank", lambda host, x, terms: None)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_model_learns_as_by_nodes_apart(monkeypatch: pytest.MonkeyPatch, recomputed: bool, dropout: float) -> None:
    calls: list[nn.Module] = []
    monkeypatch.setattr(
        "graft.injection.container.linear_low_rank",
        lambda host, x, terms: (calls.append(host), linear_low_rank(host, x, terms))[1],
    )
    model = lora_model(torch.float64, dropout)
    found = trained(model, recomputed)
    assert len(set(calls)) == 3 * 7
    plainly(monkeypatch)
    for own, other in zip(found, trained(model, recomputed), strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=1e-10)


def test_bfloat16_with_masters_in_float32_is_as_near_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model(torch.bfloat16)
    exact = trained(copy.deepcopy(model).double())
    ours = trained(model)
    plainly(monkeypatch)
    plain = trained(model)
    assert all(each.dtype == torch.float32 for each in ours[1:])

    def error(found: list[Tensor]) -> float:
        return sum(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)) / len(exact)

    assert error(ours) <= 1.1 * error(plain)


def test_nothing_is_computed_or_kept_below_the_lowest_site_that_trains() -> None:
    model = lora_model(torch.float64, layers="@2")
    reached: dict[int, bool] = {}
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda module, args, out, number=number: reached.update({number: out.requires_grad})
        )
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
        running(model, ForwardContext("a", (6, 6))),
    ):
        embedded: list[Tensor] = []
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(out))
        body = model.model(input_ids=torch.arange(2, 14).view(2, 6), use_cache=False)[0]
    assert body.requires_grad and not embedded[0].requires_grad
    assert reached == {0: False, 1: False, 2: True}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    below = {id(each) for block in model.model.layers[:2] for each in block.parameters()}
    assert not any(id(each) in below for each in kept)
    assert any(each.untyped_storage().data_ptr() not in weights for each in kept)


def test_compiled_code_and_hooks_on_the_layer_see_the_layer() -> None:
    model = lora_model(torch.float64)
    seen: list[torch.Size] = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    eager = trained(model)
    assert seen == [torch.Size([2, 6, 32])]
    handle.remove()
    ids = torch.arange(2, 14).view(2, 6)
    with graft.use(model, "a"):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, eager[0])


def test_reentrant_checkpointing_of_a_part_sums_the_same() -> None:
    hosts, given = [layer(), layer()], [whole(), whole()]
    x = torch.randn(4, I, dtype=torch.float64).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return linear_low_rank(hosts[0], x, [given[0]]).sin() * linear_low_rank(hosts[1], x, [given[1]])

    wanted = torch.autograd.grad(run(x).sum(), x)[0]
    checkpoint(run, x, use_reentrant=True).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted)
