"""Gated MLPs of whole models: which are recognised, that adapters learn in them as by the model's own forward, and that nothing is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import graft
from graft.architectures.blocks import blocks_of
from graft.attaching.active import running, set_trainable
from graft.injection import gated_mlp as gated_forward
from graft.injection.gated_mlp import GatedForward
from graft.injection.gated_proof import gated_mlps
from graft.routing.context import ForwardContext
from tests.architectures import build
from tests.families.zoo import tiny
from tests.small import small_model

GATED = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "olmo2", "stablelm", "cohere", "exaone4", "granite"), "silu"
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "gelu_tanh"),
}
NOT = ("gptj", "bloom", "gpt2", "opt", "phi", "phi3", "falcon", "gpt_neox", "mixtral", "mpt")


@pytest.mark.parametrize("family", [*GATED, *NOT])
def test_gated_mlps_are_recognised_and_no_others(family: str) -> None:
    model = tiny(family)
    drawn, modes = torch.get_rng_state(), {path: module.training for path, module in model.named_modules()}
    weights = dict(model.named_parameters())
    found = list(gated_mlps(blocks_of(model)))
    assert {gated.activation for _, gated in found} == ({GATED[family]} if family in GATED else set())
    assert len(found) == (2 if family in GATED else 0)
    assert torch.equal(torch.get_rng_state(), drawn) and dict(model.named_parameters()).keys() == weights.keys()
    assert all(each is weights[name] for name, each in model.named_parameters())
    assert {path: module.training for path, module in model.named_modules()} == modes


class Odd(nn.Module):
    """A gated MLP, and what one may do besides."""

    def __init__(self, more: str = "", limit: float = 0.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn, self.more, self.limit = nn.SiLU(), more, limit
        if more == "norm":
            self.norm = nn.LayerNorm(6)
        if more == "buffer":
            self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        x = x.view(-1, 4) if self.more == "sizes" else x
        e, u = self.gate_proj(x), self.up_proj(x)
        if self.more == "clamp":
            e = e.clamp(max=self.limit)
        if self.more == "upcast":
            return self.down_proj((self.act_fn(e.float()) * u.float()).to(u.dtype))
        if self.more == "python":
            return self.down_proj(e * torch.sigmoid(e) * u)
        if self.more == "tuple":
            return self.down_proj(self.act_fn(e) * u), None
        h = self.act_fn(e) * u
        h = F.dropout(h, 0.3, self.training) if self.more == "dropout" else h
        return self.down_proj(h + h.mean(1, keepdim=True) if self.more == "mixing" else h)


def block_of(*mlps: nn.Module) -> Any:
    class Block(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.self_attn, self.mlp = Attention(), mlp

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

    root = nn.Module()
    root.layers = nn.ModuleList(Block(mlp) for mlp in mlps)
    return root


def test_what_an_mlp_does_besides_leaves_it_to_itself() -> None:
    for more in ("clamp", "upcast", "python", "sizes", "tuple", "mixing", "norm", "buffer"):
        assert not list(gated_mlps(blocks_of(block_of(Odd(more, limit=7.0))))), more
    ((_, plain),) = gated_mlps(blocks_of(block_of(Odd())))
    ((_, dropping),) = gated_mlps(blocks_of(block_of(Odd("dropout"))))
    assert not plain.evaluating and dropping.evaluating


def test_one_class_may_be_gated_in_some_layers_only() -> None:
    """As Gemma 3n, whose lower layers alone have a sparse activation."""
    mlps = Odd("clamp", 7.0), Odd("clamp", 1e9), Odd(), Odd("clamp", 7.0), Odd()
    found = [module for module, _ in gated_mlps(blocks_of(block_of(*mlps)))]
    assert found == [mlps[1], mlps[2], mlps[4]]


def own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_forward, "_run", lambda *given: None)


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each node runs."""
    counts = {"gated_mlp": 0, "gated_product": 0}
    for name in counts:
        function = getattr(gated_forward, name)

        def run(*given: Any, name: str = name, function: Callable[..., Tensor] = function) -> Tensor:
            counts[name] += 1
            return function(*given)

        monkeypatch.setattr(gated_forward, name, run)
    return counts


