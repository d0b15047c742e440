"""The check of log-likelihoods before choices are ranked; that of generation is tested beside generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graft
from graft.errors import GraftError
from graft.generation.likelihood import tokenize_pairs
from graft.generation.selfcheck import likelihood_check
from tests.small import small_model, small_tokenizer

QUESTIONS = [[("Why? " * number, " yes"), ("Why? " * number, " not at all" * number)] for number in range(1, 13)]


def examples() -> list[Any]:
    return [tokenize_pairs(small_tokenizer(), question) for question in QUESTIONS]


def test_eight_questions_of_all_lengths_and_adapters_are_compared() -> None:
    model = small_model(context=150)
    graft.attach(model, {"one": graft.LoRA(rank=2), "two": graft.Prefix(tokens=3)})
    with torch.no_grad():
        for name in ("one", "two"):
            for _, parameter in graft.parameters(model, name):
                parameter.normal_(std=0.3)
    asked = examples()
    assert likelihood_check(model, asked, [None] * 12) == 8
    assert likelihood_check(model, asked * 2, ["one"] * 12 + ["two"] * 12) == 8
    assert likelihood_check(model, asked[-1:], [None]) == 0, "a question that does not fit proves nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_batch_that_see_each_other_are_found_in_any_precision(dtype: torch.dtype) -> None:
    model = small_model("llama").to(dtype)
    asked = examples()
    assert likelihood_check(model, asked, [None] * 12) == 8
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda hidden: forward(hidden) + hidden.mean(0, keepdim=True) * (hidden.shape[0] > 1)
    with pytest.raises(GraftError, match="batched likelihoods are wrong for this model: a choice of .*the base"):
        likelihood_check(model, asked, [None] * 12)
