"""graft score: score a file of outputs without running a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_facts, print_json
from graft.cli.wording import between


def command(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The outputs: JSON, JSON lines, CSV, or text with one output per line."),
    ],
    task: Annotated[
        str, typer.Option("--task", help="Benchmark that the outputs answer (graft show tasks lists them).")
    ],
    protocol: Annotated[
        str, typer.Option("--protocol", help="Rules that judge the outputs: llm-adapters, strict, math-verify, bleu.")
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", help="File or folder with the right answers, if FILE has none.", show_default=False),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Column of FILE that holds the outputs.", show_default=False)
    ] = None,
    gold: Annotated[
        str | None, typer.Option("--gold", help="Column of FILE that holds the right answers.", show_default=False)
    ] = None,
    candidate: Annotated[
        str | None,
        typer.Option(
            "--contestant",
            help="Score the answers of this adapter, if FILE holds those of several ('base': the bare base).",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a file of outputs on a benchmark, without running a model.

    The result counts correct, wrong and unextractable outputs and gives the accuracy with its 95 % interval.

    Example: graft score outputs.jsonl --task gsm8k --protocol strict
    """
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
    """Format a score with four digits, and an interval as two of them."""
    if isinstance(value, list):
        return between(value, "{:.4f}")
    return f"{value:.4f}" if isinstance(value, float) else value
