"""Fewer checks and families for the tests of the command, so that it answers soon."""

from __future__ import annotations

import pytest

from graft.testing import CHECKS, run_contract

QUICK = ("fresh_adapter_is_identity_or_declares_it", "padding_on_the_left", "dropout_follows_the_row_seed")

SLOW = {"fresh_process_computes_the_same", "one_compiled_graph_serves_every_choice"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(CHECKS) - {"attaches", *QUICK}:
        monkeypatch.delitem(CHECKS, name)
    monkeypatch.setattr(run_contract, "__defaults__", (("llama", "bert"),))
