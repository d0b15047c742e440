"""Samples for an encoder-decoder: the encoder reads the question, and the decoder writes the answer.

A template (`plain` unless another is named) renders the question up to where the answer begins, and the tokenizer encodes it its own way
for this kind of model, end mark included. The answer is the last message alone. The tokenizer encodes it as a target, with the
marks that the decoder begins and ends with.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graft.data.encoding import Span, facts_of
from graft.data.labelling import FILE, encode_texts
from graft.data.samples import Example, Message, Rejected, Sample, without_end
from graft.data.template import Template
from graft.data.templates import template_of
from graft.errors import GraftError
from graft.utils.files import write_json_atomic


@dataclass(frozen=True)
class EncoderTemplate(Template):
    """Wraps a template for a model with an encoder, which reads the prompts. It saves the inner template, and `task.json` beside it."""

    inner: Template | None = None
    """The template that renders questions; never None (a default is needed because the inherited fields have defaults)."""

    @classmethod
    def of(cls, template: Template) -> EncoderTemplate:
        """Wrap a template."""
        return cls(template.name, template.system_prompt, template)

    @property
    def template(self) -> Template:
        """The inner template, with this template's system prompt."""
        assert self.inner is not None
        return self.inner.with_system(self.system_prompt)

    def _spans(self, messages: Sequence[Message], add_generation_prompt: bool, learnt: Container[int]) -> list[Span]:
        return self.template._spans(messages, add_generation_prompt, learnt)

    def content(self) -> dict[str, Any]:
        return self.template.content()

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Any) -> list[int]:
        """Return the token ids of the question as the encoder reads them."""
        return list(encode_texts(tokenizer, [self.text(messages, tokenizer)])["input_ids"])

    def text(self, messages: Sequence[Message], tokenizer: Any) -> str:
        """Render the question, up to where the answer begins."""
        messages = without_end(messages, facts_of(tokenizer).eos)
        return "".join(span.text for span in self.render(messages, add_generation_prompt=True))

    def save(self, folder: str | Path) -> None:
        self.template.save(folder)
        write_json_atomic(Path(folder) / FILE, {"task": "seq2seq"})


def encoder_template(
    name: str, tokenizer: Any, system: str | None, arguments: Mapping[str, Any] | None = None
) -> EncoderTemplate:
    """Return the template of this name for an encoder; `auto` is `plain`. arguments: as in `template_of`."""
    template = template_of("plain" if name == "auto" else name, tokenizer, arguments)
    return EncoderTemplate.of(template.with_system(system))


def tokenize_seq2seq(
    sample: Sample, tokenizer: Any, template: EncoderTemplate, max_length: int, overlong: str
) -> Example | Rejected:
    """Return the token ids of question and answer, or the reason why the sample cannot be trained on.

    A sample of which question and answer together exceed `max_length` is rejected, or with `truncate_prompt` the end of its question is
    cut. An answer is never cut. Raises `GraftError`, naming the row, for a sample without a question.
    """
    if sample.answer is None:
        return Rejected("no_answer", 0)
    if not sample.prompt:
        raise GraftError(
            f"{sample.where}: an encoder-decoder needs a question and an answer, but this row has only a text"
        )
    if sample.messages[-1].get("masked"):
        return Rejected("masked", 0)
    if "extra" in sample.messages[-1]:
        keys = ", ".join(sample.messages[-1]["extra"])
        raise GraftError(
            f"{sample.where}: the answer has {keys}, but an encoder-decoder learns to write the content alone"
        )
    (answer,) = without_end([sample.messages[-1]], facts_of(tokenizer).eos)
    if not answer["content"].strip():
        return Rejected("empty_answer", 0)
    try:
        text = template.text(sample.prompt, tokenizer)
    except GraftError as error:
        raise GraftError(f"{sample.where}: {error}") from error
    source = encode_texts(tokenizer, [text])["input_ids"]
    target = tokenizer(
        text_target=answer["content"], split_special_tokens=True, padding=False, truncation=False, verbose=False
    )["input_ids"]
    length = len(source) + len(target)
    if length > max_length:
        if overlong != "truncate_prompt":
            return Rejected("overlong", length)
        room = max_length - len(target)
        if room <= len(encode_texts(tokenizer, [""])["input_ids"]):  # room for nothing but the tokenizer's own marks
            return Rejected("answer_too_long", length)
        source = encode_texts(tokenizer, [text], room)["input_ids"]
    ids = np.array(source, dtype=np.int32)
    cut = length - len(target) - len(ids)
    unsupervised = np.zeros(len(ids), dtype=np.bool_)
    return Example(ids, unsupervised, sample.source, sample.row, cut, answer=np.array(target, dtype=np.int32))
