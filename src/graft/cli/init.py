"""graft init: write a commented run.yaml to start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

# Settings that most runs change, so the file shows them with a value. All others are in it as comments.
SHOWN = {
    "base": ("model", "dtype"),
    "data": ("train", "task", "validation", "template", "max_length", "overlong"),
    "train": ("epochs", "batch_size", "lr", "schedule", "warmup", "seed"),
    "eval": ("max_new_tokens",),
}


def command(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.yaml"),
    data: Annotated[str, typer.Option(help="Training data: a file, or a data set on the Hugging Face hub.")] = ...,  # type: ignore[assignment]
    base: Annotated[
        str, typer.Option(help="Base model: a folder, a name on the hub, or the tiny seedling that ships with Graft.")
    ] = "seedling",
    kind: Annotated[
        str, typer.Option(help="Adapter kind or preset (graft kinds and graft show presets list them).")
    ] = "lora",
    task: Annotated[
        Literal["causal", "classification", "regression", "seq2seq", "preference"],
        typer.Option(
            help="What the model learns: to generate answers (causal, or seq2seq with an encoder-decoder), to predict a class "
            "or a number, or to prefer one answer to another."
        ),
    ] = "causal",
) -> None:
    """Write a run.yaml with every setting explained, to start from."""
    from graft.errors import GraftError
    from graft.utils.files import write_text_atomic

    if path.exists():
        raise GraftError(f"{path} exists already: name another file, or remove it first")
    write_text_atomic(path, run_yaml(base, data, kind, task))
    typer.echo(f"Wrote {path}. Next: graft check {path}")


def run_yaml(base: str, data: str, kind: str, task: str = "causal") -> str:
    """Return the text of a run's YAML with every setting explained. Raises `GraftError` for an unknown kind or preset."""
    from graft.config import RunConfig, load_run

    objective = {"train": {"objective": "dpo"}} if task == "preference" else {}
    config = load_run({"base": {"model": base}, "adapter": kind, "data": {"train": data, "task": task}, **objective})
    lines = ["# A run of Graft. Lines that start with '# ' inside a block are settings with their default values."]
    for name, field in RunConfig.model_fields.items():
        section: Any = getattr(config, name)
        lines += ["", f"# {field.description}", f"{name}:"]
        if hasattr(section, "preset"):
            lines.append(f"  preset: {_scalar(section.preset)}")
        else:
            shown = (*SHOWN.get(name, tuple(type(section).model_fields)), *objective.get(name, ()))
            lines += _settings(section, shown)
    return "\n".join(lines) + "\n"


def _settings(section: BaseModel, shown: tuple[str, ...]) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = _scalar(section.model_dump(mode="json")[name])
        setting = f"  {name}: {value}" if name in shown else f"  # {name}: {value}"
        meaning = " ".join((field.description or "").split())
        yield f"{setting:<34}  # {meaning}" if meaning else setting


def _scalar(value: Any) -> str:
    """Write a value as YAML on one line."""
    from io import StringIO

    from ruamel.yaml import YAML

    text = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = True, 1000
    yaml.dump([value], text)
    return text.getvalue().strip().removeprefix("[").removesuffix("]")
