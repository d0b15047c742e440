"""graft eval: evaluate a base and its adapters on a data file, on benchmarks or on lm-eval's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graft.cli.common import AsJson, print_json
from graft.cli.eval_options import (
    refuse_for_labels,
    refuse_for_vllm,
    refuse_settings,
    refuse_several,
    refuse_template,
)
from graft.cli.evaluations import CsvFile, LatexFile, show, show_absent, show_all, write_files
from graft.cli.harness import ask_lm_eval
from graft.cli.launching import Processes, launch, several
from graft.cli.loading import (
    Adapters,
    AnyBase,
    BaseName,
    Device,
    Dtype,
    Fields,
    Resize,
    RunFolderArgument,
    TemplateName,
    bar,
    load_model,
    parse_fields,
)
from graft.utils import launched

if TYPE_CHECKING:
    from graft.config.eval import EvalConfig
    from graft.evaluation.limits import Limits
    from graft.generation.causal import CacheKind
    from graft.generation.loaded import LoadedModel


def command(
    run: RunFolderArgument = None,
    base: BaseName = None,
    adapter: Adapters = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Benchmarks and groups, separated by commas: gsm8k,arithmetic (graft show tasks lists them).",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="Prompts and rules of the benchmarks: llm-adapters, strict, math-verify, rank or bleu.",
            show_default=False,
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            "--harness",
            help="Tasks of lm-eval, separated by commas, with lm-eval's own prompts and rules.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="A data file or a data set on the hub. Default: the run's validation data. With --tasks, the folder with the "
            "benchmarks' files. Default: the hub.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            "--limit",
            metavar="ROWS[,TASK=ROWS]...",
            help="Evaluate only the first ROWS of each task, or 'all'; TASK=ROWS is for one task or group: 100,addsub=all.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        Literal["auto", "exact", "numeric", "text"] | None,
        typer.Option(
            "--metric",
            help="For data files: compare whole texts (exact), the numbers they give (numeric), or free text (text: BLEU, ROUGE and "
            "perplexity).",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", min=1, help="For data files: most new tokens of an answer.", show_default=False
        ),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            "--token-budget", min=1, help="Most tokens of a batch, padding and answers counted.", show_default=False
        ),
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(
            "--beams", min=1, help="For data files: beams of the beam search. Default: greedy.", show_default=False
        ),
    ] = None,
    engine: Annotated[
        Literal["graft", "vllm"],
        typer.Option("--engine", help="Program that generates the answers to benchmarks."),
    ] = "graft",
    cache: Annotated[
        Literal["dynamic", "static", "compiled"],
        typer.Option(
            "--cache",
            help="Key-value cache: dynamic grows per token, static has its full length at once, compiled is static under "
            "torch.compile.",
        ),
    ] = "dynamic",
    fields: Fields = None,
    template: TemplateName = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of results. Default: eval/ in the run folder, or here.", show_default=False),
    ] = None,
    csv: CsvFile = None,
    latex: LatexFile = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    resize: Resize = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard earlier answers and start again, instead of continuing.")
    ] = False,
    processes: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the bare base and all its adapters together and print their scores with 95 % intervals.

    They are evaluated on a data file (--data), on benchmarks (--tasks) or on tasks of lm-eval (--harness). Without any of these, a
    run is evaluated on its eval.tasks or its validation data. An interrupted evaluation continues when the command is given again,
    with any number of processes.

    Example: graft eval runs/math --tasks gsm8k --limit 100
    """
    from graft.errors import GraftError
    from graft.evaluation.limits import Limits

    overwrite = overwrite and not launched.restarts()  # a launcher that starts lost processes again repeats the command
    if run is None and data is None and tasks is None and harness is None:
        raise GraftError("name what to evaluate on: --data FILE, --tasks NAMES or --harness NAMES")
    renamed = parse_fields(fields)
    if renamed and (data is None or tasks is not None or harness is not None):
        raise GraftError("--fields renames the columns of a data file: name it with --data, or leave --fields out")
    own = _own_settings(run)
    if harness is not None and (tasks is not None or protocol is not None):
        raise GraftError("--harness has lm-eval's own tasks and rules: leave out --tasks and --protocol")

    # What to evaluate on. `wanted` is empty for lm-eval and for a data file.
    wanted: list[str] = []
    if harness is None and tasks is not None:
        wanted = tasks.split(",")
    elif harness is None and not (data is not None and Path(data).is_file()):
        wanted = own.tasks

    # Options that would have no effect there are errors.
    limits = Limits(own.limit) if limit is None else Limits.parse(limit, own.limit)
    given = {"metric": metric, "max_new_tokens": max_new_tokens, "token_budget": token_budget}
    changes = {key: value for key, value in given.items() if value is not None}
    if not wanted:
        limits.plain("lm-eval" if harness is not None else "a data file")
    settings = own.model_copy(update={**changes, "limit": limits.default})
    if wanted or harness is not None:
        refuse_settings({**changes, "beams": beams})
        refuse_template(template, protocol or own.protocol if wanted else "lm-eval")
    elif protocol is not None:
        raise GraftError("--protocol is for benchmarks: name them with --tasks, or in the run's eval.tasks")
    if engine == "vllm":
        refuse_for_vllm(bool(wanted), protocol or own.protocol, cache, device)
        # vLLM takes the GPU. Our copy of the base only provides its name, context and adapters, and generates nothing.
        device, dtype = "cpu", _dtype_for_vllm(run, dtype)
    elif harness is not None and cache != "dynamic":
        raise GraftError("--cache has no effect with --harness, because lm-eval generates by itself: leave it out")

    if several(processes):
        refuse_several(harness is not None, engine)
    launch(processes)
    from graft.distributed.group import together

    with together() as group:
        loaded = load_model(run, base, adapter, template, device, dtype, any_base, resize, group)
        loaded = _with_engine(loaded, engine, cache)
        folder = out or (run / "eval" if run is not None else Path("eval"))
        if harness is not None:
            names = [name.strip() for name in harness.split(",")]
            found = ask_lm_eval(
                loaded, names, data or own.data, folder, limit=settings.limit, overwrite=overwrite, as_json=as_json
            )
        elif wanted:
            refuse_for_labels(loaded, protocol)
            found = _benchmarks(
                loaded, wanted, protocol or own.protocol, data or own.data, folder, settings, limits, overwrite, as_json
            )
        else:
            found = _data_file(loaded, data, renamed, folder, settings, beams or 1, overwrite, as_json)
        if group.leads:
            write_files(found, csv, latex)


