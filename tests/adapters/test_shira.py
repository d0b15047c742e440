"""SHiRA: PEFT's numbers from PEFT's seed, masks that are saved with the adapter, and what is kept for backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.attaching.parameters import modules_of
from graft.injection.state import state_of
from tests.adapters.references import Twins, assert_bfloat16_as_good
from tests.contract.table import base, ids, logits, loss, randomise

SHIRA = {"values": "shira_weight.default"}
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("llama", graft.SHiRA(rank=3, seed=4, mask_per="shape", sites="linear"), {"r": 3, "target_modules": "all-linear"}),
    ("llama", graft.SHiRA(rank=10, seed=4, mask_per="shape", sites="attn.k"), {"r": 10, "target_modules": ["k_proj"]}),
    ("bert", graft.SHiRA(rank=2, seed=4, mask_per="shape", sites="attn.q mlp.up"),
     {"r": 2, "target_modules": ["query", "intermediate.dense"]}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "ours", "theirs"), CASES)
def test_outputs_and_gradients_equal_peft_from_the_seed_alone(family: str, ours: Any, theirs: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    twins = Twins(family, ours, peft.ShiraConfig(random_seed=4, **theirs), SHIRA)
    for path, module in modules_of(twins.model, state_of(twins.model), "a"):
        layer = twins.reference.get_submodule(f"base_model.model.{path.rpartition('.')[0]}")
        assert torch.equal(module.positions, layer.shira_indices["default"])
    twins.assert_same()


def test_merged_weights_equal_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    family, ours, theirs = CASES[0]
    Twins(family, ours, peft.ShiraConfig(random_seed=4, **theirs), SHIRA).assert_same_merged()


def test_bfloat16_is_at_least_as_close_to_float32_as_in_peft() -> None:
    peft = pytest.importorskip("peft")
    family, ours, theirs = CASES[0]
    assert_bfloat16_as_good(family, ours, peft.ShiraConfig(random_seed=4, **theirs), SHIRA)


def positions(model: Any) -> list[torch.Tensor]:
    return [module.positions for _, module in modules_of(model, state_of(model), "a")]


def test_masks_come_from_the_seed_alone_and_differ_from_site_to_site() -> None:
    drawn = []
    for seed, outer in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(outer)
        model = base("llama")
        graft.attach(model, {"a": graft.SHiRA(rank=2, seed=seed, sites="attn.q attn.o")})
        drawn.append(positions(model))
    assert all(torch.equal(one, other) for one, other in zip(drawn[0], drawn[1], strict=True))
    assert len({tuple(each.flatten().tolist()) for each in drawn[0]}) == 4
    assert not torch.equal(drawn[0][0], drawn[2][0])
    model = base("llama")
    graft.attach(model, {"a": graft.SHiRA(rank=2, mask_per="shape", sites="attn.q attn.o")})
    assert len({tuple(each.flatten().tolist()) for each in positions(model)}) == 1


def test_a_mask_names_as_many_entries_as_a_lora_has_each_once() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.SHiRA(rank=3, sites="linear")})
    for _, module in modules_of(model, state_of(model), "a"):
        rows, columns = module.positions.long()
        flat = rows * module.shape[1] + columns
        assert len(flat) == 3 * sum(module.shape) == len(module.values) and (flat.diff() > 0).all()
        assert rows.max() < module.shape[0] and columns.max() < module.shape[1]


def test_positions_are_saved_and_a_loaded_adapter_takes_them_from_the_file(tmp_path: Path) -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.SHiRA(rank=2, sites="attn.q")})
    for each in positions(model):  # another mask than the seed gives
        each.copy_(torch.stack([torch.arange(128) % 32, torch.arange(128) // 32]))
    randomise(model, "a")
    folder = graft.save(model, "a", tmp_path / "a")
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.linear.positions"].dtype == torch.int32
    again = graft.load(base("llama"), folder)
    assert all(torch.equal(one, other) for one, other in zip(positions(model), positions(again), strict=True))
    assert torch.equal(logits(again, ids()), logits(model, ids()))


def test_no_pass_keeps_the_matrix_that_is_written_out() -> None:
    """Bytes that autograd keeps of a model with the adapter beyond those of the bare model: x is there anyway, values are parameters."""
    kept: dict[str | None, int] = {}
    model = base("llama")
    graft.attach(model, {"a": graft.SHiRA(rank=2, sites="linear")})
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for name in (None, "a"):
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in parameters:
                found[place] = tensor.untyped_storage().nbytes()
            return tensor

        embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()
        with graft.use(model, name), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(inputs_embeds=embedded).logits.sum()
        kept[name] = sum(found.values())
    written_out = 4 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 40)
    assert kept["a"] - kept[None] < 0.3 * written_out  # type: ignore[operator]


def test_more_entries_than_a_layer_has_are_refused() -> None:
    model = base("llama")
    with pytest.raises(
        graft.GraftError, match=r"rank: 11 asks for 528 entries, and 'model.layers.0.self_attn.k_proj' has 16 x 32"
    ):
        graft.attach(model, {"a": graft.SHiRA(rank=11, sites="attn.k")})


def test_a_step_changes_the_weights_at_the_mask_and_nowhere_else() -> None:
    model, plain = base("llama"), base("llama")
    graft.attach(model, {"a": graft.SHiRA(rank=2, sites="attn.q")})
    optimizer = torch.optim.SGD([p for _, p in graft.parameters(model, "a")], lr=1.0)
    loss(model, ids()).backward()
    optimizer.step()
    masks = positions(model)
    graft.merge(model, "a")
    for number, mask in enumerate(masks):
        path = f"model.layers.{number}.self_attn.q_proj.weight"
        moved = (model.get_parameter(path) != plain.get_parameter(path)).nonzero().t()
        assert torch.equal(moved, mask.long())
