"""Templates: how a conversation is written out, and which of its characters the model is to learn.

`auto` is the tokenizer's own chat template where it has one, else `alpaca`. `chat` is the tokenizer's own or an error.
`alpaca`, `llm-adapters` and `plain` come with Graft (wordings.py). A file is either a `.jinja` chat template or a `.yaml`
or `.json` file of turns (turns.py). A folder is an adapter's: its `template.json`, as `save` wrote it.

A saved template holds all that rendering depends on, special tokens and system prompt included; its digest says which.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from graft.data.encoding import Span, encode, facts_of
from graft.data.samples import Message, without_end
from graft.errors import GraftError, did_you_mean
from graft.files import write_text_atomic

FILE = "template.json"
JINJA = "chat_template.jinja"


@dataclass(frozen=True)
class Template(ABC):
    """How a conversation becomes spans of text."""

    name: str
    system_prompt: str | None = None
    """System prompt of conversations that bring none; None: none."""

    @abstractmethod
    def _spans(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Span]: ...

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Everything that the rendering depends on, as JSON values."""

    def complete(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation with the default system prompt, where it brings none. Spans count the messages of this list."""
        if self.system_prompt is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[Span]:
        """Write a conversation out. Spans of answers, with their end marks, are `supervised`.

        With `add_generation_prompt` the text ends where the answer to the last message begins.
        Raises `GraftError` for a conversation that the template cannot write, or whose answers cannot be told apart.
        """
        messages = self.complete(messages)
        if add_generation_prompt and messages and messages[-1]["role"] == "assistant":
            raise GraftError("a prompt ends with a question, but this conversation ends with an answer")
        return [span for span in self._spans(messages, add_generation_prompt) if span.text or span.ends]

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Any) -> list[int]:
        """Token ids of everything before the answer to the last message: what training saw there, and generation needs."""
        messages = without_end(messages, facts_of(tokenizer).eos)
        return encode(self.render(messages, add_generation_prompt=True), tokenizer).ids

    def stop_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """The tokens that end an answer: generation stops at any of them."""
        return (facts_of(tokenizer).eos_id,)

    def with_system(self, system: str | None) -> Self:
        """The same template with another default system prompt; None changes nothing."""
        return self if system is None else replace(self, system_prompt=system)

    @property
    def digest(self) -> str:
        """SHA-256 of the content: equal digests write every conversation alike."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `template.json` (and `chat_template.jinja`) into an existing folder, beside the adapter."""
        content = {"name": self.name, "digest": self.digest, **self.content()}
        if (jinja := content.pop("jinja", None)) is not None:
            write_text_atomic(Path(folder) / JINJA, jinja)
        write_text_atomic(Path(folder) / FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @staticmethod
    def load(name: str | Path, tokenizer: Any = None) -> Template:
        """A template by name, from a file, or from the folder of an adapter.

        The tokenizer is needed for `auto`, `chat` and `.jinja` files. Raises `GraftError` for an unknown name, a file
        that is no template, and a folder whose template was changed since it was saved.
        """
        from graft.data.wordings import BUILT_IN

        path = Path(name)
        if str(name) in BUILT_IN:
            return BUILT_IN[str(name)]
        if str(name) in ("auto", "chat"):
            return _own(str(name), tokenizer)
        if path.is_dir():
            return _saved(path)
        if path.is_file():
            return _from_file(path, tokenizer)
        names = ["auto", "chat", *BUILT_IN]
        raise GraftError(
            f"unknown template '{name}': expected {', '.join(names)}, or a .jinja, .yaml or .json file"
            f"{'; there is no such file' if path.suffix else ''}.{did_you_mean(str(name), names)}"
        )


def _own(name: str, tokenizer: Any) -> Template:
    """The tokenizer's own chat template; for `auto`, alpaca where it has none."""
    from graft.data.chat import ChatTemplate
    from graft.data.wordings import ALPACA

    if getattr(tokenizer, "chat_template", None):
        return ChatTemplate.of(tokenizer.get_chat_template(), tokenizer)
    if name == "auto":
        return ALPACA
    raise GraftError("template 'chat': this tokenizer has no chat template. Use 'alpaca', 'plain' or a .jinja file")


def _from_file(path: Path, tokenizer: Any) -> Template:
    from graft.data.chat import ChatTemplate
    from graft.data.turns import turns_from

    if path.name == FILE:
        return _saved(path.parent)
    if path.suffix == ".jinja":
        return ChatTemplate.of(path.read_text(encoding="utf-8"), tokenizer, name=path.stem)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise GraftError(f"{path}: a template is a .jinja, .yaml or .json file, not '{path.suffix}'")
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise GraftError(f"{path} cannot be read: {error}") from error
    return turns_from(content, name=path.stem, where=str(path))


def _saved(folder: Path) -> Template:
    from graft.data.chat import ChatTemplate
    from graft.data.turns import turns_from

    path = folder / FILE
    if not path.is_file():
        raise GraftError(f"{folder} holds no template ({FILE})")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name, digest, kind = content.pop("name"), content.pop("digest"), content.pop("kind")
    except (ValueError, KeyError, AttributeError) as error:
        raise GraftError(f"{path} is no saved template: {error}") from error
    if kind == "chat":
        template: Template = ChatTemplate.saved(name, content, _jinja(folder))
    else:
        template = turns_from(content, name=name, where=str(path))
    if template.digest != digest:
        raise GraftError(
            f"the template in {folder} was changed since the adapter was trained with it (digest {digest[:12]})"
        )
    return template


def _jinja(folder: Path) -> str:
    path = folder / JINJA
    if not path.is_file():
        raise GraftError(f"{folder} holds {FILE} but not {JINJA}, which belongs to it")
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def check_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value, if it is a mapping with text keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise GraftError(f'{where}: a template is a mapping of texts, e.g. user: "Q: {{user}}\\nA: "')
    return value
