"""graft merge: merge an adapter into its base and write a plain Hugging Face model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from graft.cli.common import AsJson, print_json
from graft.cli.loading import (
    Adapters,
    AnyBase,
    BaseName,
    Device,
    Dtype,
    Only,
    Resize,
    RunFolderArgument,
    TemplateName,
    load_model,
    one_of,
)
from graft.errors import GraftError, counted

if TYPE_CHECKING:
    from graft.bases.into_bits import BitsReport, IntoBits
    from graft.generation.loaded import Candidate, LoadedModel

FewBits = Literal["nf4", "fp4", "int8"]
QUESTIONS = (
    "What is 17 plus 25?",
    "Name three things that are found in a kitchen.",
    "A box holds 12 eggs. How many eggs are in 3 boxes?",
    "Write one sentence about the sea.",
    "Is a whale a fish? Answer yes or no, and say why.",
    "Continue: once upon a time there was a girl who",
    "Translate into French: good morning.",
    "List the days of the week.",
)
"""Prompts on which the merged model is compared with the adapter."""


def command(
    run: RunFolderArgument = None,
    to: Annotated[
        Path, typer.Option("--to", help="Empty or new folder for the merged model.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    base: BaseName = None,
    adapter: Adapters = None,
    use: Only = None,
    template: TemplateName = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    resize: Resize = False,
    quantize: Annotated[
        FewBits | None,
        typer.Option("--quantize", help="Write the merged model in 4 or 8 bits (bitsandbytes).", show_default=False),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=0,
            help="Steps in which --quantize trains each rounding (192). They take several times the model in float32; 0 only rounds.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base and write a plain Hugging Face model.

    The written model is loaded again, and the largest difference of its logits from those of the adapter is reported. The template
    is written beside it.

    With --quantize, weights are rounded to the nearest and at random, and the better rounding is trained for a few steps. The losses
    of base, adapter and merged model on rows of the run's data say what is lost.

    Example: graft merge runs/math --to math-merged
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise GraftError(f"{to} is not an empty folder: name a new folder for the merged model")
    if steps is not None and quantize is None:
        raise GraftError("--steps trains the rounding of --quantize nf4, fp4 or int8: give both, or leave --steps out")
    loaded = load_model(run, base, adapter, template, device, dtype, any_base, resize)
    candidate = one_of(loaded, use)
    if candidate.adapter is None and loaded.config is not None and loaded.config.adapter is None:
        raise GraftError(
            f"{run} trained the base itself, so there is nothing to merge: {loaded.base.name} is a plain model already"
        )
    if candidate.adapter is None:
        raise GraftError("there is no adapter to merge: name one with --adapter FOLDER")
    from graft.bases.merged import write_merged

    into = None if quantize is None else _into(quantize, steps, loaded, candidate)
    report = write_merged(
        loaded.base, candidate.adapter, _prompts(loaded, candidate), to, candidate.template.save, into
    )
    labels = loaded.base.task in ("classification", "regression")
    if as_json:
        print_json({**asdict(report), "template": None if labels else candidate.template.name})
        return
    about = report.dtype if labels else f"{report.dtype}, template {candidate.template.name}"
    typer.echo(f"{report.adapter} is merged into {loaded.base.name}: {to} ({about})")
    if report.few_bits is not None:
        _show_bits(report.few_bits)
    elif report.dequantised is not None:
        typer.echo(
            f"the base was in {report.dequantised}: its weights were dequantised and the adapter was folded into them. The merged model is "
            "not quantised"
        )
    agreed = {
        "classification": f"the class is the same for {report.same_next_token:.1%} of the prompts",
        "regression": "each is one value",
    }.get(
        loaded.base.task,
        f"the next token is the same at {report.same_next_token:.1%} of {counted(report.tokens, 'position')}",
    )
    typer.echo(
        f"logits of the reloaded model differ by at most {report.max_difference:.2g} (mean {report.mean_difference:.2g}, largest logit "
        f"{report.largest_logit:.3g}) on {counted(report.prompts, 'prompt')}; {agreed}"
    )
    if report.untied:
        typer.echo(f"no longer tied (tie_word_embeddings: false): {', '.join(report.untied)}")


def _into(kind: FewBits, steps: int | None, loaded: LoadedModel, candidate: Candidate) -> IntoBits:
    from graft.bases.requantising import STEPS, Target
    from graft.training.calibration import rows_of_run

    config = candidate.trained or loaded.config
    if config is None:
        raise GraftError(
            "--quantize chooses the rounding by the loss on rows of the run's data, so it needs the run that trained the adapter: give its "
            "run folder, or an adapter in one"
        )
    target = Target(kind, config.base.double_quant is not False, STEPS if steps is None else steps)
    return rows_of_run(config, loaded.base, target)


def _show_bits(report: BitsReport) -> None:
    losses, far = report.losses, report.divergences
    typer.echo(
        f"{counted(report.layers, 'linear layer')} in {report.kind}, rounding {report.rounding}; loss on {report.rows}, and divergence "
        "from the adapter's answers:"
    )
    for what, loss, apart, own in (
        ("base", losses.base, far.base, None),
        ("adapter beside it", losses.adapter, 0, None),
        ("merged, rounded to the nearest", losses.nearest, far.nearest, report.kept(losses.nearest)),
        ("merged, as written", losses.merged, far.merged, report.kept(losses.merged)),
    ):
        said = "" if own is None else f"   {own:.1%} of the adapter's gain"
        typer.echo(f"  {what:<32}{loss:.4f}   {apart:.2g}{said}")


def _prompts(loaded: LoadedModel, candidate: Candidate) -> list[list[int]]:
    from graft.bases.context import context_length

    tokenizer, room = loaded.base.tokenizer, context_length(loaded.base.model, candidate.adapter)
    if loaded.base.task in ("classification", "regression"):
        from graft.data.labelling import encode_texts

        found = [list(encode_texts(tokenizer, [text])["input_ids"]) for text in QUESTIONS]
    else:
        found = [candidate.template.prompt_ids([{"role": "user", "content": text}], tokenizer) for text in QUESTIONS]
    return [ids[:room] for ids in found]
