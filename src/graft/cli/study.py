"""graft study: run the trials of a study together, and write its report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import STOPPED, AsJson, Changes, print_json, print_table

JOIN = "join"
"""In place of a study: work on the one in a folder."""


def command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="STUDY",
            help="The YAML of a study, one of Graft's own (see graft show studies), or 'join' and the folder of a study.",
            show_default=False,
        ),
    ],
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Study folder to write. Default: runs/<name of the YAML>.", show_default=False
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study that is in the folder.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only check the study, and say what it would run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a study: many trials of one run that differ in some settings, trained together, and compared fairly.

    The trials share passes of the base where they can. A trial that fails is noted, and the study goes on. After Ctrl-C or a kill,
    --resume continues it. 'graft study join FOLDER' lets another process work on it too. report.html is kept up to date.

    Example: graft study llm-adapters-placement seeds=[0] train.steps=40
    """
    from graft.errors import GraftError
    from graft.study.folder import begin, join
    from graft.study.report.writing import write_reports
    from graft.study.running import Stopped

    def say(text: str) -> None:
        typer.echo(text, err=True)

    given = list(changes or ())
    joined = target == JOIN and not Path(target).exists()
    if joined:
        if len(given) != 1 or out is not None or check:
            raise GraftError("to join a study, give its folder and nothing else: graft study join FOLDER")
        folder = Path(given[0])
        runner = join(folder, say=say)
    elif check:
        _check(target, given, as_json)
        return
    else:
        folder = out or Path("runs") / Path(target).stem
        runner = begin(target, given, folder, resume=resume, say=say)
    write_reports(runner.study, runner.store, folder)
    try:
        runner.run(lambda: write_reports(runner.study, runner.store, folder))
    except (Stopped, KeyboardInterrupt):
        write_reports(runner.study, runner.store, folder)
        again = [JOIN, str(folder)] if joined else [target, *given, "--out", str(folder), "--resume"]
        typer.echo(f"Stopped; everything is saved. Go on with: graft study {shlex.join(again)}", err=True)
        raise typer.Exit(STOPPED) from None
    report = write_reports(runner.study, runner.store, folder)
    if as_json:
        print_json({"study": str(folder), **report})
    else:
        show(report)
        typer.echo(f"report: {folder / 'report.html'}")


def _check(target: str, changes: list[str], as_json: bool) -> None:
    import tempfile

    from graft.study.definition import read_study
    from graft.study.points import check, in_words, points_of
    from graft.study.problems import with_problems

    with tempfile.TemporaryDirectory() as scratch:
        study = with_problems(read_study(target, changes), Path(scratch))
        configs = check(study)
    search = study.config.search
    points = [in_words(each) for each in points_of(study)] if search is None else []
    count = (len(points) if search is None else search.budget) * len(study.config.seeds)
    if as_json:
        print_json({"study": study.name, "trials": count, "points": points, "checked": len(configs)})
        return
    for point in points:
        typer.echo(point)
    typer.echo(f"{count} trials; the settings of each are valid")


def show(report: dict[str, Any]) -> None:
    """Print the ranking of a report."""
    columns = (
        "rank",
        "setting",
        report["objective"],
        "95 % interval",
        "trials",
        "parameters",
        "p against the best (Holm)",
    )
    rows = [
        [
            row["rank"],
            row["setting"],
            row["shown"],
            row["interval_shown"],
            row["trials"],
            row["parameters_shown"],
            row["p_shown"],
        ]
        for row in report["ranking"]
    ]
    print_table(columns, rows)
    for note in report["notes"]:
        typer.echo(note)
