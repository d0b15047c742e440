"""Describe every adapter kind from the code: the table and the pages in docs/adapters, and the output of `graft kinds`.

The equations come from the docstring of the kind's file, the sentences from the docstring and the fields of its config.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

from graft.adapters.base import AdapterConfig
from graft.adapters.parsing import parse
from graft.adapters.registry import BUILT_IN, BY_REFERENCE, entries, kind_class, kinds
from graft.errors import GraftError

_INTRODUCTION = """# Adapter kinds

`graft kinds --markdown docs/adapters` writes these pages from the code; a test compares them.

Write an adapter as a mapping under `adapter` in a run's YAML, or as the config class of the same name (`graft.LoRA(rank=16)`).
A list of mappings is a stack: several kinds under one name. `graft kinds KIND` shows every setting of a kind, and
`graft kinds --base MODEL` counts the parameters of each kind on a model. Sites have the same names in all architectures:

```text
{sites}
```

In the table, *sites* are the types of sites where a kind can act. *Identity* says whether a fresh adapter with default settings
leaves the model's output bitwise unchanged, and *folds* whether it can be merged into the base's weights (`graft merge`).
"""


@dataclass(frozen=True)
class Card:
    """The summary of one kind."""

    kind: str
    summary: str
    sites: str
    """Types of sites where the kind can act."""
    default_sites: str
    identity: str
    folds: str
    needs: str
    """Site names that a model must have."""
    source: str
    origin: str
    """Where it comes from: "graft", an installed package, or "registered"."""


def card_of(kind: str) -> Card:
    """Summarise a kind with its default settings. Raises `GraftError` for an unknown kind."""
    cls = type(_config(kind))
    config = _config(kind)
    folds = ("yes, where layers have biases" if config.learns_bias else "yes") if config.folds else "no"
    if kind == "stack":
        sites, identity, folds = "those of its parts", "if all parts are", "if all parts do"
    elif config.inner():
        sites, identity = "those of what is in it", "if what is in it is"
        folds = "if what is in it does" if config.folds or kind == "sum" else folds
    else:
        sites, identity = " ".join(sorted(config.takes)), "yes" if config.starts_as_identity else "no"
    names = config.sites if isinstance(config.sites, str) else " ".join(config.sites)
    return Card(
        kind,
        _summary(cls),
        sites,
        names,
        identity,
        folds,
        " ".join(sorted(config.needs)),
        cls.source,
        entries()[kind].origin,
    )


def cards() -> tuple[Card, ...]:
    """Summarise every kind, in the order of the registry."""
    return tuple(card_of(kind) for kind in kinds())


def settings_of(kind: str) -> dict[str, tuple[str, str]]:
    """Return field -> (default, meaning)."""
    found = {}
    for name, field in type(_config(kind)).model_fields.items():
        default = "" if field.is_required() else repr(field.get_default(call_default_factory=True))
        found[name] = (default, " ".join((field.description or "").split()))
    del found["kind"]
    return found


def equation_of(kind: str) -> str:
    """Return the docstring of the kind's file: equations, source, legend."""
    return inspect.cleandoc(sys.modules[type(_config(kind)).__module__].__doc__ or "")


def pages() -> dict[str, str]:
    """Return name of a file in docs/adapters -> its text: README.md with the table, and a page for each kind."""
    return {"README.md": _overview(), **{f"{kind}.md": _page_of(kind) for kind in BUILT_IN if kind not in BY_REFERENCE}}


def _overview() -> str:
    from graft.architectures import language

    sites = inspect.cleandoc(language.__doc__ or "").split("\n\n")[1]  # the second paragraph lists the site names
    header = ("kind", "what it is", "sites", "identity", "folds", "needs", "source")
    rows = [
        (f"[`{c.kind}`]({c.kind}.md)", c.summary, c.sites, c.identity, c.folds, c.needs and f"`{c.needs}`", c.source)
        for c in cards()
    ]
    table = [_row(header), _row(["---"] * len(header)), *(_row(row) for row in rows)]
    return "\n".join([_INTRODUCTION.format(sites=inspect.cleandoc(sites)), *table]) + "\n"


def _page_of(kind: str) -> str:
    """Write the page of a kind: its equation, when to use it, a valid YAML example and every setting."""
    cls, card = kind_class(kind), card_of(kind)
    facts = {
        "sites": card.sites,
        "starts as identity": card.identity,
        "folds": card.folds,
        "needs": card.needs,
        "source": card.source,
    }
    settings = [_row((f"`{name}`", f"`{default}`" if default else "", meaning.replace("|", "\\|")))
                for name, (default, meaning) in settings_of(kind).items()]  # fmt: skip
    return "\n".join([
        f"# `{kind}`", "", f"{_summary(cls)} {cls.suits}".strip(), "", "```text", equation_of(kind), "```", "",
        *(f"- {name}: {value}" for name, value in facts.items() if value), "",
        "```yaml", f"adapter: {_flow(cls.example())}", "```", "", _row(("setting", "default", "meaning")), _row(["---"] * 3), *settings,
    ]) + "\n"  # fmt: skip


def _config(kind: str) -> AdapterConfig:
    if kind in BY_REFERENCE:
        raise GraftError(
            f"kind '{kind}' is made of trained adapters in folders, so it has no default to show: write {{from: FOLDER}} in a list of "
            "adapters, or {kind: fusion, of: [FOLDER, FOLDER]} (docs/combining.md)"
        )
    config = parse(kind_class(kind).example())
    assert isinstance(config, AdapterConfig)
    return config


def _summary(cls: type[AdapterConfig]) -> str:
    return inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _flow(value: object) -> str:
    """Write a value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return f'"{text}"' if isinstance(value, str) and any(mark in text for mark in "?:{}[],#") else text
