"""Every command and every block of code in the README runs, and its numbers are those that were measured."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

import graft
from tests.conftest import ROOT
from tests.walk import QUICK, furnish, graft_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
ADDED = {
    "check": " ".join(QUICK) + " data.validation=4",
    "train": " ".join(QUICK) + " data.validation=4",
    "eval": "--limit 2 --max-new-tokens 8",
    "predict": "--max-new-tokens 8",
    "chat": "--prompt 'Tom has 2 apples.' --max-new-tokens 4",
}
OWN_PAGE = {"federate", "serve", "ui"}
"""Verbs that the tests of their pages run."""


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_every_command_of_the_table_runs(at_home: Path) -> None:
    furnish(at_home)
    (at_home / "run.yaml").write_text(block("yaml"))
    commands = re.findall(r"^\| `(graft [^`]+)` \|", README, re.MULTILINE)
    assert len(commands) == 17
    for command in [each for each in commands if each.split()[1] not in OWN_PAGE]:
        line = command.replace("meta-llama/Llama-3.2-1B", "seedling")
        graft_command(f"{line} {ADDED.get(command.split()[1], '')}")
    for made in (
        "new.yaml",
        "runs/math/adapters/lora/adapter_model.safetensors",
        "answers.jsonl",
        "merged/model.safetensors",
    ):
        assert (at_home / made).is_file(), made


def _shape(text: str) -> str:
    """A text without what differs from run to run and from window to window: numbers, units of time, frames and white space."""
    return re.sub(r"\d[\d.,:e+-]*(\s*(second|minute|hour)s?\b)?|\s+", "", text)


def test_the_five_minutes_run_and_print_what_the_readme_shows(at_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (at_home / "data.jsonl").write_text(block("jsonl"))
    parts = re.split(r"^\$ (graft .+)$", block("console"), flags=re.MULTILINE)[1:]
    commands, outputs = parts[::2], parts[1::2]
    assert [command.split()[1] for command in commands] == ["init", "check", "train", "chat"]
    for command, shown in zip(commands, outputs, strict=True):
        capfd.readouterr()
        graft_command(command)
        said = "".join(capfd.readouterr())
        for line in shown.split("\n"):
            assert line == "..." or _shape(line) in _shape(said), line
    assert "I am a small model." in said  # it has learnt its three lines


def test_the_commands_of_qlora_run(at_home: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
    (at_home / "data.jsonl").write_text(block("jsonl"))
    graft_command("graft init run.yaml --data data.jsonl")
    part = README.split("## A base in 4 bits")[1].split("```")[1].replace("\\\n", "")
    commands = re.findall(r"^(graft [^#\n]+)", part, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["train", "merge"]
    for command in commands:
        graft_command(command.replace("meta-llama/Llama-3.2-1B", "seedling"))
    assert (at_home / "qlora-merged" / "model.safetensors").is_file()


def test_the_python_block_runs(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("python"), "README.md", "exec"), {})
    assert "math" in capsys.readouterr().out


def test_the_names_in_the_text_are_public() -> None:
    assert set(re.findall(r"`graft\.([a-z_]+)\(", README)) <= set(graft.__all__)


def test_the_make_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\S+)`", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"^\| `(\w+)` \|", README.split("## Install")[1].split("## Five")[0], re.MULTILINE)
    assert named and set(named) <= set(extras)


@pytest.mark.parametrize("page", [README, PERFORMANCE], ids=["README", "performance"])
def test_the_numbers_against_peft_and_trl_are_the_measured_ones(page: str) -> None:
    rows = re.findall(r"\| (float32|bfloat16), ([\d.]+) \| ([\d.]+) times \| ([\d.]+) times \| `([\w.]+)` \|", page)
    assert len(rows) == 4
    for dtype, dropout, speed, memory, file in rows:
        result = json.loads((RESULTS / file).read_text())
        assert (dtype, float(dropout)) == (result["settings"]["dtype"], result["settings"]["dropout"])
        assert f"{result['speed_ratio']:.1f}" == speed and f"{result['training_ratio']:.2f}" == memory


def test_what_the_readme_says_does_not_help_was_measured() -> None:
    text = re.sub(r"\s+", " ", README)
    read = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in re.findall(r"`(\w+)\.json`", README)}
    assert read["many_vs_sequential"]["over_one_by_one"]["speed"] < 1
    small, large = (read[name]["speed_ratio"] for name in ("train_vs_peft_micro4", "train_vs_peft"))
    assert f"{small:.1f} times instead of {large:.1f}" in text
    assert read["compiled"]["against_flat"]["speed_ratio"] < 1
