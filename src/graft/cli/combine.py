"""graft combine: make one adapter of several trained ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from graft.cli.common import AsJson, print_json
from graft.cli.loading import AnyBase, BaseName, Device, Dtype, TemplateName, base_of, quiet
from graft.errors import GraftError, counted

if TYPE_CHECKING:
    from graft.generation.loaded import Candidate, LoadedModel

Way = Literal["cat", "svd", "linear", "ties", "dare", "dare-ties", "magnitude-prune"]
NAME = "combined"


def command(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...", help="Adapter or run folders, each as FOLDER or NAME=FOLDER.", show_default=False
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="Empty or new folder for the adapter.", show_default=False)] = ...,  # type: ignore[assignment]
    how: Annotated[
        Way,
        typer.Option(
            "--how",
            help="cat: LoRAs side by side, their sum exactly. svd: the sum as a LoRA of one rank. The others combine LoRA's factors as "
            "PEFT does, or the differences of weights (--on), and linear averages the parameters of other kinds.",
        ),
    ] = "cat",
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="A weight for each adapter, as 0.5,1. By default 1 each.", show_default=False),
    ] = None,
    on: Annotated[
        Literal["factors", "differences"] | None,
        typer.Option("--on", help="Combine LoRA's factors A and B, or the differences of weights.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", help="Rank of the LoRA that approximates differences. By default the highest.", show_default=False
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            help="Share of entries that ties, dare and magnitude-prune keep. By default 0.5.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of dare.")] = 0,
    base: BaseName = None,
    template: TemplateName = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several trained ones, and write it to a folder.

    The distance from the weighted sum of what the adapters add to the weights is reported. To try a combination without writing
    it, use graft.use(model, {"a": 0.5, "b": 1.0}) in Python.

    Example: graft combine runs/style runs/task --weights 0.5,1 --to both
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise GraftError(f"{to} is not an empty folder: name a new folder for the combined adapter")
    loaded = _load(adapters, base, template, device, dtype, any_base)
    asked = _asked(loaded, template)
    numbers = _numbers(weights, [each.name for each in loaded.adapters])
    from graft.attaching.saving import save
    from graft.combining.combine import combine

    if NAME in numbers:
        raise GraftError(
            f"an adapter is called '{NAME}', which is the name of the combination: give it another one, as NAME=FOLDER"
        )

    report = combine(loaded.base.model, numbers, NAME, how=how, on=on, rank=rank, density=density, seed=seed)
    save(loaded.base.model, NAME, to)
    asked.template.save(to)
    if as_json:
        print_json({"to": to, **asdict(report)})
        return
    said = " + ".join(f"{weight:g} {name}" for name, weight in report.weights.items())
    what = "averaged parameters" if report.rank is None else f"a LoRA of rank {report.rank}"
    typer.echo(f"{said} -> {to} ({report.how} on {report.on}: {what} at {counted(report.modules, 'module')})")
    if report.error is not None and report.worst is not None:
        typer.echo(
            f"it is {report.error:.2%} away from the weighted sum of the adapters' differences of weights (Frobenius norm), "
            f"{report.worst:.2%} at the worst layer"
        )
    if report.input_changed_by:
        typer.echo(
            f"note: {' and '.join(report.input_changed_by)} change the input of layers. On one row with others they act before those; here "
            "their differences are added",
            err=True,
        )


def _load(
    adapters: list[str], base: str | None, template: str | None, device: str | None, dtype: str | None, any_base: bool
) -> LoadedModel:
    """Load the adapters on the base that is named, or on that of the first run that trained one of them."""
    quiet()
    from graft.generation.adapter_folders import run_of
    from graft.generation.loaded import load_candidates

    run = next((found for found in map(run_of, adapters) if found is not None), None)
    if run is None and base is None:
        raise GraftError("none of the adapters lies in a run folder, which would know its base: name it with --base")
    loaded = load_candidates(None, base_of(run, base, device, dtype), adapters, template, any_base=any_base)
    if len(adapters) < 2 and len(loaded.adapters) < 2:
        raise GraftError(f"a combination is made of at least two adapters; given: {', '.join(adapters)}")
    return loaded


def _asked(loaded: LoadedModel, template: str | None) -> Candidate:
    """Return an adapter that is asked as the combination will be. Those without a template beside them are asked as the others."""
    own = [each for each in loaded.adapters if each.template_file is not None]
    if template is not None or not own:
        return loaded.adapters[0]
    first, *others = own
    if other := next((each for each in others if each.template != first.template), None):
        raise GraftError(
            f"{first.name} and {other.name} were trained with different templates: say which one the combination is asked with "
            "(--template NAME or FILE)"
        )
    if bare := [each.name for each in loaded.adapters if each.template_file is None]:
        typer.echo(
            f"note: no template lies beside {' and '.join(bare)}: the combination is asked with that of {first.name}",
            err=True,
        )
    return first


def _numbers(given: str | None, names: list[str]) -> list[str] | dict[str, float]:
    if given is None:
        return names
    try:
        numbers = [float(each) for each in given.split(",")]
    except ValueError:
        raise GraftError(f"--weights takes numbers with commas between them, as 0.5,1; given: {given!r}") from None
    if len(numbers) != len(names):
        raise GraftError(f"--weights needs one number for each of {', '.join(names)}; given: {given}")
    return dict(zip(names, numbers, strict=True))
