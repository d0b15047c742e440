"""The closure of the kinds: does each one train, resume, answer and merge in every place that a composition can put it?

    alone      company: rows of it beside rows of a LoRA       mixture, gate: inside one       stack: beside a LoRA under one name
    two: on the same rows as a LoRA of another name

A cell is either shown to work on a tiny random base, or it is refused by an error that says why. Anything else is a fault: `closure` lets
the exception through.
"""

from __future__ import annotations

import re
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.adapters.registry import kinds
from graft.attaching.active import route, set_active, use
from graft.attaching.attach import attach
from graft.attaching.merge import merge
from graft.attaching.parameters import parameters, penalty
from graft.attaching.saving import load_training_state, save, training_state
from graft.combining.combine import combine
from graft.errors import GraftError
from graft.formats.loading import load
from graft.injection.state import state_of
from graft.testing.bases import ids, logits, loss, tiny_base
from graft.testing.case import Case, randomise
from graft.testing.fused import fusion

FAMILIES = ("llama", "gpt2", "bert", "t5")
OTHER = {"kind": "lora", "rank": 3, "alpha": 6, "sites": "linear"}
PLACES: dict[str, Callable[[Any], Any]] = {
    "alone": lambda spec: spec,
    "company": lambda spec: spec,
    "mixture": lambda spec: {"kind": "mixture", "of": spec},
    "gate": lambda spec: {"kind": "gate", "of": spec, "per": "token"},
    "stack": lambda spec: [spec, OTHER],
    "two": lambda spec: spec,
}
"""Place -> the adapter that stands there, from the kind's own settings."""


@dataclass(frozen=True)
class Cell:
    """What one kind does in one place."""

    kind: str
    place: str
    action: str
    refusal: str
    """The error that refuses it; empty if it works."""


def closure(names: list[str] | None = None) -> Iterator[Cell]:
    """Try every kind in every place, and yield what came of it. names: the kinds; None: all.

    Raises what a cell raises, unless it is a `GraftError`, and AssertionError for a wrong result.
    """
    for kind, example in examples().items():
        if names is not None and kind not in names:
            continue
        for place in PLACES:
            for action, tried in ACTIONS.items():
                try:
                    tried(_Scene(kind, place, example))
                except GraftError as error:
                    yield Cell(kind, place, action, str(error))
                except Exception as error:
                    raise AssertionError(f"{kind}, {place}, {action}: {type(error).__name__}: {error}") from error
                else:
                    yield Cell(kind, place, action, "")


def examples() -> dict[str, Any]:
    """Return the kinds that are tried, each with a small adapter of it (as in `Case.spec`). A fusion is of two trained bottlenecks."""
    series = {"kind": "series", "bottleneck": 8, "sites": "mlp"}
    return {**{kind: cls.example() for kind, cls in kinds().items()}, "fusion": fusion(series, series)}


class _Scene:
    """A kind in a place, on the first family that has what the kind needs."""

    def __init__(self, kind: str, place: str, example: Any) -> None:
        cases = [Case(each, kind, example) for each in FAMILIES]
        case = next((each for each in cases if not each.missing_sites), cases[0])
        self.place, self.family, self.spec = place, case.family, PLACES[place](case.adapter)
        self.names = ("a", "b") if place in ("company", "two") else ("a",)

    def model(self, seed: int = 0) -> Any:
        """Return a base with the adapter as "a" and, where there are two, a LoRA as "b"; their parameters are random."""
        model = tiny_base(self.family)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            attach(model, {"a": self.spec} | ({"b": OTHER} if len(self.names) > 1 else {}))
        for number, name in enumerate(self.names):
            randomise(model, name, seed + number, 0.1)
        return model

    def rows(self, model: Any) -> Any:
        """Return the context in which the rows are served as the place says."""
        if self.place == "company":
            return route(model, ["a", "b", "a"])
        return use(model, ["a", "b"] if self.place == "two" else "a")

    def outputs(self, model: Any) -> Tensor:
        """Return the logits of three rows."""
        with self.rows(model):
            return logits(model, ids(3))


def _train(scene: _Scene) -> None:
    model = scene.model()
    set_active(model, list(scene.names))
    trained = [p for name in scene.names for _, p in parameters(model, name)]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    model.train()
    losses, reached = [], set()
    with torch.random.fork_rng():
        for seed in range(6):  # a mixture draws other experts each time
            torch.manual_seed(seed)
            optimizer.zero_grad()
            with scene.rows(model):
                value = loss(model, ids(3))
            extra = [each for name in scene.names if (each := penalty(model, name)) is not None]
            sum(extra, value).backward()
            assert torch.isfinite(value)
            reached |= {id(p) for p in trained if p.grad is not None}
            optimizer.step()
            losses.append(float(value.detach()))
    assert min(losses[1:]) < losses[0], f"nothing was learnt: {losses}"
    assert len(reached) == len(trained), f"{len(trained) - len(reached)} of {len(trained)} parameters got no gradient"


