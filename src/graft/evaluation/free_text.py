"""Scores of free text against one right text per question: BLEU (sacrebleu) and ROUGE (rouge-score).

BLEU is that of the protocol `bleu`, in percent, of all answers together. ROUGE-1, ROUGE-2 and ROUGE-L are F-measures with
Porter's stemmer, in percent, as means over the answers; their intervals are bootstrap intervals of these means. Thoughts are no
part of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graft.errors import require
from graft.evaluation.metrics import bleu, bleu_metric
from graft.evaluation.reading.thoughts import without_thoughts
from graft.evaluation.statistics import bootstrap_interval, score_interval

ROUGE = ("rouge1", "rouge2", "rougeL")


def require_text_libraries() -> None:
    """Import the libraries, so that a missing one shows before an evaluation. Raises `MissingExtra`."""
    for name in ("sacrebleu", "rouge_score", "scipy.stats"):
        require(name, "eval")


def bleu_scores(answers: Sequence[str], right: Sequence[str]) -> dict[str, Any]:
    """Return the BLEU of all answers together and its interval (None for a single answer)."""
    texts = _answers(answers)
    interval = score_interval(bleu(texts, [(each,) for each in right]), len(texts)) if len(texts) > 1 else None
    score = bleu_metric().corpus_score(texts, [list(right)]).score
    return {"text_bleu": score, "text_bleu_interval": None if interval is None else list(interval)}


def rouge_scores(answers: Sequence[str], right: Sequence[str]) -> dict[str, Any]:
    """Return the mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L in percent, with their intervals."""
    scorer = require("rouge_score.rouge_scorer", "eval").RougeScorer(list(ROUGE), use_stemmer=True)
    scored = [scorer.score(reference, text) for text, reference in zip(_answers(answers), right, strict=True)]
    found: dict[str, Any] = {}
    for name in ROUGE:
        values = [100 * each[name].fmeasure for each in scored]
        found[name] = sum(values) / len(values)
        found[f"{name}_interval"] = list(bootstrap_interval(values))
    return found


def _answers(texts: Sequence[str]) -> list[str]:
    return [(without_thoughts(text) or "").strip() for text in texts]
