"""How results of evaluations are printed, by the verb that makes them and by the one that shows them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from graft.cli.common import print_table

COUNTS = {
    "wrong": "wrong", "unextractable": "unextractable", "no_room": "no room", "truncated": "truncated", "f1": "F1",
    "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman", "stop_rate": "stopped", "tokens": "tokens",
    "text_bleu": "BLEU", "loss": "loss", "gained": "gained", "margin": "margin",
}  # fmt: skip
"""Columns, where a result has them."""
SHOWN_CLASSES = 12


def show(result: Mapping[str, Any]) -> None:
    """The table of one result, and what a reader must know of it."""
    found = result["results"]
    names = [name for name in COUNTS if any(name in each for each in found)]
    columns = [""]
    columns += ["questions", "BLEU", "95 % interval"] if "bleu" in found[0] else []
    columns += ["correct", "accuracy", "95 % interval"] if "accuracy" in found[0] else []
    columns = columns if len(columns) > 1 else ["", "questions"]
    columns += ["by length"] if "normalised" in found[0] else []
    print_table([*columns, *(COUNTS[name] for name in names)], [_row(each, names) for each in found])
    typer.echo(f"{result['task']}: {_how(result)}")
    for each in found:
        if each.get("loss_samples", each["total"]) < each["total"]:
            missing = each["total"] - each["loss_samples"]
            typer.echo(
                f"{each['name']}: {missing} of {each['total']} samples do not fit into the context; the loss is without them"
            )
    for each in found:
        _show_confusion(each)
    show_overlap(result)
    if result.get("folder"):
        typer.echo(f"{result['folder']}/result.json, answers.jsonl")


def _show_confusion(each: Mapping[str, Any]) -> None:
    """How often each class was given for each right one, where they are few."""
    table = each.get("confusion")
    if table and len(table) <= SHOWN_CLASSES:
        rows = [[right, *(f"{count:,}" for count in given.values())] for right, given in table.items()]
        print_table(["right \\ given", *table], rows, title=each["name"])


def show_all(results: Sequence[Mapping[str, Any]]) -> None:
    """All results side by side, a table per protocol."""
    from graft.evaluation.tables import sides

    for side in sides(results):
        typer.echo()
        print_table(["task", "questions", *side.candidates], side.rows(), title=f"protocol {side.protocol}")


def show_absent(absent: Sequence[Mapping[str, str]]) -> None:
    """The tasks that were asked for and are not in the results."""
    for each in absent:
        typer.echo(f"not evaluated: {each['task']}, for {each['reason']}")


def _row(each: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    if "bleu" in each:
        score = [each["total"], f"{each['bleu']:.2f}", _range(each["interval"], "{:.2f}")]
    elif "accuracy" in each:
        score = [f"{each['correct']}/{each['total']}", f"{each['accuracy']:.1%}", _range(each["interval"], "{:.1%}")]
    else:
        score = [each["total"]]
    normalised = [f"{each['normalised']['accuracy']:.1%}"] if "normalised" in each else []
    return [each["name"], *score, *normalised, *(_count(name, each) for name in names)]


def _count(name: str, each: Mapping[str, Any]) -> str | None:
    value, interval = each.get(name), each.get(f"{name}_interval")
    if value is None:
        return None
    text = f"{value:.0%}" if name == "stop_rate" else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
    return text if interval is None else f"{text} ({_range(interval, '{:.2f}')})"


def _range(interval: Sequence[float] | None, form: str) -> str | None:
    return None if interval is None else " - ".join(form.format(each) for each in interval)


def _how(result: Mapping[str, Any]) -> str:
    protocol = result["protocol"]
    decoding = protocol.get("decoding")
    parts = [f"{protocol['metric']} match" if "metric" in protocol else f"protocol {protocol['name']}"]
    if decoding is not None:
        parts.append("greedy" if decoding["beams"] == 1 else f"{decoding['beams']} beams")
        parts.append(f"at most {decoding['max_new_tokens']} tokens")
    elif "classes" in protocol:
        parts.append("the likeliest class" if protocol["classes"] else "values")
    else:
        parts.append("choices ranked by likelihood")
    tokens = sum(each.get("tokens", 0) for each in result["results"])
    checked = result["self_checked"]
    check = (
        ""
        if checked is None
        else f"self-check on {checked} {'prompts' if decoding is not None else 'questions'}; "
        if checked
        else f"no self-check in {result['dtype']}; "
    )
    made = "" if "classes" in protocol else f"{tokens:,} tokens in "
    first = f"the first {result['limit']:,} questions; " if result.get("limit") else ""
    kept = f", {result['continued_from']} answers were there" if result.get("continued_from") else ""
    return f"{', '.join(parts)}; {result['protocol_hash']}; {first}{check}{made}{result['seconds']:.1f} s{kept}"


def show_overlap(result: Mapping[str, Any]) -> None:
    """What is known of the questions in the training data."""
    for each in result.get("overlap", ()):
        whose = f"the training data of {', '.join(each['of'])}"
        if "unknown" in each:
            typer.echo(f"overlap with {whose} is not known: {each['unknown']}")
        elif each["exact"] + each["near"]:
            typer.echo(
                f"overlap: of {each['questions']:,} questions {each['exact']:,} stand in {whose}, and {each['near']:,} more "
                f"nearly (similarity at least {each['threshold']:g})"
            )
        else:
            typer.echo(f"overlap: of {each['questions']:,} questions none stands in {whose}")
