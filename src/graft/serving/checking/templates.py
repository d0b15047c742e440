"""Whether a server makes the same tokens of a text, and of a conversation, as Graft does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from graft.data.builtin_templates import BUILTIN_TEMPLATES
from graft.data.chat import ChatTemplate
from graft.data.encoding import Span, encode
from graft.data.samples import Message
from graft.errors import GraftError
from graft.serving.checking.distance import distance
from graft.serving.checking.findings import Verdict
from graft.serving.checking.own import Own
from graft.serving.checking.prompts import PROMPTS
from graft.serving.checking.remote import Refused, Remote

TEXTS = PROMPTS[:4]
CLEARLY, ROUNDING = 0.2, 1e-4
"""A wrong prompt is named if it is this much nearer to the server's numbers than the right one, which is further away than rounding."""
Wrong = tuple[str, str, list[list[int]]]
"""Short name of a fault, what it means, and the prompts that it makes."""


def check_text(remote: Remote, own: Own, model: str, verdict: Verdict, near: float) -> None:
    """Compare prompts that are sent as text: the server's tokenizer makes the tokens, and BOS."""
    theirs = [remote.scores(model, text) or [] for text in TEXTS]
    ids = [encode([Span(text)], own.tokenizer).ids for text in TEXTS]
    apart = lambda prompts: distance(theirs, own.scores(prompts, own.adapter))  # noqa: E731
    right = apart(ids)
    if (found := _named(apart, right, _starts(own, ids))) is not None:
        verdict.add(found[0], f"prompts that are sent as text {found[1]}")
    elif right > near:
        verdict.add("tokenizer", "prompts that are sent as text become other tokens than with this base's tokenizer")


def check_chat(remote: Remote, own: Own, model: str, verdict: Verdict, near: float) -> None:
    """Compare the first token of answers to questions: the server's chat template makes the prompt."""
    try:
        given = [remote.first_chat_token(model, text) for text in TEXTS]
    except Refused as error:
        verdict.notes.append(f"chat was not compared: {str(error)[:200]}")
        return
    if None in given:
        verdict.notes.append("chat was not compared: its answers carry no top_logprobs")
        return

    def apart(prompts: Sequence[Sequence[int]]) -> float:
        pairs = [
            own.pairs(each or {}, own.first_token(prompt, own.adapter))
            for each, prompt in zip(given, prompts, strict=True)
        ]
        return distance([pair[0] for pair in pairs], [pair[1] for pair in pairs])

    template = own.candidate.template
    right = [template.prompt_ids(_question(text), own.tokenizer) for text in TEXTS]
    verdict.distances["chat"] = apart(right)
    if (found := _named(apart, verdict.distances["chat"], (*_starts(own, right), *_templates(own, right)))) is not None:
        verdict.add(found[0], f"questions {found[1]}")
    elif verdict.distances["chat"] > near:
        said = f"is not what the adapter's template ({template.name}) writes, nor one that is known here"
        verdict.add("template", f"the prompt of a chat {said}")


def _named(apart: Callable[[Sequence[Sequence[int]]], float], right: float, wrong: Iterable[Wrong]) -> Wrong | None:
    """Return the wrong prompts whose numbers are the server's, None if the right ones are as near as any. right: how far those are."""
    if right <= ROUNDING:
        return None
    nearest = min(((apart(each[2]), each) for each in wrong), key=lambda pair: pair[0], default=None)
    return nearest[1] if nearest is not None and nearest[0] < CLEARLY * right else None


def _question(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _starts(own: Own, prompts: Sequence[Sequence[int]]) -> Iterator[Wrong]:
    """Yield prompts with another start: without BOS, or with one too many."""
    bos = own.tokenizer.bos_token_id
    if bos is None:
        return
    if all(each[:1] == [bos] for each in map(list, prompts)):
        yield "bos-missing", "begin without BOS", [list(each[1:]) for each in prompts]
        yield "bos-twice", "begin with BOS twice", [[bos, *each] for each in prompts]
    else:
        yield "bos-added", "begin with BOS, which this tokenizer does not write", [[bos, *each] for each in prompts]


def _templates(own: Own, right: Sequence[Sequence[int]]) -> Iterator[Wrong]:
    """Yield the prompts of other templates: the base's own, the built-in ones, and the adapter's without the mark of an answer."""
    others = dict(BUILTIN_TEMPLATES)
    if getattr(own.tokenizer, "chat_template", None):
        others["base's chat"] = ChatTemplate.of(own.tokenizer.chat_template, own.tokenizer)  # pyright: ignore
    for name, template in others.items():
        try:
            prompts = [list(template.prompt_ids(_question(text), own.tokenizer)) for text in TEXTS]
        except GraftError:
            continue
        if prompts != [list(each) for each in right]:
            yield (
                "template",
                f"are asked with the {name} template, and not with the adapter's ({own.candidate.template.name})",
                prompts,
            )
