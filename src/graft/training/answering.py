"""Answers while training: at each validation a job answers some of its validation questions, by the model as it trains.

A caller says how answers are judged, since judging belongs to evaluation, of which training knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

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
    job, tokenizer, settings = part.job, parts.base.tokenizer, part.config.eval
    references = [tokenizer.decode(_answer_ids(example, job), skip_special_tokens=True) for example in asked]
    right = judge(settings.metric, references)
    requests = [Request(prompt_of(example), job.trainable.adapter, job.stop_ids) for example in asked]
    correct = 0
    with evaluating(parts.base.model):
        for number, answer in generate(
            parts.base.model, requests, Decoding(settings.max_new_tokens), token_budget=settings.token_budget
        ):
            correct += right(references[number], tokenizer.decode(answer.ids, skip_special_tokens=True))
    return correct / len(asked)


def _answer_ids(example: Example, job: Job) -> list[int]:
    ids = example.input_ids[len(prompt_of(example)) :].tolist() if example.answer is None else list(example.answer)
    return [token for token in ids if token not in job.stop_ids]
