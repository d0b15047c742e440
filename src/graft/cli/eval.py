"""graft eval: how well the base and its adapters answer the questions of a data file, or of benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graft.cli.common import AsJson, print_json
from graft.cli.evaluations import show, show_absent, show_all
from graft.cli.harness import ask_lm_eval
from graft.cli.loading import (
    Adapters,
    AnyBase,
    BaseName,
    Device,
    Dtype,
    RunFolderArgument,
    TemplateName,
    bar,
    load_model,
)

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
            help="Benchmarks and groups, with commas: gsm8k,arithmetic (graft show tasks).",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="How benchmarks are asked and judged: llm-adapters, strict, math-verify, rank.",
            show_default=False,
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option("--harness", help="Tasks that lm-eval asks and scores in its own way.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="A data file or hub name (default: the run's validation data); the folder of the benchmarks' files (default: the hub).",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            "--limit",
            metavar="ROWS[,TASK=ROWS]...",
            help="Rows of each, from the start; others for tasks or groups that are named: 100,addsub=all.",
            show_default=False,
        ),
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
    beams: Annotated[
        int | None, typer.Option("--beams", min=1, help="Beams of the search; greedy by default.", show_default=False)
    ] = None,
    engine: Annotated[
        Literal["graft", "vllm"], typer.Option("--engine", help="What writes the answers to benchmarks.")
    ] = "graft",
    cache: Annotated[
        Literal["dynamic", "static", "compiled"],
        typer.Option(
            "--cache", help="Of Graft's generation: growing, of full length from the start, that under torch.compile."
        ),
    ] = "dynamic",
    template: TemplateName = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of results; by default eval/ in the run, else here.", show_default=False),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where there are answers, in place of going on with them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate the bare base and all adapters, in one pass: accuracy with its interval, how answers ended, on data files the loss."""
    from graft.errors import GraftError
    from graft.evaluation.limits import Limits

    if run is None and data is None and tasks is None and harness is None:
        raise GraftError("name what to evaluate on: --data FILE, --tasks NAMES or --harness NAMES")
    own = _own_settings(run)
    if harness is not None and (tasks is not None or protocol is not None):
        raise GraftError("--harness has lm-eval's own tasks and rules: leave out --tasks and --protocol")
    wanted = (
        [] if harness is not None else tasks.split(",") if tasks is not None else [] if _is_file(data) else own.tasks
    )
    limits = Limits(own.limit) if limit is None else Limits.parse(limit, own.limit)
    given = {"metric": metric, "max_new_tokens": max_new_tokens, "token_budget": token_budget}
    changes = {key: value for key, value in given.items() if value is not None}
    if not wanted:
        limits.plain("lm-eval" if harness is not None else "a data file")
    settings = own.model_copy(update={**changes, "limit": limits.default})
    if wanted or harness is not None:
        _refuse_settings({**changes, "beams": beams})
        _refuse_template(template, protocol or own.protocol if wanted else "lm-eval")
    elif protocol is not None:
        raise GraftError("--protocol is for benchmarks: name them with --tasks, or in the run's eval.tasks")
    if engine == "vllm":
        _refuse_for_vllm(bool(wanted), protocol or own.protocol, cache, device)
        # vLLM holds the GPU: this copy of the base gives its name, its context and its adapters, and answers nothing.
        device, dtype = "cpu", _dtype_for_vllm(run, dtype)
    elif harness is not None and cache != "dynamic":
        raise GraftError("--cache has no effect with --harness: lm-eval generates in its own way")
    loaded = _with_engine(load_model(run, base, adapter, template, device, dtype, any_base), engine, cache)
    folder = out or (run / "eval" if run is not None else Path("eval"))
    if harness is not None:
        names = [name.strip() for name in harness.split(",")]
        ask_lm_eval(loaded, names, data or own.data, folder, limit=settings.limit, overwrite=overwrite, as_json=as_json)
        return
    if wanted:
        _benchmarks(
            loaded, wanted, protocol or own.protocol, data or own.data, folder, settings, limits, overwrite, as_json
        )
        return
    from graft.evaluation import evaluate_jobs

    with bar("Answering") as progress:
        found = evaluate_jobs(
            loaded, data, folder, settings=settings, beams=beams or 1, progress=progress, overwrite=overwrite
        )
    if as_json:
        print_json(found[0] if len(found) == 1 else {"evaluations": found})
        return
    for result in found:
        show(result)


def _own_settings(run: Path | None) -> EvalConfig:
    from graft.config.eval import EvalConfig
    from graft.runs.folder import RunFolder

    return RunFolder(run).existing().eval_settings() if run is not None else EvalConfig()


def _is_file(data: str | None) -> bool:
    return data is not None and Path(data).is_file()


def _refuse_settings(given: Mapping[str, Any]) -> None:
    """The protocol of a benchmark says these: they would have no effect."""
    from graft.errors import GraftError

    for name in ("metric", "max_new_tokens", "beams"):
        if given.get(name) is not None:
            raise GraftError(f"--{name.replace('_', '-')} is for data files: the protocol of a benchmark says it")


def _refuse_for_vllm(benchmarks: bool, protocol: str, cache: str, device: str | None) -> None:
    """What vLLM does not do, and what would have no effect."""
    from graft.errors import GraftError, require

    require("vllm", "vllm")
    if not benchmarks or protocol == "rank":
        raise GraftError(
            "--engine vllm writes answers to benchmarks: name them with --tasks, under a protocol other than rank "
            "(likelihoods and losses are Graft's own)"
        )
    if cache != "dynamic" or device is not None:
        raise GraftError(
            "--cache and --device have no effect with --engine vllm, which has a cache and a GPU of its own"
        )


def _dtype_for_vllm(run: Path | None, dtype: Dtype) -> Dtype:
    """Auto is bfloat16, as it is in Graft's own generation on a GPU."""
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
    return replace(loaded, engine=LocalEngine(loaded.base.model, cache))


def _refuse_template(template: str | None, protocol: str) -> None:
    """A template would have no effect where prompts are not the adapter's own."""
    from graft.errors import GraftError
    from graft.evaluation.protocols import PROTOCOLS, OutputProtocol

    rules = PROTOCOLS.get(protocol)
    asks_by_template = isinstance(rules, OutputProtocol) and rules.prompt is None
    if template is not None and not asks_by_template and (rules is not None or protocol == "lm-eval"):
        raise GraftError(f"--template has no effect: {protocol} has prompts of its own")


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
) -> None:
    from graft.evaluation import evaluate_tasks

    found = evaluate_tasks(
        loaded, names, protocol, data, folder,
        settings=settings, limits=limits, overwrite=overwrite, bars=bar, each=None if as_json else show,
    )  # fmt: skip
    if as_json:
        print_json(found)
        return
    show_all(found["tasks"])
    show_absent(found["absent"])
