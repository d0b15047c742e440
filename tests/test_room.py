"""An adapter that no machine holds is refused before memory is spent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graft
from tests.small import small_model


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"kind": "lora", "rank": 10**12}, "would take 3,712,000.0 GB at 14 sites, but cpu has"),
        ({"kind": "lora", "rank": 2**62}, "too large to build"),
        ({"kind": "lora", "rank_pattern": {"attn.q": 10**13}}, "would take"),
        ({"kind": "prefix", "tokens": 10**13}, "would take"),
        ({"kind": "prefix", "tokens": 5, "projection": 10**13}, "would take"),
        ({"kind": "series", "bottleneck": 10**12}, "would take"),
        ({"kind": "compacter", "products": 10**6}, "would take"),
        ({"kind": "p-tuning", "hidden": 10**10}, "too large to build"),
        ({"kind": "adalora", "init_rank": 10**12}, "would take"),
        ({"kind": "mixture", "of": "lora", "experts": 10**9}, "would take"),
    ],
)
def test_what_no_machine_holds_is_refused(adapter: dict[str, Any], words: str) -> None:
    model = small_model("llama")
    with pytest.raises(graft.GraftError, match=words):
        graft.attach(model, {"a": adapter})
    assert not graft.names(model)


def test_asking_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    model = small_model("llama")
    torch.manual_seed(1)
    graft.attach(model, {"a": graft.LoRA()})
    first = next(p for name, p in graft.parameters(model, "a") if name.endswith("A"))
    torch.manual_seed(1)
    torch.nn.init.kaiming_uniform_(wanted := torch.empty_like(first), a=5**0.5)
    assert torch.equal(first, wanted)
