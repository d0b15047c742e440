"""Token-flat attention leaves modules as it found them, and works in double precision."""

from __future__ import annotations

import pytest
import torch

import graft
from graft.attaching.active import running
from graft.attention import flat_attention
from graft.attention.functions import attend
from graft.routing.context import ForwardContext
from tests.small import small_model

IDS = torch.tensor([[5, 9, 30, 7, 5, 11, 40]])


@pytest.mark.parametrize("family", ["gptj", "bloom"])
def test_an_attention_module_that_hosts_an_adapter_serves_on_after_flat_batches(family: str) -> None:
    model = small_model(family)
    graft.attach(model, {"a": graft.Parallel(sites="attn", init="bert")})
    with torch.no_grad():
        before = model(IDS).logits
        with flat_attention(model):
            pass
        assert torch.equal(model(IDS).logits, before)
    graft.detach(model)


def test_a_prefix_runs_flat_in_double_precision() -> None:
    model = small_model("llama").double()
    graft.attach(model, {"p": graft.Prefix(tokens=3, init_std=1.0)})
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with torch.no_grad():
        alone = torch.cat([model(part).logits for part in IDS.split([4, 3], 1)], 1)
        with flat_attention(model), running(model, ForwardContext("p", lengths=(4, 3), flat=True)):
            flat = model(IDS, position_ids=positions, attention_mask=torch.zeros(1, 1, 1, 1), use_cache=False).logits
    torch.testing.assert_close(flat, alone, atol=1e-10, rtol=0)


def test_a_prefix_in_rows_packed_for_flash_attention_is_refused() -> None:
    model = small_model("llama")
    graft.attach(model, {"p": graft.Prefix(tokens=3)})
    module = model.model.layers[0].self_attn
    heads = torch.zeros(1, 4, 7, 8)
    with pytest.raises(graft.GraftError, match="packed need attention sdpa"):
        attend(module, "flash_attention_2", heads, heads, heads, None, cu_seq_lens_k=torch.tensor([0, 4, 7]))
