"""Every kind in every composition: it works, or an error says why not, and docs/closure.md says which."""

from __future__ import annotations

import re

import pytest

import graft
from graft.testing.closure import PLACES, Cell, closure, examples, page
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "closure.md").read_text(encoding="utf-8")


def said(text: str) -> dict[str, list[list[str]]]:
    """Kind -> for each place, what the page says, with the notes in place of their numbers."""
    text = text.replace("\n   ", " ")
    notes = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", text, re.MULTILINE)
    return {kind: [[re.sub(r" \(.*", "", cell), *(notes[n] for n in re.findall(r"\d+", cell))] for cell in cells.split(" | ")]
            for kind, cells in rows}  # fmt: skip


def test_the_page_has_every_kind_in_every_place() -> None:
    assert set(said(PAGE)) == set(examples()) == {*graft.kinds(), "fusion"}
    assert all(len(cells) == len(PLACES) for cells in said(PAGE).values())


@pytest.mark.parametrize("kind", ["lora", "series", "prefix"])
def test_the_page_says_what_comes_of_it(kind: str) -> None:
    assert said(page(list(closure([kind]))))[kind] == said(PAGE)[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(examples()) - {"lora", "series", "prefix"}))
def test_the_page_says_what_comes_of_any_kind(kind: str) -> None:
    assert said(page(list(closure([kind]))))[kind] == said(PAGE)[kind]


def test_a_fault_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    from graft.testing import closure as module

    def fails(scene: object) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setitem(module.ACTIONS, "merge", fails)
    with pytest.raises(AssertionError, match="lora, alone, merge: RuntimeError: shape mismatch"):
        list(closure(["lora"]))


def test_refusals_are_numbered_once() -> None:
    cells = [
        Cell("lora", place, action, "no room" if action == "merge" else "")
        for place in PLACES
        for action in ("train", "merge")
    ]
    text = page(cells)
    assert "| `lora` |" + " no merge (1) |" * len(PLACES) in text and text.count("no room") == 1
