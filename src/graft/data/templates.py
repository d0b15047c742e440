"""Find a template by name.

auto                          the tokenizer's own chat template if it has one, else alpaca
chat                          the tokenizer's own chat template; an error if it has none
alpaca, llm-adapters, plain   templates that come with Graft (builtin_templates.py)
a .jinja file                 a chat template (chat.py)
a .yaml or .json file         a turn template (turn_template.py)
an adapter folder             the template.json that `Template.save` wrote there
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.config.yaml_values import read_yaml_text, yaml_values
from graft.data.builtin_templates import ALPACA, BUILTIN_TEMPLATES
from graft.data.chat import ChatTemplate
from graft.data.template import FILE, JINJA, Template
from graft.data.turn_template import parse_turn_template
from graft.errors import GraftError, did_you_mean


def template_of(name: str | Path, tokenizer: Any = None, arguments: Mapping[str, Any] | None = None) -> Template:
    """Return a template by name, from a file, or from an adapter folder.

    `auto`, `chat` and `.jinja` files need the tokenizer. arguments: what a chat template reads besides the conversation; they are added
    to those that were saved. Raises `GraftError` for an unknown name, for a file that is not a template, for an adapter folder with a
    template that was changed after it was saved, and for arguments that the template does not read.
    """
    template = _found(name, tokenizer)
    if not arguments:
        return template
    if not isinstance(template, ChatTemplate):
        raise GraftError(
            f"data.template_args has no effect with template '{template.name}', which is no chat template: remove it"
        )
    own = {**template.arguments, **arguments}
    made = ChatTemplate.of(template.jinja, tokenizer, template.name, own)
    return replace(made, system_prompt=template.system_prompt, reads_tokens=template.reads_tokens)


def _found(name: str | Path, tokenizer: Any) -> Template:
    path = Path(name)
    if str(name) in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[str(name)]
    if str(name) in ("auto", "chat"):
        return _own(str(name), tokenizer)
    if path.is_dir():
        return _saved(path)
    if path.is_file():
        return _from_file(path, tokenizer)
    names = ["auto", "chat", *BUILTIN_TEMPLATES]
    raise GraftError(
        f"unknown template '{name}': expected {', '.join(names)}, or a .jinja, .yaml or .json file"
        f"{'; there is no such file' if path.suffix else ''}.{did_you_mean(str(name), names)}"
    )


def _own(name: str, tokenizer: Any) -> Template:
    """Return the tokenizer's own chat template; for `auto`, alpaca if it has none."""
    if getattr(tokenizer, "chat_template", None):
        return ChatTemplate.of(tokenizer.get_chat_template(), tokenizer)
    if name == "auto":
        return ALPACA
    raise GraftError("template 'chat': this tokenizer has no chat template. Use 'alpaca', 'plain' or a .jinja file")


def _from_file(path: Path, tokenizer: Any) -> Template:
    if path.name == FILE:
        return _saved(path.parent)
    if path.suffix == ".jinja":
        try:
            return ChatTemplate.of(path.read_text(encoding="utf-8"), tokenizer, name=path.stem)
        except UnicodeDecodeError as error:
            raise GraftError(f"{path} cannot be read: {error}") from error
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise GraftError(f"{path}: a template must be a .jinja, .yaml or .json file; given '{path.suffix}'")
    try:
        content, _ = yaml_values(read_yaml_text(path), str(path))
    except GraftError as error:
        raise GraftError(f"{path} cannot be read: {error}") from error
    return parse_turn_template(content, name=path.stem, where=str(path))


def _saved(folder: Path) -> Template:
    path = folder / FILE
    if not path.is_file():
        raise GraftError(f"{folder} holds no template ({FILE})")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name, digest, kind = content.pop("name"), content.pop("digest"), content.pop("kind")
        reads_tokens = content.pop("reads_tokens", False) is True
    except (ValueError, KeyError, AttributeError) as error:
        raise GraftError(f"{path} is not a saved template: {error}") from error
    if kind == "chat":
        template: Template = ChatTemplate.saved(name, content, _jinja(folder))
    else:
        template = parse_turn_template(content, name=name, where=str(path))
    template = replace(template, reads_tokens=reads_tokens)
    if template.digest != digest:
        raise GraftError(
            f"the template in {folder} was changed after the adapter was trained with it (its digest was {digest[:12]})"
        )
    return template


def _jinja(folder: Path) -> str:
    path = folder / JINJA
    if not path.is_file():
        raise GraftError(f"{folder} holds {FILE} but lacks {JINJA}, which belongs to it")
    with open(
        path, encoding="utf-8", newline=""
    ) as file:  # newline="": line ends as they were saved, so that the digest is the same
        return file.read()
