"""Batches against a token-by-token count, the steps of an epoch against their promises."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.batches import (
    flat,
    micro_batches,
    padded,
    samples_of_step,
    steps_per_epoch,
)
from graft.data.datasets import TokenDataset
from graft.data.samples import Example

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def example(length, first=0, mask=None):
    ids = np.arange(first, first + length, dtype=np.int32)
    supervised = np.arange(length) >= 1 if mask is None else np.array(mask)
    return Example(ids, supervised, "x", first + 1)


def dataset(lengths, weights=None):
    return TokenDataset.of([example(length, 1000 * at) for at, length in enumerate(lengths)], weights)


def epoch_steps(data, batch_size, seed=0, epoch=0):
    """The samples of each step of an epoch."""
    order = data.epoch_order(seed, epoch)
    return [samples_of_step(data, order, batch_size, step) for step in range(steps_per_epoch(data, batch_size))]


EXAMPLES = [
    Example(np.array([5, 6, 7, 8], np.int32), np.array([False, False, True, True]), "x", 1),
    Example(np.array([9, 8], np.int32), np.array([False, True]), "x", 2),
    Example(np.array([1, 2, 3], np.int32), np.array([False, True, False]), "x", 3),
]


def test_flat_lays_samples_end_to_end_with_positions_that_start_again():
    batch = flat(EXAMPLES, [4, 0, 7])
    assert batch.layout == "flat" and batch.attention_mask is None
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 8, 1, 2, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch.lengths == (4, 2, 3) and batch.samples == (4, 0, 7)
    assert batch.target_index.tolist() == [1, 2, 4, 6] and batch.target_ids.tolist() == [7, 8, 8, 2]
    assert batch.num_targets == 4


def test_padded_pads_on_the_right_and_masks_by_position():
    batch = padded(EXAMPLES, [4, 0, 7], pad_id=8)  # 8 is also the end of two samples
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 8, 8, 8], [1, 2, 3, 8]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 2, 0]]
    assert batch.target_index.tolist() == [1, 2, 4, 8] and batch.target_ids.tolist() == [7, 8, 8, 2]


@given(LENGTHS, st.data())
def test_both_layouts_hold_the_same_predictions(lengths, data):
    examples = []
    for length in lengths:
        mask = [False, *data.draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))]
        examples.append(example(length, data.draw(st.integers(0, 500)), mask))
    expected = Counter(
        (int(e.input_ids[at - 1]), int(e.input_ids[at])) for e in examples for at in range(len(e)) if e.supervised[at]
    )
    for batch in (flat(examples, range(len(examples))), padded(examples, range(len(examples)), 0)):
        before = batch.input_ids.flatten()[batch.target_index].tolist()
        assert Counter(zip(before, batch.target_ids.tolist(), strict=True)) == expected


def test_a_batch_moves_as_a_whole():
    batch = padded(EXAMPLES, [0, 1, 2], 0).to("meta")
    assert {
        getattr(batch, name).device.type for name in ("input_ids", "position_ids", "attention_mask", "target_ids")
    } == {"meta"}
    assert batch.lengths == (4, 2, 3)
    assert flat(EXAMPLES, [0, 1, 2]).to("cpu").input_ids.dtype == torch.long


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_sample_once_in_steps_of_the_batch_size(lengths, batch_size, seed, epoch):
    data = dataset(lengths)
    steps = epoch_steps(data, batch_size, seed, epoch)
    assert sorted(sample for step in steps for sample in step) == list(range(len(lengths)))
    assert all(len(step) == batch_size for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= batch_size
    assert steps == epoch_steps(data, batch_size, seed, epoch)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 80), st.integers(0, 3), st.integers(1, 2))
def test_the_samples_of_one_step_are_those_of_its_micro_batches_in_order(lengths, batch_size, budget, epoch, weight):
    data = dataset(lengths, [weight] * len(lengths))
    order = data.epoch_order(5, epoch)
    for number, step in enumerate(epoch_steps(data, batch_size, 5, epoch)):
        drawn = order[number * batch_size : (number + 1) * batch_size]
        assert step == sum(micro_batches(data.widths, drawn, budget), [])


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 80), st.sampled_from(["flat", "padded"]))
def test_no_micro_batch_is_over_the_budget_but_a_single_sample(lengths, batch_size, budget, layout):
    data = dataset(lengths)
    for step in epoch_steps(data, batch_size):
        for micro in micro_batches(data.widths, step, budget, layout):
            sizes = [lengths[i] for i in micro]
            tokens = sum(sizes) if layout == "flat" else max(sizes) * len(sizes)
            assert tokens <= budget or len(micro) == 1
            assert sizes == sorted(sizes, reverse=True)


@given(LENGTHS, st.integers(1, 80))
def test_micro_batches_take_every_sample_once(lengths, budget):
    groups = micro_batches(np.array(lengths), range(len(lengths)), budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))


def test_seeds_and_epochs_shuffle_differently():
    data = dataset([3] * 50)
    orders = [str(epoch_steps(data, 5, seed, epoch)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len(set(orders)) == 4


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(0, 4))
def test_whole_weights_repeat_samples(few, many, weight, epoch):
    data = dataset([3] * (few + many), [float(weight)] * few + [1.0] * many)
    seen = Counter(data.epoch_order(0, epoch).tolist())
    assert all(seen[i] == weight for i in range(few)) and all(seen[few + i] == 1 for i in range(many))


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 3), st.integers(0, 5))
def test_a_weight_of_one_half_takes_another_half_each_epoch(pairs, whole, seed):
    data = dataset([3] * 2 * pairs, [whole + 0.5] * 2 * pairs)
    seen = [Counter(data.epoch_order(seed, epoch).tolist()) for epoch in (0, 1)]
    assert all(counts.total() == pairs * (2 * whole + 1) for counts in seen)
    assert all(seen[0][i] + seen[1][i] == 2 * whole + 1 for i in range(2 * pairs))


def test_micro_batches_are_longest_first():
    assert micro_batches(np.array([2, 9, 4, 5]), [0, 1, 2, 3], 9) == [[1], [3, 2], [0]]
    assert micro_batches(np.array([2, 9, 4, 5]), [0, 1, 2, 3], 12, "padded") == [[1], [3, 2], [0]]
    assert micro_batches(np.array([]), [], 9) == []


def test_a_data_set_gives_back_its_examples():
    data = TokenDataset.of(EXAMPLES, [1.0, 2.0, 1.0])
    assert len(data) == 3 and data.lengths.tolist() == [4, 2, 3] and data.targets.tolist() == [2, 1, 1]
    for index, one in enumerate(EXAMPLES):
        assert data[index].input_ids.tolist() == one.input_ids.tolist()
        assert data[index].supervised.tolist() == one.supervised.tolist()
        assert (data[index].source, data[index].row) == (one.source, one.row)
    assert data[-1].row == 3
    with pytest.raises(IndexError):
        data[3]


def test_the_digest_follows_tokens_masks_borders_and_weights():
    base = TokenDataset.of(EXAMPLES)
    other_mask = [EXAMPLES[0], EXAMPLES[1], Example(EXAMPLES[2].input_ids, np.array([False, True, True]), "x", 3)]
    others = [TokenDataset.of(EXAMPLES[:2]), TokenDataset.of(other_mask), TokenDataset.of(EXAMPLES, [1, 1, 2])]
    assert TokenDataset.of(EXAMPLES).digest == base.digest
    assert len({base.digest, *(data.digest for data in others)}) == 4


def test_an_empty_data_set_has_no_steps():
    assert epoch_steps(TokenDataset.of([]), 4) == []


def test_a_micro_batch_of_answers_stays_within_the_budget() -> None:
    widths = np.array([[30, 2], [2, 30], [16, 16], [5, 5]])
    groups = micro_batches(widths, range(4), 64, "padded")
    assert sorted(row for group in groups for row in group) == [0, 1, 2, 3]
    for group in groups:
        assert len(group) == 1 or len(group) * widths[group].max(0).sum() <= 64
