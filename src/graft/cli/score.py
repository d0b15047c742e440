"""graft score: count right answers in a file of outputs, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_facts, print_json


def command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Outputs: JSON, JSON lines, CSV, or text with one per line.")
    ],
    task: Annotated[str, typer.Option("--task", help="The benchmark that was answered.")],
    protocol: Annotated[
        str, typer.Option("--protocol", help="How outputs are judged: llm-adapters, strict, math-verify, bleu.")
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", help="Where the right answers are, if not in FILE.", show_default=False),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", help="Column of the outputs.", show_default=False)] = None,
    gold: Annotated[str | None, typer.Option("--gold", help="Column of the right answers.", show_default=False)] = None,
    candidate: Annotated[
        str | None, typer.Option("--contestant", help="Whose answers, where FILE has several.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a file of outputs under a protocol: correct, wrong, unextractable, and the interval."""
    from graft.evaluation import tasks
    from graft.evaluation.outputs import read_outputs
    from graft.evaluation.scoring import output_protocol, score

    chosen = tasks.get(task)
    rules = output_protocol(protocol, chosen)
    found = score(chosen, rules, read_outputs(file, chosen, data, output=output, gold=gold, candidate=candidate))
    if as_json:
        print_json(found)
    else:
        print_facts({name.replace("_", " "): _shown(value) for name, value in found.items()})


def _shown(value: Any) -> Any:
    """Shares and scores with four digits, intervals as two of them."""
    if isinstance(value, list):
        return " - ".join(str(_shown(each)) for each in value)
    return f"{value:.4f}" if isinstance(value, float) else value
