"""The worked examples of batching: where rows are cut, and how a batch is laid out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graft.data.samples import Example
from graft.training.rows import Row
from tests.training.conftest import batcher


def row(job: str, position: int, ids: list[int], supervised: list[int]) -> Row:
    example = Example(np.array(ids, np.int32), np.isin(ids, supervised), "data.jsonl", position + 1)
    return Row(job, job, example, position, position, 0, "adapter", seed=position, pass_seed=9)


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [("flat", [["a9", "b7"], ["a5", "a4", "b3"]]), ("padded", [["a9"], ["a5", "b7"], ["a4", "b3"]])],
)
def test_rows_are_cut_longest_first_and_those_of_a_job_lie_side_by_side(layout: Any, wanted: list[list[str]]) -> None:
    lengths = {"a": (9, 5, 4), "b": (7, 3)}
    rows = [row(job, at, [*range(size)], [1]) for job, sizes in lengths.items() for at, size in enumerate(sizes)]
    assert [[f"{each.job}{each.tokens}" for each in micro] for micro in batcher(layout, 16).cut(rows)] == wanted


def test_a_batch_is_laid_out_end_to_end_or_padded() -> None:
    rows = [row("a", 0, [5, 6], [6]), row("b", 1, [7, 8, 9], [9])]
    flat, padded = batcher("flat").batch(rows), batcher("padded").batch(rows)
    assert (flat.input_ids.tolist(), flat.position_ids.tolist()) == ([[5, 6, 7, 8, 9]], [[0, 1, 0, 1, 2]])
    assert flat.attention_mask is None and flat.target_index.tolist() == [0, 3]
    assert (padded.input_ids.tolist(), padded.position_ids.tolist()) == ([[5, 6, 0], [7, 8, 9]], [[0, 1, 0], [0, 1, 2]])
    assert padded.attention_mask is not None and padded.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert padded.target_index.tolist() == [0, 4]
    assert flat.target_ids.tolist() == padded.target_ids.tolist() == [6, 9]


def test_a_context_names_the_adapter_the_length_and_the_seed_of_each_row() -> None:
    rows = [row("a", 0, [5, 6], [6]), row("b", 1, [7, 8, 9], [9])]
    context = batcher("flat").context(rows)
    assert (context.rows, context.lengths, context.flat, context.seeds) == (("a", "b"), (2, 3), True, (0, 1))
    assert context.pass_seeds == (9, 9)
    assert batcher("padded").context(rows[:1], seeded=False).seeds is None
    assert batcher("padded").context(rows[:1]).rows == "a"
