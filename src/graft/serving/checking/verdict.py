"""Compare a server with Graft itself, and name what is wrong with it.

Each fault is a hypothesis with numbers of its own: the adapter times a scale, without some of its sites, the base without it. What the
server says is compared with all of them, and the fault whose numbers are the server's is named. Prompts are asked in both orders, base
first and adapter first, since a cache that does not know the adapters shows in one order only.
"""

from __future__ import annotations

from collections.abc import Sequence

from graft.data.encoding import Span, encode
from graft.errors import GraftError
from graft.generation.loaded import LoadedModel
from graft.serving.checking.distance import Scores, distance
from graft.serving.checking.findings import Verdict
from graft.serving.checking.own import Own
from graft.serving.checking.prompts import PROBE, PROMPTS
from graft.serving.checking.remote import Refused, Remote
from graft.serving.checking.templates import check_chat, check_text

SLIGHT = 1e-3
"""Differences above this are more than rounding in float32 makes."""
SCALES = (2.0, 0.5, 4.0, 0.25, 0.125, 8.0, 0.75, 1.5, 0.0625, 16.0)
TOLERANCE = 0.05
"""Mean difference in nats that counts as equal, so that rounding in a low precision is no fault."""


def check_server(remote: Remote, loaded: LoadedModel, model: str, base_model: str | None) -> Verdict:
    """Compare a server's answers under the names of the adapter and of the base with Graft's own.

    Raises `GraftError` for a server that gives no log-probabilities, or does not answer.
    """
    own, verdict = Own(loaded), Verdict()
    prompts = [encode([Span(text)], own.tokenizer).ids for text in PROMPTS]
    ask = _Asker(remote, own, model, encode([Span(PROBE)], own.tokenizer).ids)
    ours = {None: ask.own(prompts, None), own.adapter: ask.own(prompts, own.adapter)}
    signal = verdict.distances["signal"] = distance(ours[None], ours[own.adapter])
    near = max(1e-4, min(TOLERANCE, signal / 4))
    if signal < 1e-3:
        verdict.notes.append(
            f"the adapter changes these prompts by {signal:.2g} nats only: whether it is applied cannot be told"
        )
    theirs, bases = _in_both_orders(ask, prompts, model, base_model)
    again = ask.server(model, prompts[1])
    if (moved := distance([again], [theirs[1]])) > near:
        verdict.add(
            "unsteady",
            f"the same prompt, asked twice, differs by {moved:.2g} nats: dropout is on, or rows of a batch see each other",
        )
        return verdict
    verdict.distances["adapter"] = distance(theirs, ours[own.adapter])
    if bases is None:
        verdict.notes.append("the server does not name the bare base (--base-model), so only the adapter was compared")
    else:
        verdict.distances["base"] = distance(bases, ours[None])
    _judge(ask, verdict, prompts, theirs, bases, ours[own.adapter], ours[None], near)
    most = max(value for name, value in verdict.distances.items() if name != "signal")
    if not verdict.faults and most > SLIGHT:
        verdict.notes.append(
            f"{most:.2g} nats apart: rounding in a lower precision explains that, or a base that is almost this one"
        )
    if not verdict.faults:
        check_text(remote, own, model, verdict, near)
    if not verdict.faults:
        check_chat(remote, own, model, verdict, near)
    return verdict


class _Asker:
    """Asks the server and Graft for the numbers of prompts."""

    def __init__(self, remote: Remote, own: Own, model: str, prompt: Sequence[int]) -> None:
        """Raises `GraftError` for a server that does not score prompts."""
        self.remote, self.names = remote, own
        said = ""
        try:
            if remote.scores(model, prompt) is not None:
                return
        except Refused as error:
            said = f" It says: {error}"
        raise GraftError(
            f"{remote.url} gives no log-probabilities of prompts (completions with echo, logprobs and token ids), so what it computes "
            f"cannot be compared with what it should.{said}"
        )

    def server(self, model: str, prompt: Sequence[int]) -> list[float]:
        return self.remote.scores(model, prompt) or []

    def own(self, prompts: Sequence[Sequence[int]], adapter: str | None) -> list[list[float]]:
        return self.names.scores(prompts, adapter)