def _data_file(
    loaded: LoadedModel,
    data: str | None,
    renamed: dict[str, str],
    folder: Path,
    settings: EvalConfig,
    beams: int,
    overwrite: bool,
    as_json: bool,
) -> list[dict[str, Any]]:
    from graft.evaluation import evaluate_jobs
    from graft.evaluation.evaluating import given_source

    rows = given_source(data, loaded.config, renamed, settings.limit) if data is not None and renamed else data
    with bar("Answering") as progress:
        found = evaluate_jobs(
            loaded, rows, folder, settings=settings, beams=beams, progress=progress, overwrite=overwrite
        )
    if as_json:
        print_json(found[0] if len(found) == 1 else {"evaluations": found})
    for result in found if not as_json else ():
        show(result)
    return found


def _own_settings(run: Path | None) -> EvalConfig:
    from graft.config.eval import EvalConfig
    from graft.runs.folder import RunFolder

    return RunFolder(run).existing().eval_settings() if run is not None else EvalConfig()


def _dtype_for_vllm(run: Path | None, dtype: Dtype) -> Dtype:
    """Return the dtype for vLLM. `auto` becomes bfloat16, as in Graft's own generation on a GPU."""
    from graft.runs.folder import RunFolder

    own = None if run is None else RunFolder(run).existing().config.base.dtype
    named = dtype if dtype not in (None, "auto") else own
    return named if named not in (None, "auto") else "bfloat16"


def _with_engine(loaded: LoadedModel, engine: str, cache: CacheKind) -> LoadedModel:
    from dataclasses import replace

    if engine == "vllm":
        from graft.generation.vllm import VLLM

        return replace(loaded, engine=VLLM(loaded))
    from graft.generation.causal import check_cache
    from graft.generation.engines import LocalEngine

    check_cache(loaded.base.model, cache)
    return replace(loaded, engine=LocalEngine(loaded.base.model, cache, group=loaded.group))


def _benchmarks(
    loaded: LoadedModel,
    names: list[str],
    protocol: str,
    data: str | None,
    folder: Path,
    settings: EvalConfig,
    limits: Limits,
    overwrite: bool,
    as_json: bool,
) -> list[dict[str, Any]]:
    from graft.evaluation import evaluate_tasks

    found = evaluate_tasks(
        loaded, names, protocol, data, folder,
        settings=settings, limits=limits, overwrite=overwrite, bars=bar, each=None if as_json else show,
    )  # fmt: skip
    if as_json:
        print_json(found)
    else:
        show_all(found["tasks"])
        show_absent(found["absent"])
    return found["tasks"]
