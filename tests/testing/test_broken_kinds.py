"""A kind that breaks a promise fails the check of that promise, with a message that says what to do."""

from __future__ import annotations

import functools

import pytest

from graft.testing import CHECKS, Report, run_contract
from tests.testing import broken_kinds as broken
from tests.testing.conftest import SLOW

QUICK = tuple(name for name in CHECKS if name not in SLOW)


@functools.cache
def report_of(kind: type, *checks: str) -> Report:
    return run_contract(kind, ["llama"], checks=checks or QUICK)


def message_of(kind: type, check: str) -> str:
    report = report_of(kind, check) if check in SLOW else report_of(kind)
    assert not report.ok
    failed = {row.check: row.message for row in report.failures}
    assert check in failed, failed
    return failed[check]


@pytest.mark.parametrize(
    ("kind", "check", "message"),
    [
        (broken.StartsElsewhere, "fresh_adapter_is_identity_or_declares_it", "declares `starts_as_identity` True, but"),
        (broken.ChangesBase, "base_never_changes", "the base has changed at model.layers.0.self_attn.v_proj.weight"),
        (broken.NeverTrains, "every_parameter_trains", "4 of 8 parameters have not changed: .*\\.b, "),
        (broken.UnsavedBuffer, "loads_back_the_same", "persistent buffers, or make it from a seed"),
        (broken.WrongFold, "merges_or_refuses", r"the merged weights \(`fold`\) compute what"),
        (broken.NoFold, "merges_or_refuses", "declares `folds` True, but merging is refused: .* Write `fold`"),
        (broken.MixesRows, "mixed_batch_equals_each_alone", "row 0 of a"),
        (broken.MixesRows, "unequal_prompts_equal_one_at_a_time", "a batch of unequal prompts with"),
        (broken.UnseededDropout, "dropout_follows_the_row_seed", "ctx.dropout.*, not with nn.Dropout"),
        (broken.LeavesState, "nothing_is_left_behind", "still holds a tensor of it in LeavesStateAdapter.last"),
        (broken.DependsOnThePast, "nothing_is_left_behind", "changed the adapter's DependsOnThePastAdapter 0: mean"),
        (broken.RoughMasters, "masters_are_float32", "found torch.bfloat16 at .* Make them with dtype=spec.dtype"),
        (broken.Promotes, "bfloat16_is_close_to_float32", "Cast to h.dtype|dtype"),
        (broken.AnotherDevice, "is_built_on_the_device_of_its_parent", "Use spec.device"),
        (broken.ReadsANumber, "one_compiled_graph_serves_every_choice", "cannot make one full graph"),
        (broken.NoSuchSite, "attaches", "attaches to none of llama: .*attn.nothing"),
        (broken.Raises, "attaches", r"IndexError: nothing at place 3 \(.*broken_kinds.py, line \d+\)"),
    ],
)
def test_a_broken_kind_fails_the_check_of_its_promise(kind: type, check: str, message: str) -> None:
    found = message_of(kind, check)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found)


@pytest.mark.parametrize(
    "kind", [broken.StartsElsewhere, broken.NeverTrains, broken.WrongFold, broken.NoFold, broken.UnseededDropout]
)
def test_a_kind_that_breaks_one_promise_keeps_the_others(kind: type) -> None:
    expected = {
        broken.StartsElsewhere: {"fresh_adapter_is_identity_or_declares_it"},
        broken.NeverTrains: {"every_parameter_trains"},
        broken.WrongFold: {"merges_or_refuses"},
        broken.NoFold: {"merges_or_refuses"},
        broken.UnseededDropout: {"dropout_follows_the_row_seed"},
    }
    assert expected[kind] <= {row.check for row in report_of(kind).failures}
    passed = {row.check for row in report_of(kind).rows if row.outcome == "passed"}
    assert {"base_never_changes", "off_is_the_base", "mixed_batch_equals_each_alone"} <= passed
