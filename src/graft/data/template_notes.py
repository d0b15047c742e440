"""Notes on what a template makes of the data: what its reader should know before training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from graft.config.data import DataConfig
from graft.data.chat import ANSWERED, ASKED, ChatTemplate
from graft.data.encoding import TokenizerFacts, facts_of
from graft.data.samples import Sample, without_end
from graft.data.template import Template
from graft.errors import listed


def template_notes(samples: Sequence[Sample], config: DataConfig, template: Template, tokenizer: Any) -> list[str]:
    """Return the notes on these training samples under a template, one sentence or two each."""
    facts = facts_of(tokenizer)
    notes = _chat_notes(samples, config, template, tokenizer, facts) if isinstance(template, ChatTemplate) else []
    return [*notes, *_spelled_tokens(samples, template, facts)]


def _chat_notes(
    samples: Sequence[Sample], config: DataConfig, template: ChatTemplate, tokenizer: Any, facts: TokenizerFacts
) -> list[str]:
    notes = []
    if template.end_token not in (None, facts.eos):
        notes.append(f"Answers end with {template.end_token}, which the template writes; generation stops there too.")
    if not _writes_start(template, facts):
        start = "".join(tokenizer.convert_ids_to_tokens(facts.start_ids))
        notes.append(f"The chat template omits {start}, which the tokenizer puts first; the tokens keep it.")
    if "strftime_now" in template.jinja:
        notes.append("The chat template prints today's date; Graft fixes it at 26 July 2024.")
    if template.unwritten:
        notes.append(
            f"The chat template ends prompts with {template.unwritten!r}, which it does not write into conversations. Graft trains and "
            "asks without it; other programs that use this template will ask with it."
        )
    if config.train_on != "last" and template.rewrites and any(_answers(sample) > 1 for sample in samples):
        notes.append(
            "The chat template writes earlier answers of a conversation otherwise than it asks for them. They are trained on as they are "
            "asked for; `data.train_on: last` trains on the last answer alone, after the template's own history."
        )
    passages = template.rendered([ASKED, ANSWERED], False)
    if passages.generated and not facts.holds_control(passages.text[slice(*passages.generated[-1])]):
        notes.append(
            "The chat template leaves the end mark out of {% generation %}, so the model does not learn to stop."
        )
    return notes


def _spelled_tokens(samples: Sequence[Sample], template: Template, facts: TokenizerFacts) -> list[str]:
    """Say how many samples spell special tokens, and what becomes of them."""
    found: Counter[str] = Counter()
    rows, any_control = 0, re.compile("|".join(map(re.escape, facts.controls)))
    for sample in samples:
        messages = without_end([*sample.messages, *sample.rejected[sample.asked :]], facts.eos)
        texts = [text for message in messages for text in (message["content"], message.get("input", ""))]
        spelled = list(dict.fromkeys(control for text in texts for control in any_control.findall(text)))
        found.update(spelled)
        rows += bool(spelled)
    if not rows:
        return []
    names = listed([f"{token} in {count:,}" for token, count in found.most_common()], 4)
    begins = f"{rows:,} of {len(samples):,} training samples spell special tokens ({names})"
    if template.reads_tokens:
        return [f"{begins}, which become these tokens."]
    return [
        f"{begins}. They stay plain text: the model does not see the tokens. To make them tokens, set data.special_tokens to tokens."
    ]


def _answers(sample: Sample) -> int:
    return sum(message["role"] == "assistant" for message in sample.messages)


def _writes_start(template: Template, facts: TokenizerFacts) -> bool:
    """Whether the template's text itself begins with the tokens that the tokenizer puts first."""
    text = "".join(span.text for span in template.render([{"role": "user", "content": "x"}]))
    return [token for token, _, _ in facts.encode(text)][: len(facts.start_ids)] == facts.start_ids
