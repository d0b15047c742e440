"""Pairs of answers before several adapters: the bare base is asked once for each template, and the numbers are those of each alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.bases import Base
from graft.data.samples import Sample
from graft.data.templates import template_of
from graft.evaluation import preferences
from graft.generation.loaded import Candidate, LoadedModel
from graft.generation.loss import sample_losses
from tests.small import small_model, small_tokenizer

PAIRS = 3
ADAPTERS: dict[str, Any] = {
    "one": {"kind": "lora", "rank": 2, "sites": "attn.q"},
    "two": {"kind": "lora", "rank": 3, "sites": "mlp.down"},
    "other": {"kind": "series", "bottleneck": 4},
}


def pair(number: int) -> Sample:
    prompt = {"role": "user", "content": f"say {number}"}
    chosen, rejected = ({"role": "assistant", "content": text} for text in (f"it is {number}", "no"))
    return Sample((prompt, chosen), "pairs", number, (prompt, rejected), 1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """The bare base and three adapters, of which the last has a template of its own."""
    model = small_model()
    graft.attach(model, ADAPTERS)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ADAPTERS:
            for _, parameter in graft.parameters(model, name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    candidates = [Candidate("base", None, template_of("plain"))]
    candidates += [
        Candidate(name, name, template_of("alpaca" if name == "other" else "plain"), settings={}) for name in ADAPTERS
    ]
    base = Base(model, small_tokenizer(), "small", torch.device("cpu"), torch.float32)
    return LoadedModel(base, tuple(candidates))


def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str | None]:
    """Sequences by who was asked about them."""
    counted: Counter[str | None] = Counter()

    def noted(model: Any, examples: Any, adapters: Sequence[str | None], **more: Any) -> list[float]:
        counted.update(adapters)
        return sample_losses(model, examples, adapters, **more)

    monkeypatch.setattr(preferences, "sample_losses", noted)
    return counted


def evaluated(loaded: LoadedModel, out: Path, rows: int = PAIRS) -> dict[tuple[str, int], dict[str, Any]]:
    samples = [pair(number) for number in range(1, rows + 1)]
    result = preferences.evaluate_preferences(loaded, "pairs", samples, out, token_budget=64)
    lines = map(json.loads, Path(result["folder"], "answers.jsonl").read_text().splitlines())
    return {(line["contestant"], line["number"]): line for line in lines}


def test_the_bare_base_is_asked_once_for_each_template(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counted = asked(monkeypatch)
    together = evaluated(loaded, tmp_path / "all")
    assert counted == {None: 2 * 2 * PAIRS, "one": 2 * PAIRS, "two": 2 * PAIRS, "other": 2 * PAIRS}
    for candidate in loaded.candidates:
        alone = evaluated(replace(loaded, candidates=(candidate,)), tmp_path / candidate.name)
        for number in range(1, PAIRS + 1):
            found, wanted = together[candidate.name, number], alone[candidate.name, number]
            for key in ("logp_chosen", "logp_rejected", *(["margin"] if candidate.adapter else [])):
                assert found[key] == pytest.approx(wanted[key], abs=1e-4), key


def test_an_evaluation_that_is_taken_up_asks_the_base_about_what_is_left(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = evaluated(loaded, tmp_path)
    [journal] = tmp_path.glob("*/answers.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["contestant"] in ("base", "one")]
    journal.write_text("".join(kept))
    counted = asked(monkeypatch)
    again = evaluated(loaded, tmp_path)
    assert counted == {None: 2 * 2 * PAIRS, "two": 2 * PAIRS, "other": 2 * PAIRS}
    for key, line in first.items():
        for number in ("logp_chosen", "logp_rejected", "margin"):
            assert again[key].get(number) == pytest.approx(line.get(number), abs=1e-4)
