"""Answers while training: at each validation a job answers some of its validation questions, by the model as it trains.

A caller says how answers are judged, since judging belongs to evaluation, of which training knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from graft.bases import Base
from graft.data.samples import Example
from graft.errors import GraftError
from graft.generation.generate import generate
from graft.generation.requests import Decoding, Request
from graft.training.assembly import JobParts, RunParts
from graft.training.ends import prompt_of
from graft.training.forward.modes import evaluating
from graft.training.job import Job

Right = Callable[[str, str], bool]
"""Whether an answer, the second text, is right by the reference, the first one."""
Judge = Callable[[str, Sequence[str]], Right]
"""Makes it of `eval.metric` and all references."""


def scores_of_answers(parts: RunParts, job: Job, judge: Judge | None) -> dict[str, float]:
    """Return `answer_accuracy`, the share of the first `train.answers` validation questions that a job answers rightly; {} where it is not
    asked for.

    Raises `GraftError` without a judge, and for validation data without questions.
    """
    part = parts.of(job)
    if part.config.train.answers is None or job.validation is None:
        return {}
    if judge is None:
        raise GraftError("train.answers needs a judge of answers, which this caller of the training does not give")
    asked = [example for example in islice(job.validation, part.config.train.answers) if prompt_of(example)]
    if not asked:
        raise GraftError(
            "train.answers: the validation data hold texts without a question, so there is nothing to answer"
        )
    return {"answer_accuracy": _share(parts, part, asked, judge)}


def _share(parts: RunParts, part: JobParts, asked: Sequence[Example], judge: Judge) -> float:
    job, settings = part.job, part.config.eval
    pairs = answers(
        parts.base, asked, job.trainable.adapter, job.stop_ids, settings.max_new_tokens, settings.token_budget
    )
    right = judge(settings.metric, [reference for reference, _ in pairs])
    return sum(right(reference, answer) for reference, answer in pairs) / len(pairs)


def answers(
    base: Base, asked: Sequence[Example], adapter: str | None, stop_ids: frozenset[int], most: int, token_budget: int
) -> list[tuple[str, str]]:
    """Let the model as it is answer samples greedily; (the right answer, the model's) of each. most: new tokens of an answer."""
    tokenizer = base.tokenizer
    requests = [Request(prompt_of(example), adapter, stop_ids) for example in asked]
    with evaluating(base.model):
        written = dict(generate(base.model, requests, Decoding(most), token_budget=token_budget))
    references = [tokenizer.decode(_answer_ids(each, stop_ids), skip_special_tokens=True) for each in asked]
    return [
        (reference, tokenizer.decode(written[at].ids, skip_special_tokens=True))
        for at, reference in enumerate(references)
    ]


def _answer_ids(example: Example, stop_ids: frozenset[int]) -> list[int]:
    ids = example.input_ids[len(prompt_of(example)) :].tolist() if example.answer is None else list(example.answer)
    return [token for token in ids if token not in stop_ids]
