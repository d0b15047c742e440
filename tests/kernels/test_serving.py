"""Which modules the kernels compute, and that a model computes the same with them, with any adapter beside, and is itself again after."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import graft
from graft.kernels import Kernels, load, serving
from tests.kernels.bases import CONFIGS, NORMS, ROTARY, base, loss_and_gradient, tokens
from tests.kernels.fake_liger import CALLS, put_in_place


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    torch.manual_seed(0)  # of fresh adapters
    put_in_place(monkeypatch)
    return load("cpu")


def _disturbed(model: Any, *names: str) -> Any:
    """The adapters with random weights, so that what they do is seen."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in names:
            for _, parameter in graft.parameters(model, name):
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def _classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_losses_and_gradients_are_those_of_torch(kernels: Kernels, family: str) -> None:
    model = _disturbed(graft.attach(base(family), {"a": graft.LoRA(rank=4, sites="linear")}), "a")
    before, keys = _classes(model), list(model.state_dict())
    loss, gradient = loss_and_gradient(model, tokens())
    with serving(model, kernels) as served:
        rotary = ROTARY.get(family, 2)
        assert served.counts["norms"] == NORMS[family] and served.counts["rotary positions"] == rotary
        again, same = loss_and_gradient(model, tokens())
        assert list(model.state_dict()) == keys
    assert abs(again - loss) < 1e-6 * loss and (same - gradient).norm() < 1e-6 * gradient.norm()
    assert served.counts["SwiGLU"] == (2 if family in ("llama", "mistral", "qwen3", "olmo2") else 0)
    assert CALLS["rms_norm"] == NORMS[family] and CALLS["swiglu_forward"] >= served.counts["SwiGLU"]
    assert _classes(model) == before and not any("graft_norm" in module.__dict__ for module in model.modules())
    assert loss_and_gradient(model, tokens())[0] == loss


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "olmo2"])
def test_half_precision_stays_within_its_rounding(kernels: Kernels, family: str) -> None:
    model = base(family, torch.bfloat16)
    with torch.no_grad():
        own = model(input_ids=tokens()).logits.float()
        with serving(model, kernels):
            found = model(input_ids=tokens()).logits.float()
        exact = base(family, torch.bfloat16).float()(input_ids=tokens()).logits
    assert (found - exact).norm() < 1.2 * (own - exact).norm()


def test_rotation_takes_whole_heads_of_one_dtype_only(kernels: Kernels) -> None:
    for family, taken in (("llama", 2), ("gpt_neox", 0), ("olmo2", 2)):
        CALLS.clear()
        kernels.uses.clear()
        model = base(family)  # a quarter of each head turns in GPT-NeoX
        with serving(model, kernels) as served, torch.no_grad():
            model(input_ids=tokens())
        assert CALLS["rope_forward"] == served.used.get("rotary positions", 0) == taken, family
    CALLS.clear()
    kernels.uses.clear()
    model = base("olmo2", torch.bfloat16)  # whose angles are float32
    with serving(model, kernels) as served, torch.no_grad():
        model(input_ids=tokens())
    assert str(served) == "Liger 9.0 (9 norms)" and CALLS["rope_forward"] == 0


