"""Run the Jinja code of a chat template: what it is given, what it reads, and which passages it marks as generated.

A template that prints today's date gets a fixed date, so that a run renders the same text tomorrow. A template may come from a stranger's
folder: it runs in the sandbox of transformers, and its first renderings have limits of time and memory.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from jinja2 import Environment, TemplateError, meta, nodes
from transformers.utils.chat_template_utils import render_jinja_template

from graft.data.samples import Message
from graft.errors import GraftError

# Llama 3's template falls back to this date. The macro shadows the function `strftime_now` that transformers passes in.
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%B %d, %Y': 'July 26, 2024'}.get(format, '26 Jul 2024') }}"
    "{%- endmacro -%}"
)
GIVEN = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception", "namespace", "range"}
)
"""Names that every template may read, and that are not its settings."""
SECONDS, GIBIBYTES = 5.0, 1
"""Limits of the first renderings of a template, which write a question and an answer of a letter each."""
LONGEST = 1_000_000
"""The most characters of a template, and of the text that it adds to a conversation."""
GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    generated: tuple[tuple[int, int], ...] = ()
    """Start and end of the passages that the template marks with `{% generation %}`, in characters; neighbours are joined."""


class Writer(Protocol):
    """What finding messages needs to know of a chat template (see `ChatTemplate`)."""

    @property
    def name(self) -> str: ...
    @property
    def jinja(self) -> str: ...
    @property
    def special_tokens(self) -> Mapping[str, Any]: ...
    @property
    def end(self) -> str: ...
    @property
    def next_end(self) -> str: ...
    @cached_property
    def tail(self) -> str: ...
    @cached_property
    def rewrites(self) -> bool: ...
    @cached_property
    def marked_header(self) -> int: ...
    def rendered(self, turns: Sequence[Message], add_generation_prompt: bool) -> Rendered: ...
    def text(self, turns: Sequence[Message], add_generation_prompt: bool) -> str: ...


def run(
    jinja: str,
    name: str,
    turns: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    add_generation_prompt: bool,
    values: Mapping[str, Any],
) -> Rendered:
    """Render turns to text. Raises `GraftError` with the template's own message if it refuses them."""
    marks = GENERATION.search(jinja) is not None
    try:
        texts, passages = cast(Any, render_jinja_template)(
            [[dict(turn) for turn in turns]],
            tools=None if tools is None else list(tools),
            chat_template=(FIXED_DATE if "strftime_now" in jinja else "") + jinja,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marks,
            **values,
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise GraftError(f"chat template '{name}' refuses this conversation: {error}") from error
    given = sum(len(str(turn)) for turn in turns) + len(str(tools))
    if len(texts[0]) > LONGEST + 20 * given:
        raise GraftError(f"chat template '{name}' writes {len(texts[0]):,} characters for a conversation of {given:,}")
    return Rendered(texts[0], _joined(passages[0]) if marks else ())


@contextmanager
def limited(jinja: str, name: str) -> Iterator[None]:
    """Limit the time and the memory of what runs inside, where the system can. Raises `GraftError` that names the template."""
    if len(jinja) > LONGEST:
        raise GraftError(f"chat template '{name}' has {len(jinja):,} characters; at most {LONGEST:,} are allowed")
    try:
        if (
            _parsed(jinja).find(nodes.Pow) is not None
        ):  # one operation of Python can take for ever, and cannot be stopped
            raise GraftError(
                f"chat template '{name}' computes a power (**), which no conversation needs, so it is not used"
            )
    except TemplateError as error:
        raise GraftError(f"chat template '{name}' cannot be read: {error}") from error
    try:
        with _time_limit(), _memory_limit():
            yield
    except (TimeoutError, MemoryError) as error:
        raise GraftError(
            f"chat template '{name}' takes more than {SECONDS:g} seconds or {GIBIBYTES} GiB to write one question and one answer, so it is "
            "not used"
        ) from error


@contextmanager
def _time_limit() -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Limit the growth of the process's address space, on Linux."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    wanted = now + GIBIBYTES * 2**30
    if soft == resource.RLIM_INFINITY or wanted < soft:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def settings_of(jinja: str) -> list[str]:
    """Return the names of what a template reads besides the conversation, as enable_thinking."""
    read, made, tested = _names(jinja)
    return sorted((read - made) | (read & tested))


def reads(jinja: str, name: str) -> bool:
    """Whether a template may read a value of this name."""
    return name in _names(jinja)[0]


@lru_cache
def _names(jinja: str) -> tuple[set[str], set[str], set[str]]:
    """Return the names that a template reads from outside, those that it also sets somewhere, and those that it asks to be defined."""
    tree = _parsed(jinja)
    made = {found.name for found in tree.find_all(nodes.Name) if found.ctx == "store"}
    tests = (found.node for found in tree.find_all(nodes.Test) if found.name in ("defined", "undefined", "none"))
    return meta.find_undeclared_variables(tree) - GIVEN, made, {n.name for n in tests if isinstance(n, nodes.Name)}


def _parsed(jinja: str) -> nodes.Template:
    return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", jinja))


def _joined(passages: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, end in passages:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif end > start:
            joined.append((start, end))
    return tuple(joined)
