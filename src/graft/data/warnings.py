"""What a reader of a data report should know besides its numbers."""

from __future__ import annotations

from typing import Any

from graft.data.chat import ChatTemplate
from graft.data.encoding import TokenizerFacts, facts_of
from graft.data.labelling import Labelling
from graft.data.report import DataReport
from graft.data.template import Template


def data_warnings(report: DataReport, template: Template | Labelling, tokenizer: Any) -> list[str]:
    """A sentence each."""
    notes = []
    if report.duplicates:
        notes.append(f"{report.duplicates:,} training samples repeat an earlier one.")
    if report.shared:
        notes.append(f"{report.shared:,} validation samples are in the training data too.")
    if report.train.empty or report.train.unanswered:
        what = "text" if isinstance(template, Labelling) else "answer"
        notes.append(f"{report.train.empty + report.train.unanswered:,} training rows have no {what} and are left out.")
    if report.train.same:
        notes.append(f"{report.train.same:,} training pairs prefer an answer to itself and are left out.")
    if isinstance(template, ChatTemplate):
        facts = facts_of(tokenizer)
        if template.end_token not in (None, facts.eos):
            notes.append(
                f"Answers end with {template.end_token}, as the template writes it; generation stops there too."
            )
        if not _writes_start(template, facts):
            start = "".join(tokenizer.convert_ids_to_tokens(facts.start_ids))
            notes.append(f"The chat template leaves out {start}, which the tokenizer puts first; it is kept.")
        if "strftime_now" in template.jinja:
            notes.append("The chat template prints today's date; it is held at 26 July 2024.")
    return notes


def _writes_start(template: Template, facts: TokenizerFacts) -> bool:
    """Whether the template's text itself begins with the tokens that the tokenizer puts first."""
    text = "".join(span.text for span in template.render([{"role": "user", "content": "x"}]))
    return [token for token, _, _ in facts.encode(text)][: len(facts.start_ids)] == facts.start_ids
