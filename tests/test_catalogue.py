"""The pages on adapter kinds are what the code says, name every kind, and every YAML in it is valid."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import graft
from graft.adapters.base import AdapterConfig
from graft.adapters.parsing import parse
from graft.adapters.registry import kinds
from graft.cli.catalogue import card_of, cards, pages, settings_of
from tests.contract.table import base

DOCS = Path(__file__).resolve().parent.parent / "docs"


def snippets() -> list[dict[str, Any]]:
    """What the YAML blocks of the pages say."""
    blocks = [block for text in pages().values() for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    return [YAML(typ="safe").load(io.StringIO(block)) for block in blocks]


def test_the_pages_are_those_that_the_code_writes() -> None:
    folder = DOCS / "adapters"
    written = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert written == pages(), "run: graft kinds --markdown docs/adapters"


def test_every_kind_has_a_card_an_equation_a_sentence_and_a_snippet() -> None:
    assert [card.kind for card in cards()] == list(kinds())
    for kind, config in kinds().items():
        assert card_of(kind).summary.endswith("."), kind
        assert config.suits.endswith("."), f"{config.__name__} needs `suits`: a sentence on when to use it"
    assert [snippet["adapter"]["kind"] for snippet in snippets()] == list(kinds())


@pytest.mark.parametrize("kind", kinds())
def test_every_setting_of_a_kind_is_explained(kind: str) -> None:
    assert all(meaning for name, (_, meaning) in settings_of(kind).items() if name != "sites")


@pytest.mark.parametrize("snippet", snippets(), ids=lambda snippet: snippet["adapter"]["kind"])
def test_every_snippet_is_a_valid_adapter_and_can_be_attached(snippet: dict[str, Any]) -> None:
    config = parse(snippet["adapter"])
    assert isinstance(config, AdapterConfig)
    model = base("gpt2")
    graft.attach(model, {"a": snippet["adapter"]})
    assert any(True for _ in graft.parameters(model, "a"))


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(graft.GraftError, match="Did you mean 'bitfit'?"):
        card_of("bitfitt")