ADAPTERS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 2, "sites": "linear", "dropout": 0.2},
    "wide": {"kind": "lora", "rank": 3, "sites": "mlp.up mlp.down"},
    "parallel": {"kind": "parallel", "bottleneck": 3, "sites": "mlp"},
    "series": {"kind": "series", "bottleneck": 3, "sites": "mlp"},
    "ia3": {"kind": "ia3"},
    "dora": {"kind": "dora", "rank": 2, "sites": "mlp.gate mlp.down"},
    "before": {"kind": "series", "bottleneck": 3, "position": "before", "sites": "mlp.gate mlp.up"},
    "prefix": {"kind": "prefix", "tokens": 2},
    "bias": {"kind": "lora", "rank": 2, "sites": "mlp.gate", "train_bias": True},
    "full": {"kind": "full", "sites": "mlp.up"},
}


def company(family: str = "llama", names: tuple[str, ...] = tuple(ADAPTERS), dtype: torch.dtype = torch.float64) -> Any:
    model = small_model(scale=2.0).to(dtype) if family == "llama" else tiny(family).to(dtype)
    graft.attach(model, {name: ADAPTERS[name] for name in names})
    set_trainable(model, list(names))
    torch.manual_seed(0)
    with torch.no_grad():
        for name in names:
            for _, parameter in graft.parameters(model, name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def learned(model: Any, rows: tuple[str | None, ...], recomputed: bool = False) -> list[Tensor]:
    """Output and every gradient of a pass with seeds."""
    ids = (torch.arange(6 * len(rows)).view(len(rows), 6) * 7) % 60 + 2
    model.zero_grad()
    context = ForwardContext(rows, (6,) * len(rows), False, tuple(range(len(rows))))

    def forward(ids: Tensor) -> Tensor:
        with running(model, context):
            return model(input_ids=ids, use_cache=False).logits

    out = checkpoint(forward, ids, use_reentrant=False) if recomputed else forward(ids)
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for name in graft.names(model)
                            for _, p in graft.parameters(model, name) if p.grad is not None)]  # fmt: skip


