"""graft predict: answer every prompt in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.common import AsJson, print_json
from graft.cli.launching import Processes, launch, several
from graft.cli.loading import (
    Adapters,
    AnyBase,
    BaseName,
    Device,
    Dtype,
    Fields,
    MaxNewTokens,
    Only,
    Resize,
    Seed,
    Temperature,
    TemplateName,
    TopP,
    bar,
    load_model,
    one_of,
    parse_fields,
)
from graft.errors import GraftError, counted
from graft.utils import launched

if TYPE_CHECKING:
    from graft.data.samples import Sample
    from graft.evaluation.predictions import Predictions
    from graft.generation.loaded import Candidate, LoadedModel
    from graft.generation.requests import Decoding, Request

ENDS = ("stopped", "truncated", "no_room")
"""How an answer ends."""
WINDOW = 256
"""Texts that are labelled before their labels are written."""


def command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[RUN] PROMPTS",
            help="A run folder (without one, give --base) and the file of prompts: a .txt with one per line, or a data file.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File to write, as JSON lines; the same command continues it. Default: stdout.",
            show_default=False,
        ),
    ] = None,
    base: BaseName = None,
    adapter: Adapters = None,
    use: Only = None,
    max_new_tokens: MaxNewTokens = 256,
    token_budget: Annotated[
        int, typer.Option("--token-budget", min=1, help="Most tokens of a batch, padding and answers counted.")
    ] = 8192,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beams of the beam search; 1 is no search.")] = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out if it exists.")] = False,
    fields: Fields = None,
    template: TemplateName = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    resize: Resize = False,
    processes: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Answer every prompt in a file and write one JSON object per line, in the file's order.

    Each object holds the row, the question, the adapter, the answer and how the answer ended. An adapter for classification
    gives each text its class with the probabilities of all classes; one for regression gives it a value. With --json, stdout
    holds one JSON value at the end: counts, and the answers unless --out has them.

    Example: graft predict runs/math questions.jsonl --out answers.jsonl
    """
    if len(paths) > 2:
        raise GraftError(f"give at most a run folder and a file of prompts; given: {' '.join(map(str, paths))}")
    run, prompts = (paths[0] if len(paths) == 2 else None), paths[-1]
    renamed = parse_fields(fields)
    if out is None and several(processes):
        raise GraftError("several processes write their answers to a file: name it with --out FILE")
    if out is not None and out.is_dir():
        raise GraftError(f"{out} is a folder: name a file for --out")
    if out is not None and out.exists() and not overwrite:
        raise GraftError(f"{out} exists already: name another file, or replace it with --overwrite")
    launch(processes)
    from graft.distributed.group import together
    from graft.generation.requests import Decoding

    with together() as group:
        loaded = load_model(run, base, adapter, template, device, dtype, any_base, resize, group)
        candidate, decoding = one_of(loaded, use), None
        if loaded.base.task in ("classification", "regression"):
            _refuse({"--beams": beams > 1, "--temperature": temperature > 0, "--top-p": top_p < 1})
            samples = _texts(loaded, prompts, renamed)
        else:
            samples = read_prompts(prompts, loaded, renamed)
            decoding = Decoding(max_new_tokens, beams, temperature, top_p, seed)
        records, kept = _predictions(
            loaded, candidate, samples, out, decoding, token_budget, overwrite and not launched.restarts(), not as_json
        )
    if launched.rank():  # the first process says it
        return
    if not as_json:
        _tell(candidate, records, decoding is not None, kept)
        return
    ends = [record["ended"] for record in records if decoding is not None]
    print_json(
        {
            "adapter": candidate.name,
            "base": loaded.base.name,
            "out": out,
            "total": len(records),
            "reused": kept,
            **({"ended": {reason: ends.count(reason) for reason in ENDS}} if decoding is not None else {}),
            **({"answers": records} if out is None else {}),
        }
    )


def _predictions(
    loaded: LoadedModel,
    candidate: Candidate,
    samples: list[Sample],
    out: Path | None,
    decoding: Decoding | None,
    token_budget: int,
    overwrite: bool,
    show: bool,
) -> tuple[list[dict[str, Any]], int]:
    """Answer the prompts, or label the texts, that an interrupted command has left. Returns all records, and how many were there."""
    from dataclasses import asdict

    from graft.evaluation.predictions import Predictions

    settings = {} if decoding is None else {"decoding": asdict(decoding)}
    about = _about(loaded, candidate, samples, **settings)
    with Predictions(out, about, len(samples), overwrite=overwrite, show=show, group=loaded.group) as predictions:
        with loaded.group.agreed():
            if decoding is None:
                _label(loaded, candidate, samples, predictions, token_budget)
            else:
                _answer(loaded, candidate, samples, predictions, decoding, token_budget)
        return predictions.finish(), predictions.kept


