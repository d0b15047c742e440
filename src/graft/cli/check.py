"""graft check: check a run before it takes hours."""

from __future__ import annotations

import shlex
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from graft.cli.common import AsJson, Changes, print_json, run_config
from graft.cli.launching import Processes, launch, several
from graft.cli.loading import Dtype
from graft.errors import GraftError, counted
from graft.utils import launched

if TYPE_CHECKING:
    from rich.console import Console

    from graft.data.overlap import OverlapReport
    from graft.training.check import CheckReport

SHOWN = 300
"""Most characters of a question that are printed."""


def command(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="A run folder, or the YAML file of a run. Not with --server.", show_default=False
        ),
    ] = None,
    changes: Changes = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="FILE|TASK",
            help="Search the training data for the questions of this test file, benchmark or group. Repeat it for several.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Folder with the files of the benchmarks of --against. Default: the hub.", show_default=False
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--server", metavar="URL", help="Check a server of OpenAI's API instead of a run.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", help="With --server: the adapter folder that it should apply.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="With --server: the adapter's base, unless it lies in a run.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="With --server: the adapter's name there. Default: its folder's name.", show_default=False
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="With --server: the bare base's name there.", show_default=False)
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="With --server: file of mode 600 with its token.", show_default=False),
    ] = None,
    dtype: Dtype = None,
    processes: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Check a run before training: settings, base, template, data, sites and one measured step.

    The step runs on the longest batch, and the adapter is saved and loaded again. The exit code is 2 if there is a problem.

    With --server, check whether a server applies an adapter as Graft does: its log-probabilities of 16 prompts are compared.

    Example: graft check run.yaml adapter.rank=32 --against gsm8k
    """
    of_servers = {"--adapter": adapter, "--base": base, "--model": model, "--base-model": base_model, "--token-file": token_file,
                  "--dtype": dtype}  # fmt: skip
    if server is not None:
        if target is not None or against or data is not None or several(processes):
            raise GraftError(
                "--server checks a server, so a run, --against, --data and --processes have no effect: leave them out"
            )
        from graft.cli.check_server import check

        check(server, adapter, base, model, base_model, token_file, dtype, as_json)
        return
    if given := [name for name, value in of_servers.items() if value is not None]:
        raise GraftError(f"{', '.join(given)} has no effect without --server: leave it out")
    if target is None:
        raise GraftError("name a run folder or the YAML of a run, or a server with --server URL --adapter DIR")
    if data is not None and not against:
        raise GraftError("--data needs --against, which names the benchmarks to look for: --against gsm8k")
    launch(processes)
    from graft.distributed.group import together
    from graft.evaluation.overlaps import questions_against
    from graft.evaluation.settings import refuse_unusable
    from graft.training import check_each

    with together() as group:
        config = run_config(target, changes)
        refuse_unusable(config)
        group.remedy = "Nothing is changed: check it again"
        group.wait_at_most(config.distributed.timeout)
        reports = check_each(config, questions_against(against or (), data), group)
    many = len(reports) > 1
    if as_json:
        found = {name: report.to_dict() for name, report in reports.items()}
        print_json({"jobs": found} if many else next(iter(found.values())))
    else:
        for name, report in reports.items():
            _show(report, name if many else None)
        if not any(report.problems for report in reports.values()):
            typer.secho("No problems found. ", fg=typer.colors.GREEN, bold=True, nl=False)
            typer.echo(f"Start with: {_start(target, changes or [])}")
    if any(report.problems for report in reports.values()):
        raise typer.Exit(2)


def _show(report: CheckReport, job: str | None) -> None:
    """Print the report of one job. job: its name, if the run has several."""
    from graft.distributed.sharded import streamed
    from graft.training.start import reference_note
    from graft.utils.terminal import console as make_console

    console = make_console(highlight=False)
    if job is not None:
        console.rule(f"[bold]Job {escape(job)}[/]")
    parts, base = report.parts, report.base
    console.print(
        f"[bold]Base[/]      {escape(parts.base.name)}: {base.parameters:,} parameters, {base.num_bytes / 1e6:,.1f} MB, on {base.device}"
    )
    if (held := report.quantised) is not None:
        console.print(f"[bold]Quantised[/] {escape(str(held))}")
        if held.kept_note is not None:
            console.print(f"            {escape(held.kept_note)}")
    if (blocks := streamed(parts.base.model)) is not None:
        console.print(f"[bold]Offloaded[/] {blocks}")
    if (coupling := parts.config.base.reversible) is not None:
        every = parts.config.base.anchor_every
        anchors = "no anchors" if every is None else f"anchors every {counted(every, 'block')}"
        console.print(f"          reversible ({coupling}, {anchors}), gradients proved")
    template, task = parts.data.template, parts.base.task
    if task in ("classification", "regression"):
        fresh = (
            ", with a fresh head that is saved with the adapter" if parts.base.fresh else ", with the base's own head"
        )
        console.print(f"[bold]Task[/]      {task}: {escape(template.name)}{fresh}")
    else:
        learnt = "the answer" if task == "seq2seq" else parts.members[0].config.data.train_on
        if (objective := parts.members[0].config.train.objective) is not None:
            what = {"kto": "answers marked good or bad", "consistency": f"{learnt} in two passes"}
            learnt = f"{what.get(objective.kind, 'chosen versus rejected answers')} ({objective.kind})"
        console.print(f"[bold]Template[/]  {escape(template.name)} ({template.digest[:12]}), trained on: {learnt}")
    if (note := reference_note(parts.members[0].config)) is not None:
        console.print(f"[bold]Reference[/] {escape(note)}")
    console.print(parts.data.report)
    _show_samples(report, console)
    console.print("\n[bold]Sites[/]")
    console.print(str(report.sites), soft_wrap=True, markup=False)
    _show_trial(report, console, "step" if job is None else "job step")
    for name, found in report.overlaps.items():
        console.print(f"[bold]Overlap[/]   {escape(f'{name}: {found}')}")
        _show_pairs(found, console)
    for problem in report.problems:
        console.print(f"[bold red]Problem[/]   {escape(problem)}")
    for question in report.questions:
        console.print(f"[bold yellow]Question[/]  {escape(question)}")


def _start(target: Path, changes: list[str]) -> str:
    """Return the command that trains what was checked. A run folder is not trained into again, so it gets a new one."""
    changes = [*changes, *(["--processes", str(launched.size())] if launched.size() > 1 else [])]
    new = ["--out", f"{target.resolve().with_name(target.resolve().name + '-2')}"] if target.is_dir() else []
    return shlex.join(["graft", "train", str(target), *changes, *new])


def _show_samples(report: CheckReport, console: Console) -> None:
    from graft.data.inspect import coloured
    from graft.training.check import SAMPLES_SHOWN

    data = report.parts.data.train
    console.print("\n[bold]Samples[/]   dim text is only read, [bold green]green text is trained on[/]")
    for index in range(min(SAMPLES_SHOWN, len(data))):
        example = data[index]
        console.rule(
            escape(f"{example.source}:{example.row}, {counted(len(example), 'token')}")
            + ("" if example.label is not None else f", {example.num_targets} trained on"),
            style="dim",
        )
        marks, classes = not console.color_system, report.parts.data.classes
        console.print(coloured(example, report.parts.base.tokenizer, marks=marks, classes=classes))
    console.rule(style="dim")


def _show_trial(report: CheckReport, console: Console, unit: str) -> None:
    trial, job, layout = report.trial, report.parts.jobs[0], report.layout
    why = f" ({layout.reason})" if layout.reason else ""
    console.print(f"\n[bold]Layout[/]    {layout.layout} batches{why}")
    console.print(
        f"[bold]Trial[/]     longest batch: {counted(trial.tokens, 'token')} (longest sample: {trial.longest:,}), loss {trial.loss:.4f}, "
        f"{trial.tokens / trial.seconds:,.0f} tokens/s, peak memory {trial.peak_bytes / 1e9:.2f} GB"
    )
    named = {"optimizer": "optimiser state"}
    parts = {named.get(name, name): size for name, size in vars(trial.memory).items() if size}
    parts["for the moment, or of the process itself"] = max(0, trial.peak_bytes - sum(parts.values()))
    console.print(f"[bold]Memory[/]    {', '.join(f'{size / 1e6:,.1f} MB {name}' for name, size in parts.items())}")
    if trial.compile_seconds is not None:
        console.print(
            f"[bold]Compiled[/]  in {trial.compile_seconds:.0f} s; losses and gradients equal those of eager code"
        )
    if trial.kernels != "torch":
        console.print(f"[bold]Kernels[/]   {trial.kernels}")
    console.print(f"[bold]Run[/]       {counted(job.steps, unit)}, about {_duration(trial.hours * 3600)}")
    if report.stop_rate is not None:
        console.print(
            f"[bold]Ends[/]      before training, {report.stop_rate:.0%} of answers would end where they end in the data{_written(report)}"
        )
    if report.dealt is not None:
        console.print(f"[bold]Dealt[/]     {escape(report.dealt)}")
        each = ((rank, it.tokens / it.seconds, it.peak_bytes / 1e9) for rank, it in report.ranks.items())
        said = (f"{rank}: {speed:,.0f} tokens/s, peak memory {peak:.2f} GB" for rank, speed, peak in each)
        console.print(f"[bold]Processes[/] {'; '.join(said)}")
    what = "adapter" if job.trainable.adapter is not None else "model"
    console.print(f"[bold]Reload[/]    a saved and loaded {what} differs by {report.reload_difference:.2g}")


def _written(report: CheckReport) -> str:
    ends = report.ends
    if ends is None:
        return ""
    return f"; {ends['ended']} of {counted(ends['asked'], 'written answer')} end by themselves within {ends['max_new_tokens']} tokens"


def _show_pairs(found: OverlapReport, console: Console) -> None:
    """Print an example of an exact overlap and one of a near overlap, the least similar."""
    for exact in (True, False):
        pair = next((pair for pair in found.examples if pair.exact == exact), None)
        if pair is not None:
            kind = "exact" if exact else f"near, {pair.similarity:.2f}"
            console.print(f"            {kind}")
            for side, asked in (("test", pair.tested), ("train", pair.trained)):
                console.print(
                    f"              {side:<5}  {escape(shorten(asked.text, SHOWN))}  [dim]({escape(asked.where)})[/]"
                )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
