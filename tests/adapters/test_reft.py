"""ReFT: equal to AdapterHub's, small on disk, and blind to padding."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import graft
from graft.adapters.kinds.reft import orthonormal_rows
from graft.attaching.parameters import tensors
from graft.injection.state import state_of


def orthogonal_weight(stored: dict[str, torch.Tensor], unit: str) -> torch.Tensor:
    """R [r, D] from what torch's own orthogonal parametrisation keeps."""
    original = stored[f"{unit}.projection.parametrizations.weight.original"]
    linear = nn.utils.parametrizations.orthogonal(nn.Linear(original.shape[1], original.shape[0], bias=False))
    state = {name: stored[f"{unit}.projection.{name}"] for name in linear.state_dict()}
    linear.load_state_dict(state)
    return linear.weight.detach()


@pytest.mark.parametrize(("form", "prefix", "suffix"), [("loreft", 3, 0), ("noreft", 3, 1), ("direft", 2, 0)])
@pytest.mark.parametrize("batch", ["unpadded", "padded"])
def test_it_gives_what_adapterhub_gives(shared: Path, form: str, prefix: int, suffix: int, batch: str) -> None:
    case = shared / "oracle" / "adapters" / f"bert-{form}"
    model = AutoModel.from_pretrained(shared / "oracle" / "bases" / "bert-tiny", attn_implementation="eager").eval()
    stored = torch.load(case / "checkpoint" / "pytorch_adapter.bin", weights_only=True)
    graft.attach(model, {"a": {"kind": "reft", "form": form, "rank": 2, "prefix": prefix, "suffix": suffix}})
    with torch.no_grad():
        for name, tensor in tensors(model, state_of(model), "a"):
            layer, number, own = re.search(r"layer\.(\d+)\.layer\.units\.(\d)\.(.*)$", name).groups()  # pyright: ignore
            unit = f"bert.encoder.layer.{layer}.reft_layer.refts.fx.units.{number}"
            if own != "R":
                tensor.copy_(stored[f"{unit}.learned_source.{own.removeprefix('W.')}"])
            elif form == "loreft":
                tensor.copy_(orthogonal_weight(stored, unit))
            else:
                tensor.copy_(stored[f"{unit}.projection.weight"])
    expected = load_file(case / "expected.safetensors")
    mask = expected[f"{batch}.attention_mask"]
    got = model(input_ids=expected[f"{batch}.input_ids"], attention_mask=mask).last_hidden_state
    wanted = expected[f"{batch}.last_hidden_state"]
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=0)


def test_orthonormal_rows_stay_and_others_become_so() -> None:
    free = torch.randn(3, 16, dtype=torch.float64)
    R = orthonormal_rows(free)
    torch.testing.assert_close(R @ R.t(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(orthonormal_rows(R), R)
    torch.testing.assert_close(R[0], free[0] / free[0].norm())


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_padding_on_either_side_changes_nothing() -> None:
    model = llama()
    graft.attach(model, {"a": graft.ReFT(rank=2, prefix=2, suffix=1)})
    ids = torch.tensor([[5, 6, 7, 8]])
    alone = model(ids).logits
    zeros = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.ones_like(ids)
    left = model(torch.cat([zeros, ids], 1), attention_mask=torch.cat([zeros, mask], 1),
                 position_ids=torch.tensor([[0, 0, 0, 0, 1, 2, 3]])).logits[:, 3:]  # fmt: skip
    right = model(torch.cat([ids, zeros], 1), attention_mask=torch.cat([mask, zeros], 1)).logits[:, :4]
    torch.testing.assert_close(left, alone)
    torch.testing.assert_close(right, alone)


def test_decoding_with_a_cache_intervenes_in_the_prompt_alone() -> None:
    model = llama()
    graft.attach(model, {"a": graft.ReFT(rank=2, prefix=1, suffix=1)})
    ids = torch.tensor([[5, 6, 7, 8]])
    out = model(ids, use_cache=True)
    step = model(torch.tensor([[9]]), past_key_values=out.past_key_values).logits
    graft.detach(model)
    plain = model.lm_head(model.model.norm(torch.zeros(1, 1, 16)))
    assert step.shape == plain.shape and not torch.allclose(step, plain)


def test_no_positions_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token would be changed"):
        graft.ReFT(prefix=0, suffix=0)


def test_a_rank_beyond_the_hidden_size_is_an_error() -> None:
    with pytest.raises(graft.GraftError, match="rank 17 is more than the 16 dimensions"):
        graft.attach(llama(), {"a": graft.ReFT(rank=17)})
