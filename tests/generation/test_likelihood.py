"""Likelihoods of texts against transformers one at a time, and against lm-eval."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graft
from graft.errors import GraftError
from graft.evaluation import protocols, tasks
from graft.evaluation.protocols import RankProtocol
from graft.evaluation.scoring import score_rankings
from graft.generation.likelihood import log_likelihoods
from tests.small import small_model, small_tokenizer

PAIRS = [
    ("Question: why?\nAnswer:", " because"),
    ("Once upon a time there was", " a very small cat that sat."),
    ("x", " y"),
    ("Question: why?\nAnswer:", " </s> is a word"),
]


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_batches_and_adapters_change_no_likelihood(family: str) -> None:
    model, tokenizer = small_model(family), small_tokenizer()

    def reference(context: str, text: str) -> float:
        joined = tokenizer(context + text, split_special_tokens=True)["input_ids"]
        behind = tokenizer(text, split_special_tokens=True)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([joined])).logits[0].log_softmax(-1)
        first = len(joined) - len(behind)
        return sum(float(logits[first + place - 1, token]) for place, token in enumerate(behind))

    base = [reference(*pair) for pair in PAIRS]
    graft.attach(model, {"math": graft.LoRA(rank=4)})
    torch.manual_seed(0)
    for _, parameter in graft.parameters(model, "math"):
        torch.nn.init.normal_(parameter, std=0.3)
    with graft.use(model, "math"):
        adapted = [reference(*pair) for pair in PAIRS]
    assert all(abs(a - b) > 0.1 for a, b in zip(base, adapted, strict=True))
    adapters = [None, "math"] * len(PAIRS)
    pairs = [pair for pair in PAIRS for _ in range(2)]
    wanted = [value for both in zip(base, adapted, strict=True) for value in both]
    for budget in (1, 10_000):
        assert log_likelihoods(model, tokenizer, pairs, adapters, token_budget=budget) == pytest.approx(
            wanted, abs=2e-3
        )


def test_a_pair_that_does_not_fit_has_none_and_an_empty_text_is_refused() -> None:
    model, tokenizer = small_model(context=32), small_tokenizer()
    found = log_likelihoods(model, tokenizer, [("x" * 40, " y"), ("x", " y")], [None, None])
    assert found[0] is None and found[1] is not None
    with pytest.raises(GraftError, match="a text needs tokens"):
        log_likelihoods(model, tokenizer, [("x", "")], [None])


def test_a_benchmark_is_ranked_from_rows_to_score() -> None:
    task = tasks.get("piqa")
    rank = protocols.get("rank", task)
    assert isinstance(rank, RankProtocol)
    rows = [{"goal": f"goal {row}", "sol1": "a pin", "sol2": "wood" * row, "label": row % 2} for row in range(1, 9)]
    records = [task.record(row, "rows", number) for number, row in enumerate(rows, start=1)]
    model, tokenizer = small_model(context=48), small_tokenizer()
    rankings = []
    for record in records:
        asked = [(each.context, each.text) for each in rank.continuations(task, record)]
        rankings.append(rank.rank(task, record, log_likelihoods(model, tokenizer, asked, [None] * len(asked))))
    found = score_rankings(rankings)
    assert found["no_room"] == sum(len(f"Question: goal {row}\nAnswer: {'wood' * row}") > 48 for row in range(1, 9)) > 0
    assert found["correct"] + found["wrong"] + found["no_room"] == found["total"] == 8
    assert found["accuracy"] == found["correct"] / 8
    assert 0 <= found["normalised"]["accuracy"] <= 1


@pytest.mark.slow
def test_likelihoods_are_those_of_lm_eval(shared: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval comes with graft-llm[eval]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert lm_eval is not None
    folder = str(shared / "models" / "stories-260k")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS[:3]]
    wanted = [value for value, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    assert log_likelihoods(model, tokenizer, PAIRS[:3], [None] * 3) == pytest.approx(wanted, abs=1e-3)
