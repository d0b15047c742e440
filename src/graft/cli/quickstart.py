"""graft quickstart: train four kinds of adapter in minutes, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.common import STOPPED, AsJson, print_json, print_table

if TYPE_CHECKING:
    from graft.quickstart.tour import Tour


def command(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the data, the run, the results and the plot.")
    ] = Path("runs/quickstart"),
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Take seconds instead of minutes: everything runs, but little is learnt.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier quickstart left in the folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take a five-minute tour: train four kinds of adapter on the tiny base that ships with Graft, and compare them.

    It needs no download and no GPU. The kinds are LoRA, series, parallel and prefix.

    Example: graft quickstart --tiny
    """
    from graft.cli.loading import bar, quiet
    from graft.errors import MissingExtra
    from graft.quickstart.tour import run_tour

    quiet()
    tour = run_tour(
        out, tiny=tiny, overwrite=overwrite, say=lambda text: typer.secho(text, dim=True, err=True), bars=bar
    )
    if tour is None:
        raise typer.Exit(STOPPED)
    try:
        from graft.quickstart.plot import plot_tour

        plot: str = str(plot_tour(tour, out / "quickstart.png"))
    except MissingExtra as error:
        plot = f"not drawn: {error}"
    if as_json:
        print_json(
            {
                "seconds": tour.seconds,
                "plot": plot,
                "run": str(tour.run.path),
                **tour.result,
            }
        )
    else:
        _show(tour, plot, out)


def _show(tour: Tour, plot: str, out: Path) -> None:
    rows = []
    for score in tour.result["results"]:
        low, high = score["interval"]
        count = tour.parameters.get(score["name"])
        rows.append(
            (
                score["name"],
                None if count is None else f"{count:,}",
                f"{score['accuracy']:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{score['correct']} of {score['total']}",
            )
        )
    print_table(("", "parameters", "accuracy", "95 % interval", "solved"), rows, title="New word problems solved")
    typer.echo(f"The tour took {tour.seconds:.0f} seconds. Plot: {plot}\n\nNow try:")
    run = tour.run.path
    for line in (
        f"graft chat {run} --use lora --prompt 'Tom has 7 apples. He buys 5 more. How many apples does he have now?'",
        f"graft show {run}",
        f"graft merge {run} --use lora --to {out / 'merged'}",
    ):
        typer.echo(f"  {line}")
