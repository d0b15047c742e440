"""graft eval --harness: evaluate on lm-eval's tasks, with its prompts and rules, and print the results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from graft.cli.common import print_json, print_table
from graft.cli.evaluations import show_all, show_overlap
from graft.cli.wording import counted

if TYPE_CHECKING:
    from graft.generation.loaded import LoadedModel


def ask_lm_eval(
    loaded: LoadedModel,
    names: list[str],
    data: str | None,
    folder: Path,
    *,
    limit: int | None,
    overwrite: bool,
    as_json: bool,
) -> list[dict[str, Any]]:
    """Evaluate all candidates, task by task. Each result is printed as soon as it is known, and all side by side at the end."""
    from graft.errors import require

    require("lm_eval", "eval")
    from graft.evaluation.lm_eval.harness import harness

    each = None if as_json else _show
    found = harness(loaded, names, data, folder, limit=limit, overwrite=overwrite, each=each)
    if as_json:
        print_json(found)
    else:
        show_all(found["tasks"])
    return found["tasks"]


def _show(result: Mapping[str, Any]) -> None:
    """Print one result: a row per metric, a column per candidate, and below it how it was measured."""
    found = result["results"]
    metrics = list(dict.fromkeys(key for each in found for key in each["metrics"] if not _is_error(key)))
    print_table(
        ["metric", *(each["name"] for each in found)], [[key, *(_cell(each, key) for each in found)] for key in metrics]
    )
    protocol = result["protocol"]
    examples = counted(protocol["num_fewshot"], "example")
    kept = f", {counted(result['continued_from'], 'answer')} reused" if result["continued_from"] else ""
    typer.echo(
        f"{result['task']}: {counted(found[0]['total'], 'question')}, lm-eval {protocol['version']}, {examples} before each; "
        f"{result['protocol_hash']}; {result['seconds']:.1f} s{kept}"
    )
    for each in found:
        if each["cut"]:
            typer.echo(f"{each['name']}: lm-eval truncated {counted(each['cut'], 'prompt')} to the base's context")
    show_overlap(result)
    if result["folder"]:
        typer.echo(f"{result['folder']}/result.json, answers.jsonl")


def _is_error(key: str) -> bool:
    return key.partition(",")[0].endswith("_stderr")


def _cell(each: Mapping[str, Any], key: str) -> str | None:
    """Format a metric with its standard error."""
    name, _, rule = key.partition(",")
    value, error = each["metrics"].get(key), each["metrics"].get(f"{name}_stderr,{rule}")
    if not isinstance(value, (int, float)):
        return None if value is None else str(value)
    return f"{value:.4f} ± {error:.4f}" if isinstance(error, float) else f"{value:.4f}"
