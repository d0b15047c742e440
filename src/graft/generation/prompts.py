"""The tokens of a prompt, as a request. A prompt that is far longer than the context is never tokenised as a whole.

A tokenizer takes hundreds of bytes for each character, so a prompt of ten megabytes would take gigabytes only to be found too long.
"""

from __future__ import annotations

from collections.abc import Sequence

from graft.bases import Base
from graft.bases.context import context_length
from graft.bases.tokens import refuse_unknown
from graft.data.long_texts import bounded
from graft.data.samples import Message
from graft.data.template import Template
from graft.generation.requests import Request


def request_of(base: Base, template: Template, adapter: str | None, messages: Sequence[Message]) -> Request:
    """Return the request for the answer to a conversation that ends with a question.

    Raises `GraftError` for a conversation that the template cannot write, and for tokens without a row in the base's embedding.
    """
    tokenizer = base.tokenizer
    messages, total = bounded(messages, tokenizer, context_length(base.model, adapter))
    ids = template.prompt_ids(messages, tokenizer)
    refuse_unknown(base.model, base.name, tokenizer, max(ids, default=0), prompt=True)
    return Request(tuple(ids), adapter, frozenset(template.stop_ids(tokenizer)), total)
