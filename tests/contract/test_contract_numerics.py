"""Points 8 and 12: dtypes, gradient checkpointing, padding on either side, attention backends."""

from __future__ import annotations

import pytest

from tests.contract.table import Row, check, rows


@rows(where=lambda row: row.causal)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(row: Row, side: str) -> None:
    check(f"padding_on_the_{side}", row)


@rows(where=lambda row: row.family == "bert")
def test_padding_on_the_right_changes_nothing_in_an_encoder(row: Row) -> None:
    check("padding_on_the_right", row)


@rows(
    where=lambda row: (
        row.family in ("llama", "qwen3", "gpt2") and any("attention" in part.takes for part in row.config.parts())
    )
)
def test_eager_and_sdpa_attention_agree(row: Row) -> None:
    check("attention_backends_agree", row)


@rows()
def test_bfloat16_is_as_close_to_float32_as_the_base_is(row: Row) -> None:
    check("bfloat16_is_close_to_float32", row)


@rows()
def test_checkpointing_gives_the_same_gradients_also_when_the_context_was_left(row: Row) -> None:
    check("checkpointing_gives_the_same_gradients", row)


@rows("llama-mam llama-lora bloom-prefix gptj-parallel-attn llama-hira-plain llama-oft-coft")
def test_reentrant_checkpointing_gives_the_same_gradients(row: Row) -> None:
    check("reentrant_checkpointing_gives_the_same_gradients", row)


@rows(
    "llama-lora-dropout llama-parallel-mam bloom-series-before-attn llama-dora-dropout llama-pissa-quick llama-adalora "
    "llama-miss llama-miss-bat llama-hira llama-shira llama-oft-exact"
)
def test_a_row_draws_the_same_dropout_in_any_company(row: Row) -> None:
    check("dropout_follows_the_row_seed", row)
