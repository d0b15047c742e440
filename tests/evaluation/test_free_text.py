"""Scores of free text against the libraries' own."""

from __future__ import annotations

import pytest

from graft.errors import MissingExtra
from graft.evaluation import free_text
from graft.evaluation.free_text import bleu_scores, require_text_libraries, rouge_scores

ANSWERS = ["The cats sat on the mat.", "<think>rain?</think>It rained all day in Paris", "no idea"]
RIGHT = ["The cat sat on a mat.", "It rained all day in Rome.", "He went home."]


def test_rouge_and_bleu_are_the_libraries_own_without_thoughts() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    sacrebleu = pytest.importorskip("sacrebleu")
    texts = [ANSWERS[0], "It rained all day in Paris", ANSWERS[2]]
    found = rouge_scores(ANSWERS, RIGHT)
    for name in ("rouge1", "rougeL"):
        own = [scorer.score(right, text)[name].fmeasure for right, text in zip(RIGHT, texts, strict=True)]
        assert found[name] == pytest.approx(100 * sum(own) / 3)
        assert found[f"{name}_interval"][0] <= found[name] <= found[f"{name}_interval"][1]
    assert bleu_scores(ANSWERS, RIGHT)["text_bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(texts, [RIGHT], lowercase=True).score
    )


def test_a_missing_library_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, extra: str) -> None:
        raise MissingExtra(module, extra)

    monkeypatch.setattr(free_text, "require", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'graft-llm\[eval\]'"):
        require_text_libraries()
