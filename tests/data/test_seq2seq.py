"""Questions for an encoder and answers for its decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.config.data import DataConfig
from graft.data.inspect import learnt_text
from graft.data.labelling import saved_task
from graft.data.preparing import Prepared, prepare
from graft.data.seq2seq import encoder_template
from graft.data.templates import template_of
from graft.errors import GraftError
from tests.data.test_labelling import write
from tests.task_bases import task_tokenizer

TOKENIZER = task_tokenizer("t5")


def made(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Prepared:
    config = DataConfig(train=str(write(tmp_path / "rows.jsonl", rows)), task="seq2seq", cache=False, **settings)
    return prepare(config, TOKENIZER)


@pytest.mark.parametrize(
    "row",
    [
        {"source": "say ab", "target": "ba"},
        {"instruction": "say ab", "output": "ba"},
        {"messages": [{"role": "user", "content": "say ab"}, {"role": "assistant", "content": "ba"}]},
    ],
)
def test_question_and_answer_are_encoded_as_the_tokenizer_encodes_source_and_target(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    example = made(tmp_path, [row]).train[0]
    assert example.input_ids.tolist() == TOKENIZER("say ab")["input_ids"]
    assert example.answer is not None and example.answer.tolist() == TOKENIZER(text_target="ba")["input_ids"]
    assert example.num_targets == 3 and len(example) == 10 and learnt_text(example, TOKENIZER) == "ba</s>"


def test_what_training_reads_is_what_generation_reads(tmp_path: Path) -> None:
    row = {"instruction": "Sum up.", "input": "A long story.", "output": "Short."}
    data = made(tmp_path, [row], template="alpaca")
    template = encoder_template("alpaca", TOKENIZER, None)
    asked = template.prompt_ids([{"role": "user", "content": "Sum up.", "input": "A long story."}], TOKENIZER)
    assert data.train[0].input_ids.tolist() == asked
    assert "### Instruction:\nSum up." in TOKENIZER.decode(asked)


def test_the_template_is_saved_as_itself_with_the_task_beside_it(tmp_path: Path) -> None:
    template = encoder_template("auto", TOKENIZER, None)
    template.save(tmp_path)
    assert saved_task(tmp_path) == "seq2seq" and template_of(tmp_path).name == "plain"
    assert template_of(tmp_path).digest == template.digest


def test_an_overlong_question_is_cut_at_its_end_and_an_answer_never(tmp_path: Path) -> None:
    rows = [{"source": "abcdefgh", "target": "xyz"}, {"source": "ab", "target": "x" * 20}]
    with pytest.raises(GraftError, match=r"2 of 2 samples are longer than data\.max_length=10"):
        made(tmp_path, rows, max_length=10)
    data = made(tmp_path, rows, max_length=10, overlong="truncate_prompt")
    assert len(data.train) == 1 and data.report.train.dropped == 1
    example = data.train[0]
    assert TOKENIZER.decode(example.input_ids) == "abcde</s>" and example.cut == 3
    assert example.answer is not None and TOKENIZER.decode(example.answer) == "xyz</s>"


def test_rows_without_an_answer_are_left_out_and_texts_without_a_question_are_errors(tmp_path: Path) -> None:
    data = made(tmp_path, [{"source": "a", "target": "b"}, {"source": "c", "target": ""}])
    assert len(data.train) == 1 and data.report.train.empty == 1
    with pytest.raises(GraftError, match="row 1: an encoder-decoder needs a question and an answer"):
        made(tmp_path, [{"text": "alone"}])


def test_lengths_count_both_sides_and_the_digest_covers_the_answers(tmp_path: Path) -> None:
    one = made(tmp_path, [{"source": "ab", "target": "c"}]).train
    other = made(tmp_path, [{"source": "ab", "target": "d"}]).train
    assert one.widths.tolist() == [[3, 2]] and one.lengths.tolist() == [5] and one.targets.tolist() == [2]
    assert one.digest != other.digest
