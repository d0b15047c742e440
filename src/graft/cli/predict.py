"""graft predict: answer every prompt in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.loading import (
    Adapters,
    AnyBase,
    BaseName,
    Device,
    Dtype,
    MaxNewTokens,
    Only,
    Seed,
    Temperature,
    TemplateName,
    TopP,
    bar,
    load_model,
    one_of,
)
from graft.errors import GraftError

if TYPE_CHECKING:
    from graft.data.samples import Message
    from graft.generation.loaded import Candidate, LoadedModel


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
        typer.Option("--out", "-o", help="File to write, as JSON lines. Default: stdout.", show_default=False),
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
    template: TemplateName = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
) -> None:
    """Answer every prompt in a file and write one JSON object per line, in the file's order.

    Each object holds the row, the question, the adapter, the answer and how the answer ended. An adapter for classification
    gives each text its class with the probabilities of all classes; one for regression gives it a value.
    """
    if len(paths) > 2:
        raise GraftError(f"give at most a run folder and a file of prompts; given: {' '.join(map(str, paths))}")
    run, prompts = (paths[0] if len(paths) == 2 else None), paths[-1]
    if out is not None and out.exists() and not overwrite:
        raise GraftError(f"{out} exists already: name another file, or replace it with --overwrite")
    loaded = load_model(run, base, adapter, template, device, dtype, any_base)
    if loaded.base.task in ("classification", "regression"):
        _refuse({"--beams": beams > 1, "--temperature": temperature > 0, "--top-p": top_p < 1})
        _write(_labels(loaded, one_of(loaded, use), prompts, token_budget), out)
        return
    conversations = read_prompts(prompts)
    from graft.generation.generate import generate
    from graft.generation.requests import Decoding, Request

    candidate, tokenizer = one_of(loaded, use), loaded.base.tokenizer
    stop = frozenset(candidate.template.stop_ids(tokenizer))
    requests = [
        Request(tuple(candidate.template.prompt_ids(messages, tokenizer)), candidate.adapter, stop)
        for _, messages in conversations
    ]
    decoding = Decoding(max_new_tokens, beams, temperature, top_p, seed)
    records: list[dict[str, Any]] = [{} for _ in requests]
    with bar("Answering") as progress:
        for done, (number, found) in enumerate(
            generate(loaded.base.model, requests, decoding, token_budget=token_budget), 1
        ):
            row, messages = conversations[number]
            records[number] = {
                "row": row,
                "question": messages[-1]["content"],
                "adapter": candidate.name,
                "answer": tokenizer.decode(found.ids, skip_special_tokens=True),
                "ended": found.reason,
                "tokens": len(found.ids),
            }
            progress(done, len(requests))
    _write(records, out)
    ends = [record["ended"] for record in records]
    typer.echo(
        f"{candidate.name} answered {len(ends)} prompts: {ends.count('stopped')} answers ended by themselves, "
        f"{ends.count('truncated')} reached the limit of tokens, {ends.count('no_room')} had no room in the context",
        err=True,
    )


def _write(records: list[dict[str, Any]], out: Path | None) -> None:
    """Write one JSON object per line, to a file or to stdout."""
    from graft.utils.files import to_json, write_text_atomic

    text = "".join(to_json(record) + "\n" for record in records)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text_atomic(out, text)


def _labels(loaded: LoadedModel, candidate: Candidate, path: Path, token_budget: int) -> list[dict[str, Any]]:
    """Label each text of a file: the lines of a .txt, or the rows of a data file (their own labels are ignored)."""
    from graft.data.reading import read
    from graft.data.samples import Sample
    from graft.evaluation.labels import predict_labels

    if path.suffix.lower() == ".txt":
        samples = [Sample(tuple(messages), str(path), row) for row, messages in read_prompts(path)]
    else:
        samples = read(str(path), need_answers=False, task=loaded.base.task)
    with bar("Labelling") as progress:
        found = predict_labels(loaded, candidate, samples, token_budget=token_budget, progress=progress)
    typer.echo(f"{candidate.name} labelled {len(found)} texts", err=True)
    return found


def _refuse(settings: dict[str, bool]) -> None:
    """Raise `GraftError` for settings of generation that were given to an adapter that predicts labels."""
    given = [name for name, is_set in settings.items() if is_set]
    if given:
        raise GraftError(f"{', '.join(given)} has no effect, because this adapter predicts labels: leave it out")


def read_prompts(path: Path) -> list[tuple[int, list[Message]]]:
    """Read (row from 1, conversation that ends with a question) from a file.

    If a conversation ends with an answer, the answer is dropped. Blank lines of a .txt are skipped.
    """
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise GraftError(f"{path}: no such file")
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [(row, [_question(line)]) for row, line in enumerate(lines, start=1) if line.strip()]
        if not found:
            raise GraftError(f"{path} holds no prompts")
        return found
    from graft.data.reading import read

    pairs = []
    for sample in read(str(path), need_answers=False):
        messages = list(sample.messages)
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise GraftError(f"{sample.where}: there is no question to answer")
        pairs.append((sample.row, messages))
    return pairs


def _question(text: str) -> Message:
    return {"role": "user", "content": text}
