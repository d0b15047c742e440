"""The commands, the YAML and the settings of docs/quantised-bases.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from graft.config.base import BaseConfig
from graft.quickstart.problems import generate
from graft.runs.folder import RunFolder
from tests.conftest import ROOT
from tests.walk import graft_command, yaml_block

PAGE = (ROOT / "docs" / "quantised-bases.md").read_text(encoding="utf-8")
BNB = "needs bitsandbytes (pip install 'graft-llm[quant]')"


@pytest.fixture
def here(at_home: Path) -> Path:
    """A folder with the data that the page uses."""
    pytest.importorskip("bitsandbytes", reason=BNB)
    Path("math_10k.json").write_text(json.dumps([{**row, "input": ""} for row in generate("train", 12)]))
    Path("qlora.yaml").write_text(yaml_block(PAGE, "qlora.yaml"))
    return at_home


@pytest.mark.slow
def test_the_commands_of_the_page_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```sh\n(graft check.*?)```", PAGE, re.DOTALL)
    assert found is not None
    commands = found.group(1).splitlines()
    assert [command.split()[1] for command in commands] == ["check", "train", "chat", "merge"]
    few = "base.model=seedling train.steps=2 train.batch_size=4"
    added = {"check": few, "train": few, "chat": "--max-new-tokens 3"}
    for command in commands:
        graft_command(f"{command} {added.get(command.split()[1], '')}")
    said = "".join(capfd.readouterr())
    assert "in nf4 with double quantisation" in said and "gemm_4bit" not in said and "cast" not in said
    assert RunFolder("runs/qlora").config.base.quantize == "nf4" and Path("qlora-merged/config.json").is_file()
    (line,) = re.findall(r"`(graft init run[^`]+)`", PAGE, re.DOTALL)
    graft_command(line.replace("\n", " "))
    assert "\n  quantize: nf4\n" in Path("run.yaml").read_text()


def test_the_table_has_every_setting() -> None:
    named = re.findall(r"^\| `base\.(\w+)` \|", PAGE, re.MULTILINE)
    assert named == ["quantize", "double_quant", "compute", "skip"] and set(named) <= set(BaseConfig.model_fields)
