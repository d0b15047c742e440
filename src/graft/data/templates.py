"""Templates by name: where each comes from.

`auto` is the tokenizer's own chat template where it has one, else `alpaca`. `chat` is the tokenizer's own or an error.
`alpaca`, `llm-adapters` and `plain` come with Graft (wordings.py). A file is either a `.jinja` chat template or a `.yaml`
or `.json` file of turns (turns.py). A folder is an adapter's: its `template.json`, as `save` wrote it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from graft.data.builtin_templates import ALPACA, BUILTIN_TEMPLATES
from graft.data.chat import ChatTemplate
from graft.data.template import FILE, JINJA, Template
from graft.data.turn_template import parse_turn_template
from graft.errors import GraftError, did_you_mean


def template_of(name: str | Path, tokenizer: Any = None) -> Template:
    """A template by name, from a file, or from the folder of an adapter.

    The tokenizer is needed for `auto`, `chat` and `.jinja` files. Raises `GraftError` for an unknown name, a file
    that is no template, and a folder whose template was changed since it was saved.
    """
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
    """The tokenizer's own chat template; for `auto`, alpaca where it has none."""
    if getattr(tokenizer, "chat_template", None):
        return ChatTemplate.of(tokenizer.get_chat_template(), tokenizer)
    if name == "auto":
        return ALPACA
    raise GraftError("template 'chat': this tokenizer has no chat template. Use 'alpaca', 'plain' or a .jinja file")


def _from_file(path: Path, tokenizer: Any) -> Template:
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
    return parse_turn_template(content, name=path.stem, where=str(path))


def _saved(folder: Path) -> Template:
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
        template = parse_turn_template(content, name=name, where=str(path))
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
