"""Prompts that are far too long are measured in pieces, everywhere where prompts are asked; tokens without a row are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.bases import Base, load_base
from graft.config.base import BaseConfig
from graft.data import long_texts
from graft.data.templates import template_of
from graft.errors import GraftError
from graft.generation.conversation import Conversation
from graft.generation.loaded import load_candidates
from graft.generation.prompts import request_of
from graft.generation.requests import Decoding
from tests.cli.test_answering import ADAPTERS, graft_command
from tests.runs_at_hand import make_run, write_rows
from tests.small import save_small

LONGEST = 5000
"""Characters that may be tokenised at once."""


class Watched:
    """A tokenizer that refuses long texts."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __len__(self) -> int:
        return len(self._own)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        assert max(len(text) for each in texts for text in ([each] if isinstance(each, str) else each)) < LONGEST
        return self._own(*texts, **options)


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "LONG", 3000)
    monkeypatch.setattr(long_texts, "PIECE", 480)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("prompts") / "base"
    save_small(folder, context=64)
    return load_base(BaseConfig(model=str(folder), device="cpu"))


def asked(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("length", [10, 2900, 3100, 200_000])
def test_a_prompt_is_whole_or_too_long_and_its_length_is_that_of_the_tokenizer(base: Base, length: int) -> None:
    template, text = template_of("plain"), "x" * length
    watched = Base(**{**vars(base), "tokenizer": Watched(base.tokenizer)})
    found = request_of(watched, template, None, asked(text))
    whole = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.tokens == len(whole)
    if length < 3000:
        assert list(found.ids) == whole
    else:
        assert 64 < len(found.ids) < LONGEST and list(found.ids) == whole[: len(found.ids)]


def test_predict_eval_and_chat_say_that_there_is_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", ADAPTERS, context=64)
    rows = [{"question": "Two?", "answer": "2"}, {"question": "y" * 200_000, "answer": "3"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = json.loads(graft_command("predict", run, data, "--max-new-tokens", 2, "--json").stdout)
    assert [each["ended"] for each in found["answers"]] == ["truncated", "no_room"]
    result = json.loads(graft_command("eval", run, "--data", data, "--max-new-tokens", 2, "--json").stdout)
    lines = [json.loads(line) for line in (Path(result["folder"]) / "answers.jsonl").read_text().splitlines()]
    long = [line for line in lines if line.get("row") == 2]
    assert {line["outcome"] for line in long} == {"no_room"} and {line["prompt_tokens"] for line in long} == {200_000}
    loaded = load_candidates(run)
    talk = Conversation(loaded, loaded.candidates[1], Decoding(2))
    assert "".join(talk.ask("z" * 200_000)).startswith("[no room: 200000 tokens fill the context of 64")


def test_tokens_without_a_row_in_the_embedding_are_named(base: Base) -> None:
    tokenizer = load_base(BaseConfig(model=base.name, device="cpu")).tokenizer
    tokenizer.add_tokens(["<new>"])
    grown = Base(**{**vars(base), "tokenizer": tokenizer})
    with pytest.raises(
        GraftError, match=r"the prompt holds the token '<new>' \(id 258\), but the embedding .* has only 258 rows"
    ):
        request_of(grown, template_of("plain"), None, asked("a <new> one"))
