"""Print the results of evaluations, for `graft eval`, which makes them, and for `graft show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import print_table
from graft.cli.wording import between, counted, rounded

COUNTS = {
    "wrong": "wrong", "unextractable": "unextractable", "no_room": "no room", "truncated": "truncated", "f1": "F1",
    "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman", "stop_rate": "stopped", "tokens": "tokens",
    "text_bleu": "BLEU",
    "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "perplexity": "perplexity",
    "loss": "loss", "gained": "gained", "margin": "margin",
}  # fmt: skip
"""Key of a score in a result -> the heading of its column. Only the columns that a result has are printed."""
SHOWN_CLASSES = 12
"""Most classes of a confusion matrix that is printed."""


CsvFile = Annotated[
    Path | None,
    typer.Option("--csv", help="Also write the table of scores and intervals to this CSV file.", show_default=False),
]
LatexFile = Annotated[
    Path | None,
    typer.Option("--latex", help="Also write the table to this file, in LaTeX for booktabs.", show_default=False),
]


def write_files(results: Sequence[Mapping[str, Any]], csv: Path | None, latex: Path | None) -> None:
    """Write the results side by side to the files that are named."""
    from graft.evaluation.table_files import write_tables
    from graft.evaluation.tables import group_tables

    write_tables(group_tables(results), csv, latex)


def show(result: Mapping[str, Any]) -> None:
    """Print the table of one result, and below it how the scores were measured."""
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
            missing, total = each["total"] - each["loss_samples"], counted(each["total"], "sample")
            typer.echo(f"{each['name']}: {missing} of {total} too long for the context and left out of the loss")
    for each in found:
        _show_confusion(each)
    if "majority" in result:
        majority = result["majority"]
        typer.echo(f"always {majority['label']!r}, the most frequent class: accuracy {majority['accuracy']:.1%}")
    show_overlap(result)
    if result.get("folder"):
        typer.echo(f"{result['folder']}/result.json, answers.jsonl")


def _show_confusion(each: Mapping[str, Any]) -> None:
    """Print the confusion matrix, unless it has too many classes."""
    table = each.get("confusion")
    if table and len(table) <= SHOWN_CLASSES:
        rows = [[right, *(f"{count:,}" for count in given.values())] for right, given in table.items()]
        print_table(["true / predicted", *table], rows, title=each["name"])


def show_all(results: Sequence[Mapping[str, Any]]) -> None:
    """Print all results side by side, one table per protocol."""
    from graft.evaluation.tables import group_tables

    for table in group_tables(results):
        typer.echo()
        print_table(["task", "questions", *table.candidates], table.rows(), title=f"protocol {table.protocol}")


def show_absent(absent: Sequence[Mapping[str, str]]) -> None:
    """Print the tasks that were asked for but could not be evaluated."""
    for each in absent:
        typer.echo(f"not evaluated: {each['task']}: {each['reason']}")


def _row(each: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    if "bleu" in each:
        score = [each["total"], f"{each['bleu']:.2f}", between(each["interval"], "{:.2f}")]
    elif "accuracy" in each:
        score = [f"{each['correct']}/{each['total']}", f"{each['accuracy']:.1%}", between(each["interval"], "{:.1%}")]
    else:
        score = [each["total"]]
    normalised = [f"{each['normalised']['accuracy']:.1%}"] if "normalised" in each else []
    return [each["name"], *score, *normalised, *(_count(name, each) for name in names)]


def _count(name: str, each: Mapping[str, Any]) -> str | None:
    value, interval = each.get(name), each.get(f"{name}_interval")
    if value is None:
        return None
    text = f"{value:.0%}" if name == "stop_rate" else rounded(value) if isinstance(value, float) else f"{value:,}"
    return text if interval is None else f"{text} ({between(interval, '{:.2f}')})"


def _how(result: Mapping[str, Any]) -> str:
    """Say in one line how a result was measured: protocol, decoding, self-check, tokens, time."""
    protocol = result["protocol"]
    decoding = protocol.get("decoding")
    parts = [f"{protocol['metric']} match" if "metric" in protocol else f"protocol {protocol['name']}"]
    if decoding is not None:
        parts.append("greedy" if decoding["beams"] == 1 else f"{decoding['beams']} beams")
        parts.append(f"at most {counted(decoding['max_new_tokens'], 'token')}")
    elif "classes" in protocol:
        parts.append("the likeliest class" if protocol["classes"] else "values")
    else:
        parts.append("choices ranked by likelihood")
    tokens = sum(each.get("tokens", 0) for each in result["results"])
    checked = result["self_checked"]
    check = (
        ""
        if checked is None
        else f"self-check on {counted(checked, 'prompt' if decoding is not None else 'question')}; "
        if checked
        else f"no self-check in {result['dtype']}; "
    )
    made = "" if "classes" in protocol else f"{counted(tokens, 'token')} in "
    limit = result.get("limit")
    first = f"the first {'question' if limit == 1 else f'{limit:,} questions'}; " if limit else ""
    kept = f", {counted(result['continued_from'], 'answer')} reused" if result.get("continued_from") else ""
    return f"{', '.join(parts)}; {result['protocol_hash']}; {first}{check}{made}{result['seconds']:.1f} s{kept}"


def show_overlap(result: Mapping[str, Any]) -> None:
    """Print how many of the questions are in the training data of the adapters that answered them."""
    for each in result.get("overlap", ()):
        place = f"the training data of {', '.join(each['of'])}"
        if "unknown" in each:
            typer.echo(f"overlap with {place} is unknown: {each['unknown']}")
        elif each["exact"] + each["near"]:
            typer.echo(
                f"overlap: {each['exact']:,} of {counted(each['questions'], 'question')} word for word in {place}, and {each['near']:,} "
                f"more similar to one there (similarity at least {each['threshold']:g})"
            )
        else:
            typer.echo(f"overlap: none of {counted(each['questions'], 'question')} in {place}")
