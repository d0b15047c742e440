"""Points 1, 2 and 5: a fresh adapter is the identity, the base never changes, off is the base, and contexts restore what they found."""

from __future__ import annotations

from tests.contract.table import Row, check, rows


@rows()
def test_a_fresh_adapter_changes_nothing_or_declares_that_it_does(row: Row) -> None:
    check("fresh_adapter_is_identity_or_declares_it", row)


@rows()
def test_a_trained_adapter_shows_and_off_is_the_base_bit_for_bit(row: Row) -> None:
    check("off_is_the_base", row)


@rows()
def test_on_off_on_is_stable_and_an_exception_restores_the_choice(row: Row) -> None:
    check("choice_comes_back", row)


@rows("llama-mam llama-parallel-mlp bloom-prefix")
def test_an_exception_inside_the_forward_pass_leaves_the_next_one_right(row: Row) -> None:
    check("exception_in_a_forward_pass", row)


@rows()
def test_the_base_never_changes_in_evaluation_or_training(row: Row) -> None:
    check("base_never_changes", row)
