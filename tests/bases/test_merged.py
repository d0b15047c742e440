"""Merging an adapter of a table that other layers share: the merged model loads again with the adapter's own logits, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import graft
from graft.bases.loading import Base
from graft.bases.merged import MergeReport, write_merged
from tests.small import small_config, small_tokenizer

FULL = {"kind": "full", "sites": "embed head"}
LORA = {"kind": "lora", "rank": 2}


def tied(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "t5":
            sizes: Any = {"vocab_size": 258, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
            config = transformers.T5Config(**sizes, **{"decoder_start_token_id": 0})
            return transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)
        if family == "gemma2":
            config = transformers.Gemma2Config(
                **{**small_config("llama").to_dict(), "tie_word_embeddings": True, "head_dim": 8}
            )
        else:
            config = small_config(family, tie_word_embeddings=True)
        return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def merged(family: str, adapter: Any, folder: Path) -> tuple[MergeReport, Any]:
    model: Any = tied(family)
    graft.attach(model, {"a": adapter})
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    task = "seq2seq" if family == "t5" else "causal"
    base = Base(model, small_tokenizer(), family, torch.device("cpu"), torch.float32, task)
    report = write_merged(base, "a", [[5, 6, 7, 8], [9, 10, 11]], folder)
    return report, type(tied(family)).from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "t5"])
@pytest.mark.parametrize(
    "adapter",
    [FULL, {**FULL, "sites": "head embed"}, {**FULL, "tokens": [5, 6, 7]}, [{**LORA, "sites": "linear"}, FULL]],
    ids=["embed head", "head embed", "rows", "beside lora"],
)
def test_one_difference_of_a_table_and_its_head_merges_and_they_stay_one_weight(
    family: str, adapter: Any, tmp_path: Path
) -> None:
    report, plain = merged(family, adapter, tmp_path / "to")
    assert report.max_difference < 1e-4 and report.untied == ()
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert not torch.equal(plain.get_input_embeddings().weight, tied(family).get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("adapter", "untied"),
    [
        ([{**LORA, "sites": "head"}, FULL], 2),
        ([FULL, {**LORA, "sites": "embed"}], 2),
        ({**LORA, "sites": "embed head"}, 2),
        ([{**LORA, "sites": "embed"}, {**FULL, "tokens": [5, 6]}], 2),
        ({**FULL, "sites": "head"}, 1),
        ({**FULL, "sites": "embed"}, 1),
    ],
    ids=["lora at head", "lora at embed", "two loras", "lora and rows", "head", "embed"],
)
def test_a_table_and_a_head_that_change_otherwise_get_a_weight_each(
    family: str, adapter: Any, untied: int, tmp_path: Path
) -> None:
    report, plain = merged(family, adapter, tmp_path / "to")
    assert report.max_difference < 1e-4 and len(report.untied) == untied
    assert not plain.config.tie_word_embeddings
    assert not torch.equal(plain.get_output_embeddings().weight, plain.get_input_embeddings().weight)
    model = tied(family)
    graft.attach(model, {"a": adapter})
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    with pytest.raises(graft.GraftError, match="shares its weight with"):
        graft.merge(model, "a")