def _resume(scene: _Scene) -> None:
    model, again = scene.model(), scene.model(seed=5)
    for name in scene.names:
        load_training_state(again, name, training_state(model, name))
    assert torch.equal(scene.outputs(again), scene.outputs(model))


def _evaluate(scene: _Scene) -> None:
    model, again = scene.model(), tiny_base(scene.family)
    with tempfile.TemporaryDirectory() as folder:
        for name in scene.names:
            load(again, save(model, name, Path(folder) / name), name=name)
    found = scene.outputs(again)
    assert torch.allclose(found, scene.outputs(model), atol=1e-5), "a loaded adapter computes something else"
    if scene.place == "company":
        for row, name in enumerate(("a", "b", "a")):
            with use(model, name):
                assert torch.allclose(logits(model, ids(3))[row], found[row], atol=1e-4), "company changes a row"


def _merge(scene: _Scene) -> None:
    model = scene.model()
    wanted, name = scene.outputs(model), "a"
    if scene.place == "two":
        report = combine(model, ["a", "b"], "c", how="svd", rank=64)
        assert report.error is not None and report.error < 1e-3, f"the combination is {report.error} off"
        if any(each.module.acts_before for each in state_of(model).adapters["a"].installs):
            return  # on one row it changes the input of the LoRA too; what is combined is the differences
        name = "c"
    if scene.place == "company":
        with use(model, "a"):
            wanted = logits(model, ids(3))
    merge(model, name)
    assert torch.allclose(logits(model, ids(3)), wanted, atol=1e-3, rtol=1e-3), "merged weights compute something else"


ACTIONS: dict[str, Callable[[_Scene], None]] = {
    "train": _train,
    "resume": _resume,
    "evaluate": _evaluate,
    "merge": _merge,
}


def page(cells: list[Cell]) -> str:
    """Return the table as Markdown: a row for each kind, a column for each place, and the refusals as notes."""
    notes: dict[str, int] = {}
    rows: dict[str, dict[str, str]] = {}
    for kind in dict.fromkeys(cell.kind for cell in cells):
        for place in PLACES:
            own = [cell for cell in cells if (cell.kind, cell.place) == (kind, place)]
            rows.setdefault(kind, {})[place] = _said(own, notes)
    head = [
        f"| kind | {' | '.join(PLACES)} |",
        f"|---|{'---|' * len(PLACES)}",
        *(f"| `{kind}` | {' | '.join(row.values())} |" for kind, row in rows.items()),
    ]
    return "\n".join([TITLE, *head, "", *(_note(number, text) for text, number in notes.items())]) + "\n"


def _note(number: int, text: str) -> str:
    return textwrap.fill(
        f"{number}. {text}", 98, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False
    )


def _said(cells: list[Cell], notes: dict[str, int]) -> str:
    refused = {cell.action: _short(cell.refusal) for cell in cells if cell.refusal}
    if not refused:
        return "yes"
    numbers = sorted({notes.setdefault(text, len(notes) + 1) for text in refused.values()})
    marks = f"({', '.join(map(str, numbers))})"
    return f"no {marks}" if len(refused) == len(cells) else f"no {', no '.join(refused)} {marks}"


def _short(refusal: str) -> str:
    """Return an error without what names this adapter, up to its advice."""
    text = refusal.removeprefix("adapter kind 'mixture': ").removeprefix("adapter kind 'gate': ")
    text = re.sub(r"^'a' is of kind [\w-]+( at [^,]+)?, which is", "this kind is", text)
    text = re.sub(r"kind [\w-]+ (acts|puts)", r"this kind \1", text, count=1)
    return re.sub(r" at '?model\.[\w.]*'?| at '?transformer\.[\w.]*'?| at '?encoder\.[\w.]*'?", "", text)


TITLE = """# Which kind goes where

Each kind of adapter, at the settings that its page shows, was tried in each place on a tiny random
base. *yes*: it trains, resumes, answers after loading and merges there. Otherwise the numbers say
which error refuses it. `graft kinds --closure` tries all of it again and prints this page; a test
compares. `fusion` is over two trained bottlenecks.

- *company*: rows of the adapter beside rows of a LoRA in one batch.
- *mixture*, *gate*: inside a mixture, and inside a gate with one number for each token.
- *stack*: beside a LoRA under one name.
- *two*: on the same rows as a LoRA of another name. To merge means `graft combine --how svd`.
"""
