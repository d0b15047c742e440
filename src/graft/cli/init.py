"""graft init: write a commented run.yaml to start from."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graft.cli.common import AsJson, print_json

if TYPE_CHECKING:
    from pydantic import BaseModel

# Settings that most runs change, so the file shows them with a value. All others are in it as comments.
SHOWN = {
    "base": ("model", "dtype"),
    "data": ("train", "task", "validation", "template", "max_length", "overlong"),
    "train": ("epochs", "batch_size", "lr", "schedule", "warmup", "seed"),
    "eval": ("max_new_tokens",),
}
COLUMNS = 100
"""Most columns of a line of comment."""


def command(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.yaml"),
    data: Annotated[str, typer.Option(help="Training data: a file, or a data set on the Hugging Face hub.")] = ...,  # type: ignore[assignment]
    base: Annotated[
        str, typer.Option(help="Base model: a folder, a name on the hub, or the tiny seedling that ships with Graft.")
    ] = "seedling",
    kind: Annotated[
        str | None,
        typer.Option(
            help="Adapter kind or preset (graft kinds and graft show presets list them). Default: lora.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        Literal["causal", "classification", "regression", "seq2seq", "preference"] | None,
        typer.Option(
            help="What the model learns: to generate answers (causal, or seq2seq with an encoder-decoder), to predict a class "
            "or a number, or to prefer one answer to another. Default: what suits the base and the columns of the data.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Literal["adapter", "full", "qft", "mezo"],
        typer.Option(
            help="What is trained, and how: an adapter, the base itself (full), the base in 8 bits (qft), or an adapter without a "
            "backward pass (mezo)."
        ),
    ] = "adapter",
    quantize: Annotated[
        Literal["nf4", "fp4", "int8"] | None,
        typer.Option(
            help="Hold the base in 4 bits (nf4 is QLoRA's) or 8 bits. Default: not quantised.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run.yaml with every setting explained, to start from.

    Base and data on this machine are looked at, so that the lengths, the template, the columns and the learning rate fit them.

    Example: graft init run.yaml --data train.jsonl --base seedling --kind lora
    """
    from graft.errors import GraftError
    from graft.training.suggesting import suggest
    from graft.utils.files import write_text_atomic

    if path.exists():
        raise GraftError(f"{path} exists already: name another file, or remove it first")
    if not path.parent.is_dir():
        raise GraftError(f"cannot write {path}: there is no folder {path.parent}")
    if kind is not None and method in ("full", "qft"):
        raise GraftError(f"--method {method} trains the base itself, so an adapter has no use: leave out --kind")
    found = suggest(base, data, None if method in ("full", "qft") else kind or "lora", task, method, quantize)
    write_text_atomic(path, run_yaml(found.settings))
    if as_json:
        print_json({"file": path, "settings": found.settings, "notes": found.notes})
        return
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"Wrote {path}. Next: {shlex.join(['graft', 'check', str(path)])}")


def run_yaml(settings: dict[str, Any]) -> str:
    """Return the text of a run's YAML with every setting explained. settings: those that differ from the defaults."""
    from graft.config import RunConfig, load_run

    config = load_run(settings)
    lines = [
        "# A run of Graft. Above each setting stands what it means.",
        "# Settings after '# ' have the values that count without them.",
    ]
    for name, field in RunConfig.model_fields.items():
        section: Any = getattr(config, name)
        if section is None:
            continue
        lines += ["", *_comment(field.description or "", ""), f"{name}:"]
        given = settings.get(name, {})
        if isinstance(given, list):
            lines += _listed(section, given)
        elif hasattr(section, "preset"):
            lines.append(f"  preset: {_scalar(section.preset)}")
        else:
            shown = (*SHOWN.get(name, tuple(type(section).model_fields)), *(given if isinstance(given, dict) else ()))
            lines += _settings(section, shown)
    return "\n".join(lines) + "\n"


def _settings(section: BaseModel, shown: tuple[str, ...]) -> Iterator[str]:
    values = section.model_dump(mode="json", exclude_defaults=False)
    for name, field in type(section).model_fields.items():
        yield from _comment(field.description or "", "  ")
        yield f"  {'' if name in shown else '# '}{name}: {_scalar(_short(values[name]))}"


def _listed(section: Any, given: list[Any]) -> Iterator[str]:
    """Write a list of adapters: the first with its settings explained, unless it is a preset, and the others in one line each."""
    yield from _comment("Several adapters under one name.", "  ")
    if isinstance(given[0], str) and section.adapters[0].kind == given[0]:
        yield "  -"
        first = section.adapters[0]
        yield from (f"  {line}" for line in _settings(first, tuple(type(first).model_fields)))
    else:
        yield f"  - {_scalar(given[0])}"
    for other in given[1:]:
        if "tokens" in other:
            why = "Trains the rows of tokens that the base has not learnt; without it answers may never end."
            yield from _comment(why, "  ")
        yield f"  - {_scalar(other)}"


def _short(value: Any) -> Any:
    """Return a section that is only a name as this name, and a data set without what is empty or has its default."""
    from graft.config.data import SourceConfig

    if isinstance(value, dict) and set(value) == {"kind"}:
        return value["kind"]
    if not isinstance(value, dict) or "path" not in value:
        return value
    return SourceConfig.model_validate(value).model_dump(mode="json", exclude_defaults=True)


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(" ".join(text.split()), COLUMNS, initial_indent=start, subsequent_indent=start)


def _scalar(value: Any) -> str:
    """Write a value as YAML on one line."""
    from io import StringIO

    from ruamel.yaml import YAML

    text = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = True, 1000
    yaml.dump([value], text)
    return text.getvalue().strip().removeprefix("[").removesuffix("]")
