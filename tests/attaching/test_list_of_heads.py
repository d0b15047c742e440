"""A model of sound: it embeds and predicts several streams of tokens, so its embedding and its head are lists of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.training.forward.tasks import forward_of
from tests.architectures import build, tokens


@pytest.fixture(params=["musicgen", "musicgen_melody"])
def model(request: pytest.FixtureRequest) -> Any:
    made = build(request.param)
    assert isinstance(made.get_output_embeddings(), torch.nn.ModuleList)
    return made


def test_adapters_are_attached_saved_exported_and_read(model: Any, tmp_path: Path) -> None:
    graft.attach(model, {"a": graft.LoRA(rank=2, sites="attn.q attn.v")})
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.normal_()
        expected = model(input_ids=tokens()).logits
    graft.save(model, "a", tmp_path / "own")
    graft.export(model, "a", tmp_path / "peft")
    for folder in ("own", "peft"):
        graft.detach(model)
        graft.load(model, tmp_path / folder, name="a")
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens()).logits, expected)


def test_what_needs_one_head_or_one_embedding_says_so(model: Any) -> None:
    with pytest.raises(graft.GraftError, match="a list of 1 heads, one for each stream of tokens"):
        forward_of(model)
    with pytest.raises(graft.GraftError, match="site 'embed' matches nothing"):
        graft.attach(model, {"a": graft.PromptTuning(tokens=2)})
