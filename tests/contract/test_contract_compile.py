"""Points 8 and 14: `torch.compile` gives the same loss and gradients, and one graph serves every adapter, every routing and none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo

import graft
from graft.attaching.active import running, set_trainable
from graft.attention import flat_attention
from graft.routing.context import ForwardContext
from graft.testing.checks.compiling import same_under_every_choice
from tests.contract.table import ids, logits, pristine, randomise

HOOKS: dict[str, Any] = {
    "linear": graft.LoRA(rank=3, train_bias=True, sites="linear"),
    "slices": graft.LoRA(rank=2, sites="attn.q attn.v"),
    "output": graft.Series(bottleneck=4, norm=True, scale="learned", sites="attn mlp layer"),
    "input": graft.Series(bottleneck=4, position="before", sites="mlp"),
    "carried": graft.Parallel(bottleneck=4, sites="attn mlp"),
    "zero": graft.Prefix(tokens=3),
    "after": graft.Prefix(tokens=2, positions="after_prefix"),
    "prompt": graft.PromptTuning(tokens=3),
    "encoded": graft.PTuning(tokens=2, hidden=4),
    "beside": graft.LLaMAAdapter(tokens=2),
    "behind": graft.LLaMAAdapter(tokens=2, adds="after_o"),
    "stack": [graft.Prefix(tokens=2, projection=4), graft.Parallel(bottleneck=4), graft.Full(sites="head")],
    "whole": graft.Full(sites="norm"),
    "tables": [graft.Full(sites="embed head"), graft.Full(sites="embed", tokens=(4, 7, 30))],
}
ROUTE = ("carried", None, "slices", "after")


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def every_hook(family: str, *names: str) -> nn.Module:
    """One model of one layer with an adapter for every hook, all of which train."""
    model, chosen = copy.deepcopy(pristine(family, layers=1)), {name: HOOKS[name] for name in names or HOOKS}
    graft.attach(model, chosen)
    for number, name in enumerate(chosen):
        randomise(model, name, number)
    set_trainable(model, tuple(chosen))
    return model


def assert_same_everywhere(model: nn.Module, compiled: Any, inputs: Tensor, tolerance: float) -> None:
    """One graph, then every other choice without a second one."""
    route = tuple(name if name in graft.names(model) else None for name in ROUTE)
    same_under_every_choice(model, compiled, (*graft.names(model), None, route), inputs, tolerance)


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in ("t5", "bloom", "gptj", "gpt2", "bert"))],
)
def test_one_full_graph_serves_every_kind_every_routing_and_the_bare_base(family: str) -> None:
    names = {
        "llama": (),
        "bloom": ("slices", "output", "carried", "after", "prompt"),
        "gptj": ("carried", "after"),
        "gpt2": ("slices", "zero", "encoded", "behind"),
        "bert": ("slices", "prompt", "encoded"),
        "t5": ("prompt", "slices"),
    }
    model = every_hook(family, *names[family])
    assert_same_everywhere(model, torch.compile(model, backend="aot_eager", fullgraph=True), ids(4), 2e-5)


def test_a_routing_of_another_size_than_the_batch_stops_a_compiled_graph() -> None:
    model = every_hook("llama", "slices")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows in (("slices",), ("slices",) * 4):
        with (
            graft.route(model, rows),
            pytest.raises(RuntimeError, match="another number of rows than the routing names"),
        ):
            logits(compiled, ids(3), use_cache=False)
    with graft.route(model, ["slices", None, "slices"]):
        assert logits(compiled, ids(3), use_cache=False).isfinite().all()


def test_a_merged_adapter_is_not_applied_twice_by_a_compiled_graph() -> None:
    model, inputs = every_hook("llama", "slices", "output"), ids(3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with graft.use(model, "slices"):
        expected = logits(model, inputs)
        for act in (lambda: None, lambda: graft.merge(model, "slices"), lambda: graft.unmerge(model, "slices")):
            act()
            torch.testing.assert_close(logits(compiled, inputs, use_cache=False), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "rows"), [("llama", ("slices", None)), ("gptj", (None, None))])
def test_token_flat_passes_do_not_mix_in_silence_in_a_compiled_graph(family: str, rows: tuple[str | None, ...]) -> None:
    model = every_hook(family, "slices")
    compiled: Any = torch.compile(model, backend="aot_eager")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with (
        flat_attention(model),
        running(model, ForwardContext(rows, (3, 4), flat=True)),
        pytest.raises(RuntimeError, match="do not run compiled"),
    ):
        logits(compiled, ids(1), position_ids=positions, use_cache=False)


@pytest.mark.slow
def test_checkpointed_blocks_compile_and_keep_the_pass_they_ran_with() -> None:
    model: Any = every_hook("llama", "slices", "after", "input", "beside").train()
    model.gradient_checkpointing_enable()
    model.disable_input_require_grads()  # transformers' hook on the embedding does not compile; non-reentrant blocks need none
    assert_same_everywhere(model, torch.compile(model, backend="aot_eager", fullgraph=True), ids(4), 2e-5)


@pytest.mark.parametrize("name", ["carried", "prompt"])
def test_what_is_carried_between_modules_compiles_under_checkpointing_where_torch_allows_it(name: str) -> None:
    model: Any = every_hook("llama", name).train()
    model.gradient_checkpointing_enable()
    model.disable_input_require_grads()
    with dynamo.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        assert_same_everywhere(model, torch.compile(model, backend="aot_eager", fullgraph=True), ids(4), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "output", "input", "carried", "after", "prompt", "beside", "stack"])
def test_inductor_gives_the_same_loss_for_one_kind_of_each_hook(name: str) -> None:
    model = every_hook("llama", name)
    assert_same_everywhere(model, torch.compile(model, fullgraph=True), ids(4), 1e-4)
