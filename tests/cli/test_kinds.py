"""graft kinds: the table, one kind with its settings, and what each costs on a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import graft
from graft.cli import main
from graft.cli.catalogue import pages
from tests.small import save_small, small_model


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a call prints."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def test_the_table_names_every_kind_and_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    table = printed(capsys, "kinds")
    found = json.loads(printed(capsys, "kinds", "--json"))
    assert [card["kind"] for card in found] == list(graft.kinds())
    for card in found:
        assert card["kind"] in table and card["summary"] in table
    by_kind = {card["kind"]: card for card in found}
    assert by_kind["bitfit"]["needs"] == "bias" and by_kind["lora"]["source"] == "arXiv 2106.09685"
    assert by_kind["series"]["folds"] == "no" and by_kind["hadamard"]["folds"] == "yes, where layers have biases"
    assert by_kind["prefix"]["identity"] == "no" and by_kind["ia3"]["identity"] == "yes"


def test_one_kind_comes_with_its_equation_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "kinds", "hadamard")
    assert "h' = w (.) h + b" in said and "position = 'after'" in said and "Norm of the same layers" in said
    assert json.loads(printed(capsys, "kinds", "ia3", "--json"))["settings"]["inputs"][0] == "('mlp.down',)"


def test_the_pages_are_written_to_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"pages in {tmp_path / 'docs'}" in printed(capsys, "kinds", "--markdown", str(tmp_path / "docs"))
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "docs").iterdir()}
    assert written == pages()


def test_parameters_are_counted_on_a_model_without_its_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = save_small(tmp_path / "base", "llama")
    (folder / "model.safetensors").unlink()
    found = {
        card["kind"]: card["parameters"]
        for card in json.loads(printed(capsys, "kinds", "--base", str(folder), "--json"))
    }
    model = small_model("llama")
    graft.attach(model, {"a": graft.IA3()})
    assert found["ia3"] == sum(p.numel() for _, p in graft.parameters(model, "a")) == 2 * (16 + 16 + 48)
    assert found["bitfit"].startswith("does not apply: kind 'bitfit' at 'bias'")
    assert f"{found['lora']:,}" in printed(capsys, "kinds", "--base", str(folder))


def test_what_is_unknown_ends_with_two_and_names_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments, message in (
        (("kinds", "lore"), "Did you mean 'lora'"),
        (("kinds", "--base", str(tmp_path / "no")), "there is no model"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2 and message in capsys.readouterr().err