def _in_both_orders(
    ask: _Asker, prompts: Sequence[Sequence[int]], model: str, base_model: str | None
) -> tuple[list[list[float]], list[list[float]] | None]:
    """Ask every prompt under both names: even ones of the base first, odd ones of the adapter first."""
    theirs, bases = [], []
    for number, prompt in enumerate(prompts):
        if base_model is None:
            theirs.append(ask.server(model, prompt))
            continue
        first, second = (base_model, model) if number % 2 == 0 else (model, base_model)
        found = {first: ask.server(first, prompt)}
        found[second] = ask.server(second, prompt)
        theirs.append(found[model])
        bases.append(found[base_model])
    return theirs, bases if base_model is not None else None


def _judge(
    ask: _Asker,
    verdict: Verdict,
    prompts: Sequence[Sequence[int]],
    theirs: Scores,
    bases: Scores | None,
    adapted: Scores,
    bare: Scores,
    near: float,
) -> None:
    """Name what is wrong with the numbers of the base and of the adapter."""
    after, before = slice(0, None, 2), slice(1, None, 2)  # the adapter was asked after the base, and before it
    fits = {
        where: distance(theirs[part], adapted[part]) <= near for where, part in (("after", after), ("before", before))
    }
    if bases is not None:
        base_first, base_second = distance(bases[after], bare[after]), distance(bases[before], bare[before])
        if (fits["before"] and not fits["after"]) or (base_first <= near < base_second):
            verdict.add(
                "stale-cache",
                "answers depend on who was asked before: a cache of prompts does not know which adapter they were read with",
            )
            return
        if base_first > near:
            _judge_base(ask, verdict, prompts, theirs, bases, adapted, near)
            return
    if all(fits.values()):
        return
    found = _nearest(ask, prompts, theirs, bare, near)
    if found is None:
        said = (
            "the base is right, and the adapter's numbers are neither the base's nor this adapter's at any scale or part"
            if bases is not None
            else "neither the base's nor this adapter's numbers"
        )
        verdict.add(
            "another-adapter", f"{said}: another adapter, other weights, or a kind that the server computes differently"
        )
    else:
        verdict.add(*found)


def _judge_base(
    ask: _Asker,
    verdict: Verdict,
    prompts: Sequence[Sequence[int]],
    theirs: Scores,
    bases: Scores,
    adapted: Scores,
    near: float,
) -> None:
    """Name what is wrong where the base's numbers are."""
    if distance(bases, adapted) > near:
        verdict.add("another-base", "the base's own numbers differ from this base's: other weights, or another model")
        return
    twice = ask.names.scaled(2.0)
    if twice is not None and distance(theirs, ask.own(prompts, twice)) <= near:
        verdict.add(
            "merged-twice", "the base answers with the adapter in it, and the adapter is applied to it once more"
        )
    else:
        verdict.add(
            "merged-into-base",
            "the base answers with the adapter in it: it was merged, and the bare base is not served",
        )


def _nearest(
    ask: _Asker, prompts: Sequence[Sequence[int]], theirs: Scores, bare: Scores, near: float
) -> tuple[str, str] | None:
    """Return the fault whose numbers are the server's: (its name, what it means); None if none are."""
    if distance(theirs, bare) <= near:
        return "not-applied", "the adapter's name answers with the bare base's numbers: the adapter is not applied"
    own = ask.names
    found: list[tuple[float, tuple[str, str]]] = []
    for what, name in own.parts():
        said = f"the numbers are those of the adapter without {what}: only a part of it is applied"
        found.append((distance(theirs, ask.own(prompts, name)), ("half-applied", said)))
    for scale in (*SCALES, *_stored_scales(own)):
        if (name := own.scaled(scale)) is not None:
            said = f"the adapter's effect is {scale:g} times what it should be: look at alpha / rank" + (
                ", or at a merge on top of it" if scale == 2 else ""
            )
            found.append((distance(theirs, ask.own(prompts, name)), ("wrong-scale", said)))
    apart, fault = min(found, default=(float("inf"), ("", "")))
    return fault if apart <= near else None


def _stored_scales(own: Own) -> list[float]:
    """Scales that come from a formula that was left out or taken for another: alpha, rank and root of rank."""
    settings = own.candidate.settings or {}
    rank, alpha = settings.get("rank"), settings.get("alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not alpha:
        return []
    right = alpha / rank
    return [value for value in (1 / right, alpha / rank**0.5 / right, alpha / right, 1 / rank / right) if value != 1]
