"""graft show: show runs, results, or the lists that Graft knows (presets, kinds, tasks, schema)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_facts, print_json, print_table
from graft.cli.evaluations import CsvFile, LatexFile, write_files
from graft.cli.federate import FEDERATION, show_folder
from graft.cli.wording import rounded
from graft.utils.clock import describe_times
from graft.utils.terminal import visible


def command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[WHAT]",
            help="A folder of runs, a run folder, the folder of a federation, a folder of results, a preset, or one of: presets, studies, "
            "kinds, tasks, schema.",
        ),
    ] = "runs",
    curve: Annotated[
        Path | None,
        typer.Option(
            "--curve", help="Also write the loss curve of a run to this file (png, svg or pdf).", show_default=False
        ),
    ] = None,
    csv: CsvFile = None,
    latex: LatexFile = None,
    as_json: AsJson = False,
) -> None:
    """Show the runs in a folder, one run with its results, or a list.

    The lists are: presets (named adapter settings), studies (Graft's own, for graft study), kinds (adapter kinds with their
    settings), tasks (benchmarks with their protocols) and schema (the JSON schema of a run's YAML).

    Example: graft show runs/math
    """
    lists = {"presets": _presets, "studies": _studies, "kinds": _kinds, "tasks": _tasks, "schema": _schema}
    is_run, is_result = (Path(what) / "config.yaml").is_file(), Path(what).is_dir() and _holds_results(Path(what))
    _refuse_files(what, None if is_run else curve, None if is_run or is_result else csv or latex)
    if what in lists and not Path(what).exists():
        lists[what](as_json)
    elif not Path(what).exists() and what in _preset_names():
        _presets(as_json, what)
    elif is_run:
        _one_run(Path(what), as_json, curve)
        write_files(_saved(Path(what) / "eval"), csv, latex)
    elif (Path(what) / FEDERATION).is_file():
        show_folder(Path(what), as_json)
    elif not Path(what).is_dir():
        from graft.errors import GraftError, did_you_mean

        near = did_you_mean(what, (*lists, *_preset_names()))
        raise GraftError(f"there is no folder {what}.{near} The lists are: {', '.join(lists)}")
    elif is_result:
        _results(Path(what), as_json)
        write_files(_saved(Path(what)), csv, latex)
    else:
        _runs(Path(what), as_json)


def _refuse_files(what: str, curve: Path | None, table: Path | None) -> None:
    """Raise `GraftError` for a file of something that WHAT does not have."""
    from graft.errors import GraftError

    if curve is not None:
        raise GraftError(f"--curve is for the losses of one run, and {what} is none: graft show RUN --curve {curve}")
    if table is not None:
        raise GraftError(f"--csv and --latex are for results of evaluations, and {what} holds none")


def _saved(folder: Path) -> list[Any]:
    from graft.evaluation.tables import saved_results

    return saved_results(folder)


def _runs(folder: Path, as_json: bool) -> None:
    from graft.runs.folder import find_runs

    found = [_summary_or_damage(run.path) for run in find_runs(folder)]
    if as_json:
        print_json(found)
        return
    for path in sorted(folder.glob(f"*/{FEDERATION}")):
        typer.echo(f"federation: {path.parent} (graft show {path.parent})")
    if not found:
        typer.echo(f"No runs in {folder}.")
    else:
        columns = ("run", "state", "base", "adapter", "run step", "loss", "updated")
        rows = [
            [run["run"], run["status"].get("state"), run["base"], run["adapter"], *_progress(run), _minute(run)]
            for run in found
        ]
        print_table(columns, rows)


def _summary_or_damage(folder: Path) -> dict[str, Any]:
    """The summary of a run or, of one whose files cannot be read, what is wrong; the other runs are shown all the same."""
    from graft.errors import GraftError
    from graft.runs.summary import summary

    try:
        return summary(folder)
    except (GraftError, OSError, UnicodeDecodeError) as error:
        typer.echo(f"damaged: {folder}: {error}", err=True)
        damaged = {"state": "damaged", "error": str(error)}
        return {"run": str(folder), "base": None, "adapter": None, "status": damaged, "last_metrics": {}}


def _progress(run: dict[str, Any]) -> tuple[Any, Any]:
    loss = run["last_metrics"].get("loss")
    step = run["status"].get("step", run["last_metrics"].get("step"))
    return step, f"{loss:.4f}" if isinstance(loss, float) else loss


def _minute(run: dict[str, Any]) -> str:
    return str(run["status"].get("updated", ""))[:16].replace("T", " ")


def _one_run(folder: Path, as_json: bool, curve: Path | None) -> None:
    from graft.cli.curve import draw, save
    from graft.runs.curves import loss_curves
    from graft.runs.folder import RunFolder
    from graft.runs.summary import summary

    run = summary(folder)
    curves = loss_curves(RunFolder(folder).metrics.read())
    if curve is not None:
        save(curves, curve)
    if as_json:
        print_json(run)
        return
    several = len(run["status"].get("jobs", ())) > 1
    listed = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in run.items()}
    counted_in = {"checkpoints": "checkpoints at run steps" if several else "checkpoints at steps"}
    print_facts(
        {counted_in.get(key, key): value for key, value in listed.items() if key not in ("status", "last_metrics")}
    )
    for title in ("status", "last_metrics"):
        typer.echo(f"\n{title.replace('_', ' ').capitalize()}")
        facts = {key: value for key, value in run[title].items() if key != "jobs"}
        if "time" in facts:
            facts["time"] = describe_times(facts["time"])
        if not several:  # both count the same steps
            facts.pop("job_step", None)
        names = {"step": "run step", "job_step": "job step"} if several else {}
        print_facts({f"  {names.get(key, key)}": rounded(value) for key, value in facts.items()})
        if len(run[title].get("jobs", ())) > 1:
            from graft.cli.jobs import show_jobs

            show_jobs(run[title])
    if drawn := draw(curves):
        typer.echo(f"\nLoss\n{visible(drawn)}")
    if _holds_results(folder / "eval"):
        typer.echo("\nEvaluations")
        _results(folder / "eval", as_json)


def _holds_results(folder: Path) -> bool:
    """Whether the folder is that of one evaluation, finished or not, or holds such folders."""
    names = ("result.json", "answers.jsonl")
    return any((folder / name).is_file() or any(folder.glob(f"*/{name}")) for name in names)


def _results(folder: Path, as_json: bool) -> None:
    from graft.cli.evaluations import show_all
    from graft.evaluation.tables import saved_results, unfinished_folders

    found = saved_results(folder)
    if as_json:
        print_json(found)
        return
    show_all(found)
    for each in unfinished_folders(folder):
        typer.echo(f"not finished: {each}; give the same command again to continue it")


def _tasks(as_json: bool) -> None:
    from graft.evaluation.protocols import defined_for
    from graft.evaluation.tasks import GROUPS, TASKS

    if as_json:
        listed = {task.name: {"files": task.places, "protocols": defined_for(task)} for task in TASKS.values()}
        print_json({"tasks": listed, "groups": GROUPS})
        return
    rows = [[task.name, task.answer, ", ".join(defined_for(task)), task.places[0]] for task in TASKS.values()]
    print_table(("task", "answer", "protocols", "file below --data"), rows)
    print_facts({name: ", ".join(members) for name, members in GROUPS.items()})


def _preset_names() -> tuple[str, ...]:
    from graft.adapters.presets import presets

    return presets()


def _presets(as_json: bool, name: str | None = None) -> None:
    from graft.adapters.presets import parts_of, presets

    found = {each: parts_of(each) for each in ([name] if name is not None else presets())}
    if as_json:
        print_json(found)
        return
    for each, parts in found.items():
        typer.echo(each)
        for part in parts:
            typer.echo("  " + ", ".join(f"{key} {value}" for key, value in part.items()))


def _studies(as_json: bool) -> None:
    from graft.study.definition import PRESETS, presets

    texts = {name: (PRESETS / f"{name}.yaml").read_text(encoding="utf-8") for name in presets()}
    if as_json:
        print_json(texts)
        return
    for name, text in texts.items():
        said = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        typer.echo(f"{name}\n  " + "\n  ".join(said))
    typer.echo("\nRun one with: graft study NAME. Its YAML: graft show studies --json")


def _kinds(as_json: bool) -> None:
    from graft.adapters.registry import kinds

    if as_json:
        print_json({name: kind.model_json_schema() for name, kind in kinds().items()})
        return
    for name, kind in kinds().items():
        first = (kind.__doc__ or "").strip().splitlines()[0]
        typer.echo(f"{name}: {first}{f' ({kind.source})' if kind.source else ''}")
        fields = {key: field for key, field in kind.model_fields.items() if key != "kind"}
        print_facts(
            {
                f"  {key}={field.get_default(call_default_factory=True)!r}": field.description
                for key, field in fields.items()
            }
        )
        typer.echo()


def _schema(as_json: bool) -> None:
    from graft.config import schema

    print_json(schema())
