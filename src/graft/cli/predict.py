"""graft predict: answer a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.loading import Adapters, AnyBase, BaseName, Device, Dtype, Only, TemplateName, bar, load_model, one_of
from graft.errors import GraftError

if TYPE_CHECKING:
    from graft.data.samples import Message
    from graft.generation.loaded import Candidate, LoadedModel


def command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[RUN] PROMPTS",
            help="A run folder (or give --base), and the prompts: .txt with one per line, or a data file.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write (JSONL); stdout by default.", show_default=False)
    ] = None,
    base: BaseName = None,
    adapter: Adapters = None,
    use: Only = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    token_budget: Annotated[int, typer.Option("--token-budget", min=1, help="Tokens per batch.")] = 8192,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beams of the search.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy; above it samples.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --out names.")] = False,
    template: TemplateName = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
) -> None:
    """Answer a file of prompts, in its order, one JSON object per line: row, question, adapter, answer, how it ended.

    An adapter for classification or regression gives each text its label, with the probability of each class, or its value.
    """
    if len(paths) > 2:
        raise GraftError(f"expected a run folder and a file of prompts; given: {' '.join(map(str, paths))}")
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
        f"{len(ends)} prompts answered by {candidate.name}: {ends.count('stopped')} ended, {ends.count('truncated')} met the "
        f"limit of tokens, {ends.count('no_room')} left no room in the context",
        err=True,
    )


def _write(records: list[dict[str, Any]], out: Path | None) -> None:
    from graft.utils.files import to_json, write_text_atomic

    text = "".join(to_json(record) + "\n" for record in records)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text_atomic(out, text)


def _labels(loaded: LoadedModel, candidate: Candidate, path: Path, token_budget: int) -> list[dict[str, Any]]:
    """Each text of a file with its label: lines of a .txt, or the rows of a data file, whose own labels are left out."""
    from graft.data.reading import read
    from graft.data.samples import Sample
    from graft.evaluation.labels import predict_labels

    if path.suffix.lower() == ".txt":
        samples = [Sample(tuple(messages), str(path), row) for row, messages in read_prompts(path)]
    else:
        samples = read(str(path), need_answers=False, task=loaded.base.task)
    with bar("Labelling") as progress:
        found = predict_labels(loaded, candidate, samples, token_budget=token_budget, progress=progress)
    typer.echo(f"{len(found)} texts labelled by {candidate.name}", err=True)
    return found


def _refuse(settings: dict[str, bool]) -> None:
    given = [name for name, is_set in settings.items() if is_set]
    if given:
        raise GraftError(f"{', '.join(given)} has no effect: this adapter gives labels, and writes no text")


def read_prompts(path: Path) -> list[tuple[int, list[Message]]]:
    """(row from 1, conversation that ends with a question). A last answer in the file is left out; blank lines are passed by."""
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
            raise GraftError(f"{sample.where}: there is no question")
        pairs.append((sample.row, messages))
    return pairs


def _question(text: str) -> Message:
    return {"role": "user", "content": text}