def near(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_pass_of_every_kind_learns_as_by_the_model_s_own_forward(
    monkeypatch: pytest.MonkeyPatch, family: str, recomputed: bool
) -> None:
    model = company(family)
    for rows in (
        ("lora", None, "wide", "lora"),
        ("parallel", "lora", "series", "prefix"),
        tuple(ADAPTERS),
        (None, "prefix"),
        ("ia3", "bias"),
    ):
        found = learned(model, rows, recomputed)
        with monkeypatch.context() as patch:
            own_forward(patch)
            near(found, learned(model, rows, recomputed))


def test_an_expert_that_all_tokens_share_is_gated_too_and_is_given_tokens_without_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("qwen2_moe")  # its experts' grouped product knows no float64
    names = ("wide", "other")
    graft.attach(model, {name: {**ADAPTERS["wide"], "sites": "mlp.gate mlp.down"} for name in names})
    set_trainable(model, list(names))
    for name in names:
        for _, parameter in graft.parameters(model, name):
            torch.nn.init.normal_(parameter, std=0.1)
    counts = counted(monkeypatch)
    found = learned(model, ("other", "other", None, "wide"))
    assert counts == {"gated_mlp": 2, "gated_product": 0}
    own_forward(monkeypatch)
    for own, other in zip(found, learned(model, ("other", "other", None, "wide")), strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-3)


def test_which_node_serves_which_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = company(), counted(monkeypatch)

    def after(*rows: str | None) -> tuple[int, int]:
        counts.update(gated_mlp=0, gated_product=0)
        learned(model, rows)
        return counts["gated_mlp"], counts["gated_product"]

    assert after("lora", "lora") == after("lora", "wide", None) == (2, 0)
    assert after("lora", "parallel", "series", "prefix") == (2, 0)  # at the output, or in attention
    assert after("prefix", None) == (2, 0)
    for other in ("ia3", "dora", "before", "bias", "full"):
        assert after("lora", other) == (0, 2), other
    assert after("lora", None, "lora") == (0, 2)  # rows that do not lie together


def test_the_forward_is_bitwise_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = company(names=("lora", "prefix"), dtype=dtype)
        for rows in (("lora", "lora"), ("prefix", "lora"), ("prefix",)):
            found = learned(model, rows)[0]
            with monkeypatch.context() as patch:
                own_forward(patch)
                assert torch.equal(found, learned(model, rows)[0])


@contextlib.contextmanager
def replaced(module: nn.Module, name: str, new: nn.Module) -> Any:
    old = module._modules[name]
    setattr(module, name, new)
    yield
    setattr(module, name, old)


def test_where_it_must_not_act_the_model_s_own_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = company(names=("lora",), dtype=torch.float32).eval(), counted(monkeypatch)
    mlp, x = model.model.layers[1].mlp, torch.randn(2, 3, 32, requires_grad=True)

    def nodes(run: Callable[[], Any] = lambda: mlp(x), rows: Any = "lora") -> tuple[int, int]:
        counts.update(gated_mlp=0, gated_product=0)
        with running(model, ForwardContext(rows)):
            run()
        return counts["gated_mlp"], counts["gated_product"]

    assert nodes() == (1, 0)
    assert nodes(rows=None) == (0, 0)
    assert nodes(lambda: mlp(x=x)) == (0, 0)
    with torch.no_grad():
        assert nodes() == (0, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nodes() == (0, 0)
    assert nodes(lambda: torch.func.grad(lambda x: mlp(x).sum())(x.detach())) == (0, 0)
    assert nodes(lambda: torch.compile(mlp, backend="eager", fullgraph=True)(x)) == (0, 0)
    seen: list[str] = []
    for path, expected in (("act_fn", (0, 0)), ("up_proj", (0, 1)), ("", (1, 0))):
        handle = mlp.get_submodule(path).register_forward_hook(lambda *given, path=path: seen.append(path))
        assert nodes() == expected and seen.pop() == path
        handle.remove()
    with replaced(mlp, "act_fn", nn.ReLU()):
        assert nodes() == (0, 0)
    with replaced(mlp, "up_proj", nn.Linear(32, 48, bias=False)):  # one that trains
        assert nodes() == (0, 1)
    mlp.down_proj.forward = mlp.down_proj.forward  # as accelerate's hooks do
    assert nodes() == (0, 1)
    del mlp.down_proj.forward
    graft.merge(model, "lora")
    counts.update(gated_mlp=0, gated_product=0)
    with graft.use(model, "lora"):
        mlp(x)
    assert counts == {"gated_mlp": 0, "gated_product": 0}


def test_dropout_of_the_mlp_s_own_keeps_its_own_forward_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    root = block_of(Odd("dropout"))
    graft.attach(root, {"a": graft.LoRA(rank=2, sites="mlp.gate mlp.down")})
    counts, x, mlp = counted(monkeypatch), torch.randn(1, 3, 4), root.layers[0].mlp
    with running(root, ForwardContext("a")):
        mlp.train()(x)
        assert counts["gated_mlp"] == counts["gated_product"] == 0
        mlp.eval()(x)
        assert counts["gated_mlp"] == 1


def test_detach_gives_the_class_back_and_only_the_last_one() -> None:
    model = company(names=("lora", "parallel"))
    mlps = [block.mlp for block in model.model.layers]
    before = type(small_model().model.layers[0].mlp)
    assert all(isinstance(mlp, GatedForward) for mlp in mlps)
    graft.detach(model, "parallel")
    assert all(isinstance(mlp, GatedForward) for mlp in mlps) and len(learned(model, ("lora",))) > 1
    graft.detach(model)
    assert all(type(mlp) is before and "graft_gated" not in mlp.__dict__ for mlp in mlps)


def test_detach_refuses_an_mlp_that_was_hooked_since() -> None:
    model = company(names=("prefix",))
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x)
    with pytest.raises(graft.GraftError, match="layers.1.mlp' was hooked after attach"):
        graft.detach(model)
    del mlp.forward
    graft.detach(model)


def test_tensors_that_were_offloaded_are_an_error_here_too() -> None:
    model = company(names=("lora", "series"), dtype=torch.float32)
    down = model.model.layers[0].mlp.down_proj
    for name in ("series", "lora"):
        part = down._modules["graft"]._modules[name]
        part.to_empty(device="meta")
        with pytest.raises(graft.GraftError, match="offloaded after attach"):
            learned(model, ("lora", "series") if name == "series" else ("lora",))
