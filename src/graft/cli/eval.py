"""graft eval: how well the base and its adapters answer the questions of a data file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graft.cli.bench import (
    Adapters,
    AnyBase,
    BaseName,
    Device,
    Dtype,
    RunFolderArgument,
    TemplateName,
    bar,
    load_bench,
)
from graft.cli.common import AsJson, print_json, print_table


def command(
    run: RunFolderArgument = None,
    base: BaseName = None,
    adapter: Adapters = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="A data file or hub name; a run's own validation data by default.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Rows, from the start.", show_default=False)
    ] = None,
    metric: Annotated[
        Literal["auto", "exact", "numeric"] | None,
        typer.Option("--metric", help="Compare whole texts, or last numbers.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.", show_default=False)
    ] = None,
    token_budget: Annotated[
        int | None, typer.Option("--token-budget", min=1, help="Tokens per batch.", show_default=False)
    ] = None,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beams of the search; 1 is greedy.")] = 1,
    template: TemplateName = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of results; by default eval/ in the run, else here.", show_default=False),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate the bare base and all adapters on a data file: accuracy with its interval, and the loss."""
    from graft.config.schema import EvalConfig
    from graft.errors import GraftError

    if run is None and data is None:
        raise GraftError("name the data to evaluate on: --data FILE")
    bench = load_bench(run, base, adapter, template, device, dtype, any_base)
    from graft.evaluation import evaluate_on

    own = bench.config.eval if bench.config is not None else EvalConfig()
    given = {"limit": limit, "metric": metric, "max_new_tokens": max_new_tokens, "token_budget": token_budget}
    settings = own.model_copy(update={key: value for key, value in given.items() if value is not None})
    folder = out or (run / "eval" if run is not None else Path("eval"))
    with bar("Answering") as progress:
        result = evaluate_on(bench, data, folder, settings=settings, beams=beams, progress=progress)
    if as_json:
        print_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """The table of a result, and what a reader must know of it."""
    protocol = result["protocol"]
    columns = (
        "",
        "correct",
        "accuracy",
        "95 % interval",
        "wrong",
        "unextractable",
        "no room",
        "truncated",
        "stopped",
        "loss",
    )
    rows = []
    for each in result["results"]:
        low, high = each["interval"]
        rows.append(
            [
                each["name"],
                f"{each['correct']}/{each['total']}",
                f"{each['accuracy']:.1%}",
                f"{low:.1%} - {high:.1%}",
                *(each[key] for key in ("wrong", "unextractable", "no_room", "truncated")),
                f"{each['stop_rate']:.0%}",
                None if each["loss"] is None else f"{each['loss']:.4f}",
            ]
        )
    print_table(columns, rows)
    decoding = protocol["decoding"]
    how = "greedy" if decoding["beams"] == 1 else f"{decoding['beams']} beams"
    checked = (
        f"self-check on {result['self_checked']} prompts" if result["self_checked"] else "no self-check in bfloat16"
    )
    tokens = sum(each["tokens"] for each in result["results"])
    typer.echo(
        f"{result['task']}: {protocol['metric']} match, {how}, at most {decoding['max_new_tokens']} tokens; protocol "
        f"{result['protocol_hash']}; {checked}; {tokens:,} tokens in {result['seconds']:.1f} s"
    )
    for each in result["results"]:
        if each["loss_samples"] < each["total"]:
            missing = each["total"] - each["loss_samples"]
            typer.echo(
                f"{each['name']}: {missing} of {each['total']} samples do not fit into the context; the loss is without them"
            )
    if result["folder"]:
        typer.echo(f"{result['folder']}/result.json, answers.jsonl")