def _answer(
    loaded: LoadedModel,
    candidate: Candidate,
    samples: list[Sample],
    predictions: Predictions,
    decoding: Decoding,
    token_budget: int,
) -> None:
    """Answer the prompts that the file of an interrupted command lacks."""
    from graft.generation.generate import generate

    tokenizer = loaded.base.tokenizer
    left = predictions.missing
    requests = [_request(loaded, candidate, samples[n]) for n in left]
    with bar("Answering") as progress:
        answers = generate(loaded.base.model, requests, decoding, token_budget=token_budget, group=loaded.group)
        for place, found in answers:
            sample = samples[left[place]]
            record = {
                "row": sample.row,
                "question": sample.messages[-1]["content"],
                "adapter": candidate.name,
                "answer": tokenizer.decode(found.ids, skip_special_tokens=True),
                "ended": found.reason,
                "tokens": len(found.ids),
            }
            progress(predictions.add(left[place], record), len(samples))


def _label(
    loaded: LoadedModel, candidate: Candidate, samples: list[Sample], predictions: Predictions, token_budget: int
) -> None:
    """Label the texts that the file of an interrupted command lacks."""
    from graft.evaluation.labels import predict_labels

    left = predictions.missing
    with bar("Labelling") as progress:
        windows = [left[start : start + WINDOW] for start in range(0, len(left), WINDOW)]
        for numbers in loaded.group.turns(windows):
            found = predict_labels(loaded, candidate, [samples[n] for n in numbers], token_budget=token_budget)
            for number, record in zip(numbers, found, strict=True):
                progress(predictions.add(number, record), len(samples))


def _tell(candidate: Candidate, records: list[dict[str, Any]], writes: bool, kept: int) -> None:
    """Print on stderr how many were answered or labelled, and how the answers ended."""
    said = f"{candidate.name} labelled {counted(len(records), 'text')}"
    if writes:
        ends = [record["ended"] for record in records]
        said = (
            f"{candidate.name} answered {counted(len(ends), 'prompt')}: {ends.count('stopped')} ended by themselves, "
            f"{ends.count('truncated')} reached the limit of tokens, {ends.count('no_room')} had no room in the context"
        )
    typer.echo(said + (f"; {kept} were there from an interrupted command" if kept else ""), err=True)


def _about(loaded: LoadedModel, candidate: Candidate, samples: list[Sample], **more: Any) -> dict[str, Any]:
    """Return what the records belong to: base, adapter, template, settings and prompts."""
    import hashlib
    import json

    from graft.data.report import conversation_key

    prompts = json.dumps([(sample.row, conversation_key(sample)) for sample in samples])
    return {
        "base": loaded.base.identity,
        "dtype": str(loaded.base.dtype).removeprefix("torch."),
        "adapter": [candidate.name, candidate.digest],
        "template": candidate.template.digest,
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        **more,
    }


def _request(loaded: LoadedModel, candidate: Candidate, sample: Sample) -> Request:
    from graft.generation.prompts import request_of

    try:
        return request_of(loaded.base, candidate.template, candidate.adapter, sample.messages)
    except GraftError as error:
        raise GraftError(f"{sample.where}: {error}") from error


def _texts(loaded: LoadedModel, path: Path, fields: dict[str, str]) -> list[Sample]:
    """Return the texts of a file: the lines of a .txt, or the rows of a data file (their own labels are ignored)."""
    from graft.data.file_readers import file_type
    from graft.data.reading import read
    from graft.evaluation.evaluating import given_source

    if file_type(path) == ".txt":
        return read_prompts(path, loaded, fields)
    return read(given_source(path, loaded.config, fields), need_answers=False, task=loaded.base.task)


def _refuse(settings: dict[str, bool]) -> None:
    """Raise `GraftError` for settings of generation that were given to an adapter that predicts labels."""
    given = [name for name, is_set in settings.items() if is_set]
    if given:
        raise GraftError(f"{', '.join(given)} has no effect, because this adapter predicts labels: leave it out")


def read_prompts(path: Path, loaded: LoadedModel, fields: dict[str, str]) -> list[Sample]:
    """Read conversations that end with a question from a file; row numbers count from 1.

    If a conversation ends with an answer, the answer is dropped. Blank lines of a .txt are skipped.
    """
    from dataclasses import replace

    from graft.data.file_readers import file_type, read_lines
    from graft.data.reading import read
    from graft.data.samples import Sample
    from graft.evaluation.evaluating import given_source

    if file_type(path) == ".txt":
        if fields:
            raise GraftError("--fields has no effect on a .txt file, which has no columns: leave it out")
        if not path.exists():
            raise GraftError(f"{path}: no such file")
        lines = enumerate(read_lines(path), start=1)
        found = [Sample(({"role": "user", "content": line},), str(path), row) for row, line in lines if line.strip()]
        if not found:
            raise GraftError(f"{path} holds no prompts")
        return found
    prompts = []
    for sample in read(given_source(path, loaded.config, fields), need_answers=False):
        if not sample.prompt:
            raise GraftError(f"{sample.where}: there is no question to answer")
        prompts.append(replace(sample, messages=sample.prompt))
    return prompts
