"""Pairs of a preferred and a rejected answer: the shapes of rows, the shared prompt, masks, cutting, counting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.config.data import DataConfig
from graft.data.datasets import TokenDataset
from graft.data.inspect import coloured
from graft.data.pairs import tokenize_pair
from graft.data.preparing import prepare
from graft.data.reading import read
from graft.data.samples import Example, Rejected, Sample
from graft.data.templates import template_of
from graft.errors import GraftError
from tests.small import small_tokenizer

TOKENIZER = small_tokenizer()
ASK: Any = {"role": "user", "content": "Sky?"}
BLUE: Any = {"role": "assistant", "content": "Blue."}
GREEN: Any = {"role": "assistant", "content": "Green."}
SYSTEM: Any = {"role": "system", "content": "Be brief."}
SHAPES: dict[str, dict[str, Any]] = {
    "text": {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."},
    "messages": {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]},
    "one message each": {"prompt": "Sky?", "chosen": BLUE, "rejected": GREEN},
    "implicit prompt": {"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
    "whole beside the prompt": {"prompt": "Sky?", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Sky?"}],
        "chosen": {"from": "gpt", "value": "Blue."},
        "rejected": {"from": "gpt", "value": "Green."},
    },
    "instruction": {"instruction": "Sky?", "input": "", "chosen": "Blue.", "rejected": "Green."},
}


def read_rows(folder: Path, *rows: dict[str, Any]) -> list[Sample]:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(str(path), task="preference")


def sample(prompt: str = "Sky?", chosen: str = "Blue.", rejected: str = "Green.") -> Sample:
    asked: Any = {"role": "user", "content": prompt}
    ours, theirs = ({"role": "assistant", "content": answer} for answer in (chosen, rejected))
    return Sample((asked, ours), "f", 1, (asked, theirs), 1)  # type: ignore[arg-type]


def tokenized(one: Sample, template: str = "alpaca", **options: Any) -> Any:
    return tokenize_pair(one, TOKENIZER, template_of(template, TOKENIZER), **{"max_length": 512, **options})


def prompt_of(example: Example) -> list[int]:
    return example.input_ids[: int(np.flatnonzero(example.supervised)[0])].tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_rows_gives_the_same_pair(shape: str, tmp_path: Path) -> None:
    (found,) = read_rows(tmp_path, SHAPES[shape])
    assert found.messages == (ASK, BLUE) and found.rejected == (ASK, GREEN) and found.asked == 1


def test_a_system_prompt_and_several_turns_belong_to_the_prompt(tmp_path: Path) -> None:
    talk = [SYSTEM, ASK, BLUE, {"role": "user", "content": "Sure?"}]
    (found,) = read_rows(tmp_path, {"chosen": [*talk, BLUE], "rejected": [*talk, GREEN]})
    assert found.asked == 4
    example = tokenized(found, "plain")
    assert TOKENIZER.decode(example.input_ids[example.supervised]).strip() == "Blue.</s>"
    (found,) = read_rows(tmp_path, {"system": "Be brief.", "question": "Sky?", "chosen": "Blue.", "rejected": "Green."})
    assert found.messages == (SYSTEM, ASK, BLUE) and found.asked == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"chosen": "Blue.", "rejected": "Green."},
            "row 1, field 'prompt': is missing, and chosen and rejected do not begin",
        ),
        ({"prompt": "Sky?", "chosen": [ASK], "rejected": [ASK]}, "row 1, field 'chosen': must end with an answer"),
        ({"prompt": "Sky?", "chosen": "Blue."}, "no column is called rejected. The columns are prompt, chosen"),
        ({"prompt": "Sky?", "chosen": 5, "rejected": None}, "row 1, field 'rejected': is missing"),
    ],
)
def test_rows_without_a_pair_are_errors_that_name_the_field(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=said.replace("(", r"\(")):
        read_rows(tmp_path, row)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations_with_one_answer_say_what_a_preference_needs(column: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(GraftError, match=f"`{column}`. with one answer.*add the columns chosen and rejected.*kto"):
        read_rows(tmp_path, {column: turns})


def test_both_sides_share_the_prompt_and_only_answers_with_their_end_are_learnt() -> None:
    example = tokenized(sample())
    chosen, rejected = example.sequences
    assert prompt_of(chosen) == prompt_of(rejected)
    for side, answer in ((chosen, "Blue.</s>"), (rejected, "Green.</s>")):
        assert TOKENIZER.decode(side.input_ids[side.supervised]).strip() == answer
        assert side.supervised[len(prompt_of(side)) :].all()
    assert len(example) == len(chosen) + len(rejected) and example.longest == len(rejected)
    assert example.num_targets == chosen.num_targets + rejected.num_targets


def test_a_prompt_that_is_too_long_is_cut_alike_on_both_sides() -> None:
    long = sample("x" * 300 + " Sky?", "Blue.", "Green, I would say.")
    whole = tokenized(long)
    room = whole.longest - 100
    assert tokenized(long, max_length=room) == Rejected("overlong", whole.longest)
    cut = tokenized(long, max_length=room, overlong="truncate_prompt")
    assert cut.longest == room and cut.cut == 100 and cut.rejected.cut == 100
    assert prompt_of(cut.sequences[0]) == prompt_of(cut.sequences[1])
    assert cut.num_targets == whole.num_targets
    short = tokenized(long, max_length=20, overlong="truncate_prompt")
    assert short == Rejected("answer_too_long", whole.longest)


def test_equal_and_empty_answers_are_counted_and_left_out(tmp_path: Path) -> None:
    rows = [SHAPES["text"], {**SHAPES["text"], "rejected": "Blue."}, {**SHAPES["text"], "chosen": " "}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(path), task="preference", template="plain")
    prepared = prepare(config, TOKENIZER, tmp_path / "cache")
    counts = prepared.report.train
    assert (counts.rows, counts.samples, counts.same, counts.empty) == (3, 1, 1, 1)
    assert any("1 training pair has two equal answers" in note for note in prepared.report.notes)
    again = prepare(config, TOKENIZER, tmp_path / "cache")
    assert again.cached and again.train.digest == prepared.train.digest and again.report == prepared.report
    assert again.train.has_pairs and again.train[0].rejected is not None
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(GraftError, match="no token is left to train on.* 1 have two equal answers"):
        prepare(config, TOKENIZER)


def test_pairs_survive_the_data_set_and_change_its_digest() -> None:
    made = [tokenized(sample()), tokenized(sample("Grass?", "Green.", "Blue."))]
    data = TokenDataset.of(made)
    for given, kept in zip(made, data, strict=True):
        for one, other in zip(given.sequences, kept.sequences, strict=True):
            assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.supervised, other.supervised)
    assert data.lengths.tolist() == [len(one) for one in made]
    assert data.targets.tolist() == [one.num_targets for one in made]
    worse = tokenized(sample(rejected="Grey."))
    assert TokenDataset.of([worse, made[1]]).digest != data.digest


def test_a_pair_is_shown_with_both_answers_marked() -> None:
    shown = coloured(tokenized(sample(), "plain"), TOKENIZER, marks=True).plain
    assert "⟦" in shown and "Blue.</s>⟧\nrejected: ⟦" in shown and shown.rstrip().endswith("Green.</s>⟧")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_on": "all"}, "data.train_on has no effect if data.task is preference"),
        ({"train": {"path": "PAIRS", "format": "alpaca"}}, "preference rows have chosen and rejected"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(SHAPES["text"]) + "\n")
    if isinstance(train := changes.get("train"), dict):
        changes = {"train": {**train, "path": str(path)}}
    with pytest.raises(GraftError, match=said):
        prepare(DataConfig.model_validate({"train": str(path), "task": "preference", **changes}), TOKENIZER)
