"""PEFT's folders of bases with added tokens, of tied tables, and of trained rows compute in Graft what they compute in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import graft
from tests.formats.peft_folders import llama, loaded, off, saved, small

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings", "ignore:.*weight tying", "ignore:Setting `save_embedding_layers`"
)
IDS = torch.tensor([[3, 64, 65, 9, 12, 64]])
BOTH = ["embed_tokens", "lm_head"]
CASES: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "saved by itself": (True, 2, {}),
    "saved by itself, untied": (False, 2, {}),
    "both whole": (True, 2, {"modules_to_save": BOTH}),
    "both whole, untied": (False, 2, {"modules_to_save": BOTH}),
    "both and layers whole": (True, 2, {"modules_to_save": ["o_proj", *BOTH]}),
    "head whole": (True, 2, {"modules_to_save": ["lm_head"]}),
    "rows": (True, 2, {"trainable_token_indices": [64, 65]}),
    "rows, untied": (False, 2, {"trainable_token_indices": [64, 65]}),
    "rows of the head": (True, 2, {"trainable_token_indices": {"lm_head": [65, 3]}}),
    "equal rows of both": (True, 2, {"trainable_token_indices": {"embed_tokens": [64, 65], "lm_head": [64, 65]}}),
    "other rows of the head": (True, 2, {"trainable_token_indices": {"embed_tokens": [64, 65], "lm_head": [65, 9]}}),
    "another order of the head": (True, 2, {"trainable_token_indices": {"embed_tokens": [64, 65], "lm_head": [65, 64]}}),
    "other rows, untied": (False, 2, {"trainable_token_indices": {"lm_head": [65, 9, 3], "embed_tokens": [64]}}),
    "lora on the embedding": (False, 2, {"target_modules": ["q_proj", "embed_tokens"]}),
    "lora on the head": (True, 2, {"target_modules": ["q_proj", "lm_head"]}),
    "whole embedding, kept tied": (True, 2, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "lora on the embedding, kept tied": (True, 2, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "lora on the head, kept tied": (True, 0, {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "lora by a pattern, kept tied": (True, 0, {"target_modules": ".*q_proj|embed_tokens", "ensure_weight_tying": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tables", [False, True])
def test_tables_compute_what_they_compute_in_peft(name: str, tables: bool, tmp_path: Path) -> None:
    tied, added, settings = CASES[name]
    ids = IDS if added else IDS % 60
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    want = saved(llama(tied, added), config, tmp_path / "a", 0.05, ids, save_embedding_layers=tables or "auto")
    assert off(loaded(llama(tied, added), tmp_path / "a", ids), want) < 1e-5


BOTH_TABLES = {"token_indices": [3], "target_modules": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("settings", "tied"), [({"token_indices": [5, 3]}, True), ({"token_indices": [5, 3]}, False), (BOTH_TABLES, False)]
)
def test_trained_tokens_as_a_kind_of_their_own(settings: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    want = saved(llama(tied), peft.TrainableTokensConfig(**settings), tmp_path / "a")
    assert off(loaded(llama(tied), tmp_path / "a"), want) < 1e-5


@pytest.mark.parametrize("made", [
    small(T5Config, T5ForConditionalGeneration, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=48, decoder_start_token_id=0),
    small(BartConfig, BartForConditionalGeneration, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
          decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48),
])  # fmt: skip
def test_rows_of_an_encoder_decoder_are_trained_wherever_its_table_is_used(made: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=r".*\.(q|q_proj)", trainable_token_indices=[4, 9])
    want = saved(made(), config, tmp_path / "a")
    assert off(loaded(made(), tmp_path / "a"), want) < 1e-5


def test_the_base_that_lacks_the_rows_is_named_with_the_cure(tmp_path: Path) -> None:
    saved(llama(True, 2), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[64, 65]), tmp_path / "a")
    model = llama(True)
    with pytest.raises(graft.GraftError, match="rows of tokens 64, 65.*has 64 rows.*resize=True"):
        graft.load(model, tmp_path / "a")
    assert not graft.names(model)
