"""Evaluate on pairs of answers: does a candidate prefer the chosen answer to the rejected one?

Both answers of a pair are scored by their summed log-probability under every candidate and, for adapters, under the bare base.

- `accuracy` is the share of pairs in which the chosen answer is likelier per token. The bare base has one too.
- `gained` is the share of pairs in which the adapter raised the chosen answer by more than the rejected one, relative to the
  base. It is the reward accuracy of DPO.
- `margin` is the mean of that difference, in nats.

If a pair has log-probabilities (-4, -6) under the adapter and (-5, -5) under the base, the chosen answer gained 1, the
rejected one lost 1, and the margin is 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.bases.context import context_length
from graft.data.pair_shapes import SIDES
from graft.data.pairs import tokenize_pair
from graft.data.report import conversation_key
from graft.data.samples import Example, Sample
from graft.errors import GraftError
from graft.evaluation.answering import (
    Item,
    Line,
    answer_line,
    describe_evaluation,
    judgement,
    questions,
    result_folder,
    write_result,
)
from graft.evaluation.journal import Journal
from graft.evaluation.protocols.base import Judgement
from graft.evaluation.scoring import count_outcomes
from graft.generation.loaded import Candidate, LoadedModel
from graft.generation.loss import sample_losses

UNLIMITED = 2**31
BaseScores = dict[tuple[str, int], tuple[float, float]]
"""(digest of the template, number of the pair) -> log-probabilities of both answers under the bare base."""


def evaluate_preferences(
    loaded: LoadedModel,
    task: str,
    samples: Sequence[Sample],
    out: Path | None,
    *,
    token_budget: int,
    overwrite: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """Score all pairs under all candidates. Pairs with two equal answers or an empty one are left out, and their number is kept.

    out: folder of results, in which the evaluation has a folder of its own (None: nothing is written). facts: further entries
    of the result. Returns the content of result.json and, under `folder`, its folder.
    Raises `GraftError` if no pair is left.
    """
    usable = [sample for sample in samples if _is_usable(sample)]
    if not usable:
        raise GraftError(f"{task}: no pair has two different answers, so there is nothing to compare")
    items = [
        Item(number, sample.source, sample.row, sample.messages[: sample.asked], _answer(sample.messages), "chosen")
        for number, sample in enumerate(usable, start=1)
    ]
    digest = hashlib.sha256(json.dumps([conversation_key(sample) for sample in usable]).encode()).hexdigest()[:16]
    templates = sorted({candidate.template.digest[:16] for candidate in loaded.candidates})
    protocol = {"name": "preference", "data": digest, "rows": len(items), "templates": templates}
    header = describe_evaluation(loaded, task, protocol)
    folder = result_folder(out, task, header["protocol_hash"])
    of_base: BaseScores = {}
    with Journal(folder, header, questions(items), overwrite=overwrite, group=loaded.group) as journal:
        for candidate in loaded.candidates:
            left = [at for at, item in enumerate(items) if (candidate.name, item.number) not in journal.answers]
            found = _judge_pairs(loaded, candidate, {at: usable[at] for at in left}, token_budget, of_base)
            for at, (judged, scores) in found.items() if loaded.group.leads else ():
                line = answer_line(candidate, items[at], judged.extracted or "", judged, None, None)
                journal.append({**line, **scores})
        journal.complete()
        return write_result(
            loaded, items, header, journal, _score, self_checked=None, left_out=len(samples) - len(usable), **facts
        )


def _is_usable(sample: Sample) -> bool:
    """Whether a pair has two different answers, neither of them empty."""
    sides = (sample.messages, sample.rejected)
    return sides[0] != sides[1] and all(_answer(side).strip() for side in sides)


def _answer(messages: Sequence[Any]) -> str:
    return messages[-1]["content"]


def _judge_pairs(
    loaded: LoadedModel, candidate: Candidate, samples: Mapping[int, Sample], token_budget: int, of_base: BaseScores
) -> dict[int, tuple[Judgement, dict[str, Any]]]:
    """Return the judgement and the scores of each pair under one candidate. A pair that exceeds the context is `no_room`.

    of_base: scores of the bare base. They are computed once per template and added here, because several adapters need them.
    """
    room = context_length(loaded.base.model, candidate.adapter) or UNLIMITED
    template: Any = candidate.template
    found: dict[int, tuple[Judgement, dict[str, Any]]] = {at: (Judgement(None, "no_room"), {}) for at in samples}
    pairs: dict[int, Example] = {}
    for at, sample in samples.items():
        made = tokenize_pair(sample, loaded.base.tokenizer, template, max_length=room, overlong="drop")
        if isinstance(made, Example):
            pairs[at] = made
    # Score in one go what is missing of the base, and everything of the adapter.
    known = {at for at in pairs if (template.digest, at) in of_base}
    asked: list[tuple[int, str | None]] = [(at, None) for at in pairs if at not in known]
    if candidate.adapter is not None:
        asked += [(at, candidate.adapter) for at in pairs]
    logps_of = dict(zip(asked, _log_probabilities(loaded, pairs, asked, token_budget), strict=True))
    of_base.update({(template.digest, at): logps for (at, name), logps in logps_of.items() if name is None})
    for at, example in pairs.items():
        base = of_base[template.digest, at]
        chosen, rejected = logps_of[at, candidate.adapter] if candidate.adapter is not None else base
        scores: dict[str, Any] = {"logp_chosen": chosen, "logp_rejected": rejected}
        if candidate.adapter is not None:
            scores["margin"] = chosen - rejected - base[0] + base[1]
        # Divide by the number of tokens, because a longer answer is less likely as a whole.
        counts = [sequence.num_targets for sequence in example.sequences]
        right = chosen / counts[0] > rejected / counts[1]
        found[at] = Judgement("chosen" if right else "rejected", "correct" if right else "wrong"), scores
    return found


def _log_probabilities(
    loaded: LoadedModel, pairs: Mapping[int, Example], asked: Sequence[tuple[int, str | None]], token_budget: int
) -> list[tuple[float, float]]:
    """Return the log-probabilities of the chosen and the rejected answer for each (pair, adapter) in `asked`."""
    sequences = [sequence for at, _ in asked for sequence in pairs[at].sequences]
    names = [name for _, name in asked for _ in SIDES]
    losses = sample_losses(loaded.base.model, sequences, names, token_budget=token_budget, group=loaded.group)
    return [(-losses[place], -losses[place + 1]) for place in range(0, len(losses), len(SIDES))]


def _score(candidate: Candidate, lines: list[Line]) -> dict[str, Any]:
    scores = dict(count_outcomes([judgement(line) for line in lines]))
    margins = [line["margin"] for line in lines if "margin" in line]
    if margins:
        gained = sum(margin > 0 for margin in margins) / len(margins)
        scores |= {"gained": gained, "margin": sum(margins) / len(margins)}
    return scores
