"""Turns, switches and text that comes piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.errors import GraftError
from graft.generation.conversation import Conversation, as_text
from graft.generation.generate import generate
from graft.generation.loaded import LoadedModel, load_candidates
from graft.generation.requests import Decoding, Request
from tests.runs_at_hand import make_run
from tests.small import small_tokenizer

SHORT = Decoding(max_new_tokens=5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    adapters: dict[str, Any] = {"lora": {"kind": "lora", "rank": 2, "sites": "mlp.down"}}
    return load_candidates(make_run(tmp_path_factory.mktemp("runs") / "one", adapters))


def test_text_comes_in_whole_characters_and_adds_up_to_the_decoded_answer() -> None:
    tokenizer = small_tokenizer()
    text = "naïve 🙂 café</s>"
    ids = tokenizer(text)["input_ids"]
    pieces = list(as_text(iter(ids), tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "🙂" in pieces and len(pieces) > 10


def test_bytes_that_never_become_a_character_are_shown_at_the_end_as_decoding_shows_them() -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer("ok 🙂")["input_ids"][:-2]
    assert "".join(as_text(iter(ids), tokenizer)) == tokenizer.decode(ids) == "ok \ufffd"


def test_each_question_is_asked_behind_all_that_was_said(loaded: LoadedModel) -> None:
    talk = Conversation(loaded, loaded.find("lora"), SHORT)
    first = "".join(talk.ask("one"))
    second = "".join(talk.ask("two"))
    prompt = f"one{first}</s>\ntwo"
    ids = tuple(loaded.base.tokenizer(prompt)["input_ids"])
    ((_, expected),) = generate(loaded.base.model, [Request(ids, "lora", frozenset({1}))], SHORT)
    assert second == loaded.base.tokenizer.decode(expected.ids, skip_special_tokens=True)
    talk.reset()
    assert "".join(talk.ask("one")) == first


def test_switching_changes_who_answers(loaded: LoadedModel) -> None:
    talk = Conversation(loaded, loaded.find("lora"), SHORT)
    by_adapter = "".join(talk.ask("one"))
    talk.reset()
    talk.switch("base")
    assert "".join(talk.ask("one")) != by_adapter
    with pytest.raises(GraftError, match="there is base, lora"):
        talk.switch("other")


def test_an_answer_that_was_broken_off_stays_as_far_as_it_came(loaded: LoadedModel) -> None:
    talk = Conversation(loaded, loaded.find("lora"), Decoding(max_new_tokens=20))
    answer = talk.ask("one")
    pieces = [next(answer), next(answer)]
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(pieces)}


def test_a_system_prompt_is_part_of_every_prompt(loaded: LoadedModel) -> None:
    answers = {
        "".join(Conversation(loaded, loaded.find("lora"), SHORT, system).ask("one"))
        for system in (None, "Be brief.", "No.")
    }
    assert len(answers) == 3


def test_a_question_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"lora": {"kind": "lora", "rank": 2, "sites": "mlp.down"}}, context=20)
    talk = Conversation(load_candidates(run), load_candidates(run).find("lora"), SHORT)
    assert "".join(talk.ask("x" * 20)).startswith("[no room: 20 tokens")
    assert talk.messages == []
