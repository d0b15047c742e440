"""Pairs of answers: which one each contestant finds likelier, and which one its adapter gained more for.

Of each pair the summed log-probabilities of both answers are taken under every contestant and, of adapters, under the bare base.
`accuracy` is the share of pairs whose chosen answer is likelier per token than the rejected one, which the bare base has too; `gained` the
share in which it gained more over the base than the rejected one (the reward accuracy of DPO), and `margin` the mean of that difference,
in nats.
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
from graft.data.report import key_of
from graft.data.samples import Example, Sample
from graft.errors import GraftError
from graft.evaluation.answering import Item, Line, about, conclude, folder_of, judgement, line_of, questions
from graft.evaluation.journal import Journal
from graft.evaluation.protocols.base import Judgement
from graft.evaluation.scoring import outcomes
from graft.generation.loaded import Candidate, LoadedModel
from graft.generation.loss import sample_losses

UNLIMITED = 2**31
Known = dict[tuple[str, int], tuple[float, float]]
"""Log-probabilities of both answers under the bare base, by the template's digest and the place of the pair."""


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
    """Put all pairs before all contestants, and count. Pairs with two equal answers, or an empty one, are left out and counted.

    out: the folder that the result's own lies in (None: nowhere). facts: what else the result is to say.
    Returns what result.json holds, and its folder.
    """
    usable = [sample for sample in samples if _can_be_told_apart(sample)]
    if not usable:
        raise GraftError(f"{task}: no pair has two different answers")
    items = [
        Item(number, sample.source, sample.row, sample.messages[: sample.asked], _answer(sample.messages), "chosen")
        for number, sample in enumerate(usable, start=1)
    ]
    digest = hashlib.sha256(json.dumps([key_of(sample) for sample in usable]).encode()).hexdigest()[:16]
    templates = sorted({candidate.template.digest[:16] for candidate in loaded.candidates})
    protocol = {"name": "preference", "data": digest, "rows": len(items), "templates": templates}
    name = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
    head = about(loaded, task, protocol, name)
    of_base: Known = {}
    with Journal(folder_of(out, task, name), head, questions(items), overwrite=overwrite) as journal:
        for candidate in loaded.candidates:
            left = [at for at, item in enumerate(items) if (candidate.name, item.number) not in journal.answers]
            found = _judged(loaded, candidate, {at: usable[at] for at in left}, token_budget, of_base)
            for at, (judged, scores) in found.items():
                line = line_of(candidate, items[at], judged.extracted or "", judged, None, None)
                journal.append({**line, **scores})
        journal.sync()
        return conclude(
            loaded, items, head, journal, _score, self_checked=None, left_out=len(samples) - len(usable), **facts
        )


def _can_be_told_apart(sample: Sample) -> bool:
    sides = (sample.messages, sample.rejected)
    return sides[0] != sides[1] and all(_answer(side).strip() for side in sides)


def _answer(messages: Sequence[Any]) -> str:
    return messages[-1]["content"]


def _judged(
    loaded: LoadedModel, candidate: Candidate, samples: Mapping[int, Sample], token_budget: int, of_base: Known
) -> dict[int, tuple[Judgement, dict[str, Any]]]:
    """What a contestant says of each pair, and the numbers behind it; a pair that does not fit into the context has no room.

    of_base: what the bare base says of pairs, which is asked once for each template; filled here.
    """
    room = context_length(loaded.base.model, candidate.adapter) or UNLIMITED
    template: Any = candidate.template
    found: dict[int, tuple[Judgement, dict[str, Any]]] = {at: (Judgement(None, "no_room"), {}) for at in samples}
    pairs: dict[int, Example] = {}
    for at, sample in samples.items():
        made = tokenize_pair(sample, loaded.base.tokenizer, template, max_length=room, overlong="drop")
        if isinstance(made, Example):
            pairs[at] = made
    known = {at for at in pairs if (template.digest, at) in of_base}
    asked: list[tuple[int, str | None]] = [(at, None) for at in pairs if at not in known]
    if candidate.adapter is not None:
        asked += [(at, candidate.adapter) for at in pairs]
    said = dict(zip(asked, _log_probabilities(loaded, pairs, asked, token_budget), strict=True))
    of_base.update({(template.digest, at): logps for (at, name), logps in said.items() if name is None})
    for at, example in pairs.items():
        base = of_base[template.digest, at]
        chosen, rejected = said[at, candidate.adapter] if candidate.adapter is not None else base
        scores: dict[str, Any] = {"logp_chosen": chosen, "logp_rejected": rejected}
        if candidate.adapter is not None:
            scores["margin"] = chosen - rejected - base[0] + base[1]
        counts = [sequence.num_targets for sequence in example.sequences]
        right = chosen / counts[0] > rejected / counts[1]
        found[at] = Judgement("chosen" if right else "rejected", "correct" if right else "wrong"), scores
    return found


def _log_probabilities(
    loaded: LoadedModel, pairs: Mapping[int, Example], asked: Sequence[tuple[int, str | None]], token_budget: int
) -> list[tuple[float, float]]:
    """Of the chosen and of the rejected answer, for each pair and adapter that is asked."""
    sequences = [sequence for at, _ in asked for sequence in pairs[at].sequences]
    names = [name for _, name in asked for _ in SIDES]
    losses = sample_losses(loaded.base.model, sequences, names, token_budget=token_budget)
    return [(-losses[place], -losses[place + 1]) for place in range(0, len(losses), len(SIDES))]


def _score(candidate: Candidate, lines: list[Line]) -> dict[str, Any]:
    scores = dict(outcomes([judgement(line) for line in lines]))
    margins = [line["margin"] for line in lines if "margin" in line]
    if margins:
        gained = sum(margin > 0 for margin in margins) / len(margins)
        scores |= {"gained": gained, "margin": sum(margins) / len(margins)}
    return scores