def test_rows_are_laid_end_to_end_for_the_kernel(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled anew for each number of rows."""
    shapes: set[tuple[int, ...]] = set()
    own = kernels.functions["rope_forward"]
    monkeypatch.setitem(
        kernels.functions, "rope_forward", lambda q, *rest: (shapes.add(tuple(q.shape)), own(q, *rest))[1]
    )
    model = base("llama")
    positions = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [0, 0, 0, 1, 2]])
    for given in (None, positions, positions[1:2]):
        with torch.no_grad():
            wanted = model(input_ids=tokens(3, 5), position_ids=given).logits
            with serving(model, kernels):
                found = model(input_ids=tokens(3, 5), position_ids=given).logits
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert shapes == {(1, 4, 15, 8)}


def test_nothing_outside_the_model_changes(kernels: Kernels) -> None:
    own, other = modeling_llama.apply_rotary_pos_emb, base("llama")
    model = base("llama")
    with serving(model, kernels), torch.no_grad():
        assert modeling_llama.apply_rotary_pos_emb is own
        other(input_ids=tokens())
        assert not CALLS
        assert isinstance(model.model.norm, modeling_llama.LlamaRMSNorm)
    state = torch.random.get_rng_state()
    with serving(model, kernels):
        assert torch.equal(torch.random.get_rng_state(), state)


def test_what_the_kernels_overwrite_is_a_copy(kernels: Kernels) -> None:
    """The stand-in writes where its arguments lie, as Liger's kernel does."""
    model = base("llama")
    kept: list[tuple[Tensor, Tensor]] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda *given: kept.append((given[2], given[2].clone()))
    )
    grads: list[tuple[Tensor, Tensor]] = []
    attention, own = model.model.layers[0].self_attn, modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module is attention:
            query.register_hook(lambda grad: grads.append((grad, grad.clone())))
        return own(module, query, *args, **kwargs)

    modeling_llama.ALL_ATTENTION_FUNCTIONS["watched"] = watched
    try:
        model.set_attn_implementation("watched")
        with serving(model, kernels):
            loss_and_gradient(model, tokens())
    finally:
        del modeling_llama.ALL_ATTENTION_FUNCTIONS["watched"]
    assert kept and all(torch.equal(now, then) for now, then in (*kept, *grads)) and grads


ON_NORMS = {
    "full": {"kind": "full", "sites": "norm"},
    "llama-adapter-v2": graft.LLaMAAdapterV2(),
    "hadamard": graft.Hadamard(),
    "prefix": graft.Prefix(),
    "prompt": graft.PromptTuning(),
    "lora-with-dropout": graft.LoRA(rank=4, sites="linear", dropout=0.1),
}


@pytest.mark.parametrize("kind", ON_NORMS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_on_norms_and_in_attention_are_the_same(kernels: Kernels, family: str, kind: str) -> None:
    model = _disturbed(graft.attach(base(family), {"a": ON_NORMS[kind]}), "a")
    loss, gradient = loss_and_gradient(model, tokens())
    with serving(model, kernels):
        again, same = loss_and_gradient(model, tokens())
        with graft.use(model, None):
            bare = model(input_ids=tokens()).logits
    assert CALLS["rms_norm"] > 0
    assert abs(again - loss) < 1e-6 * loss and (same - gradient).norm() < 2e-6 * gradient.norm()
    with graft.use(model, None):
        assert (model(input_ids=tokens()).logits - bare).abs().max() < 1e-4
    graft.detach(model)
    assert type(model.model.norm).__dict__.get("graft_base") is None


def test_rows_of_several_adapters_are_the_same(kernels: Kernels) -> None:
    model = graft.attach(base("llama"), {"a": graft.LoRA(rank=4), "b": graft.Hadamard(), "c": graft.Prefix()})
    _disturbed(model, "a", "b", "c")
    with torch.no_grad(), graft.route(model, ["a", None, "b", "c"]):
        own = model(input_ids=tokens(4)).logits
        with serving(model, kernels):
            found = model(input_ids=tokens(4)).logits
    assert (own - found).abs().max() < 1e-4


def test_a_gradient_comes_back_twice(kernels: Kernels) -> None:
    model = _disturbed(graft.attach(base("gemma3"), {"a": graft.LoRA(rank=4)}), "a")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with serving(model, kernels):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        first = torch.autograd.grad(loss, trained, retain_graph=True)
        second = torch.autograd.grad(loss, trained)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_what_kernels_do_not_take_runs_as_before(kernels: Kernels) -> None:
    model = base("llama").double()
    with serving(model, kernels), torch.no_grad():
        model(input_ids=tokens())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            base_model = model.float()
            base_model(input_ids=tokens())
        torch.func.vmap(model.model.norm)(torch.randn(2, 3, 32))
    assert not CALLS


def test_a_forward_of_the_instance_keeps_its_place(kernels: Kernels) -> None:
    model = base("llama")
    own = model.model.norm.forward
    model.model.norm.forward = lambda x: own(x)
    with serving(model, kernels) as served:
        assert served.counts["norms"] == NORMS["llama"] - 1
    assert "forward" in model.model.norm.__dict__


def test_a_failure_inside_gives_the_model_back(kernels: Kernels) -> None:
    model = base("llama")
    before = _classes(model)
    with pytest.raises(KeyError), serving(model, kernels):
        assert _classes(copy.deepcopy(model)) != before
        raise KeyError
    assert _classes(model) == before
