"""LoRA's relatives in compiled models: one full graph without a break serves all of them, every routing and the bare base.

PEFT's DoRA breaks the graph at every layer, and each switch of its adapters compiles anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import graft
from graft.attaching.active import set_trainable
from tests.contract.table import ids, pristine, randomise
from tests.contract.test_contract_compile import assert_same_everywhere

KINDS: dict[str, Any] = {
    "dora": graft.DoRA(rank=2),
    "pissa": graft.PiSSA(rank=2),
    "vera": graft.VeRA(rank=4),
    "adalora": graft.AdaLoRA(init_rank=3, target_rank=2),
    "loha": graft.LoHa(rank=2),
    "lokr": graft.LoKr(rank=1, decompose_both=True),
    "miss": graft.MiSS(rank=6),
    "bat": graft.MiSS(rank=8, variant="bat"),
    "hira": graft.HiRA(rank=2),
    "shira": graft.SHiRA(rank=2),
    "oft": graft.OFT(block_size=8),
    "oft-exact": graft.OFT(blocks=2, terms=None, coft=0.3),
}


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "sites"), [pytest.param("llama", "attn.k mlp.down", marks=pytest.mark.slow), ("gpt2", "attn.v")]
)
def test_one_full_graph_serves_all_relatives_and_every_routing(family: str, sites: str) -> None:
    model = copy.deepcopy(pristine(family, layers=1))
    graft.attach(model, {name: kind.model_copy(update={"sites": sites}) for name, kind in KINDS.items()})
    for number, name in enumerate(KINDS):
        randomise(model, name, number)
    set_trainable(model, tuple(KINDS))
    assert_same_everywhere(model, torch.compile(model, backend="aot_eager", fullgraph=True), ids(4), 2e-5)
