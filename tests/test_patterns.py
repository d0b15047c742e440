"""Regular expressions of a file: those of Python, within a time."""

from __future__ import annotations

import re
import time

import pytest

import graft
from graft.errors import GraftError
from graft.utils.patterns import pattern
from tests.contract.table import base

PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.down_proj", "lm_head", ""]


@pytest.mark.parametrize(
    "text", [r".*q_proj", r"model\.layers\.(?:1|10)\..*", r"(?:a|b)?", r".*[^0]\.mlp\.\w+", "lm_head"]
)
def test_an_expression_means_what_it_means_to_python(text: str) -> None:
    found = pattern(text)
    for path in PATHS:
        assert found.fullmatch(path) == (re.fullmatch(text, path) is not None)
        assert found.search(path) == (re.search(text, path) is not None)
        assert (found.match(path) is None) == (re.match(text, path) is None)


@pytest.mark.parametrize("text", ["(", "[a", "*", r"\p{L}", "(" * 3000 + ")" * 3000, "a" * 30_000])
def test_what_is_no_expression_is_named(text: str) -> None:
    with pytest.raises(graft.GraftError, match="is not a regular expression"):
        pattern(text)


def test_a_slow_expression_ends_with_a_word_and_is_not_tried_again() -> None:
    slow = pattern(r"(?:(?:a|a)+)+$")
    with pytest.raises(graft.GraftError, match="more than 1 second"):
        slow.fullmatch("a" * 60 + "!")
    begun = time.process_time()
    with pytest.raises(graft.GraftError, match="more than 1 second"):
        slow.fullmatch("a" * 60 + "!")
    assert time.process_time() - begun < 0.1


@pytest.mark.parametrize(
    "adapter",
    [
        graft.LoRA(sites=r"re:(?:(?:.|.)+)+(?<=Q)"),
        graft.LoRA(sites="attn.q", rank_pattern={r"(?:(?:.|.)+)+(?<=Q)": 3}),
        graft.IA3(sites="attn.v mlp.down", inputs=(r"(?:(?:.|.)+)+(?<=Q)",)),
    ],
)
def test_slow_sites_and_patterns_end_with_a_word(adapter: graft.LoRA) -> None:
    with pytest.raises(graft.GraftError, match="write a simpler one"):
        graft.attach(base("llama"), {"a": adapter})


@pytest.mark.parametrize("text", ["((a{1000}){1000}){1000}", "(a{0,300}){,300}b", "(?:(?:a{1,99}){1,99}){1,99}"])
def test_counts_that_multiply_are_refused_before_they_are_compiled(text: str) -> None:
    with pytest.raises(GraftError, match="counts in braces multiply"):
        pattern(text)
    assert pattern(r"layers\.\d{1,2}\.(a{2}b){3}").fullmatch("layers.10.aabaabaab")


def test_waiting_for_the_processor_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = pattern("waits")
    monkeypatch.setattr(waiting, "_compiled", Waiting())
    assert waiting.search("waits")


class Waiting:
    """An expression whose process does not get its turn: the time limit passes once, and no processor time was used."""

    tries = 0

    def search(self, text: str, timeout: float) -> re.Match[str] | None:
        self.tries += 1
        if self.tries == 1:
            time.sleep(1.1 * timeout)
            raise TimeoutError
        return re.search("waits", text)
