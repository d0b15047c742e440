"""Every file under examples/ runs."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from graft.adapters.presets import presets
from tests.task_bases import labelled_rows, save_task_base
from tests.walk import QUICK, furnish, graft_command

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUN_BELOW = {
    "attach_and_route.py",
    "with_trainer.py",
    "llm_adapters.yaml",
    "word_problems.yaml",
    "four_jobs.yaml",
    "hadamard_head.yaml",
    "hadamard.yaml",
    "preferences.yaml",  # by the page on preferences
    "preferences.jsonl",
    "slurm.sbatch",
    "kubernetes.yaml",
}
TRIED = ("llm-adapters/lora", "llm-adapters/adapterh", "papers/mam")
"""The presets that the default suite trains with."""


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if not path.name.startswith("__")} == RUN_BELOW


def test_the_scripts_for_clusters_can_be_read() -> None:
    subprocess.run(["bash", "-n", EXAMPLES / "slurm.sbatch"], check=True)
    kinds = [each["kind"] for each in YAML(typ="safe").load_all(EXAMPLES / "kubernetes.yaml")]
    assert kinds == ["Service", "Job"]


def test_attach_and_route_says_that_all_holds(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "attach_and_route.py"))
    said = capsys.readouterr().out
    assert "False" not in said and "after detach the model is what it was" in said


def test_with_trainer_saves_the_adapter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["with_trainer.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "with_trainer.py"))
    assert "adapter_config.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "preset", [pytest.param(each, marks=() if each in TRIED else pytest.mark.slow) for each in presets()]
)
def test_the_llm_adapters_run_trains_with_every_preset(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    furnish(tmp_path)
    reversible = f"base.reversible={preset.removeprefix('papers/')}" if "meft" in preset else ""
    graft_command(
        f"graft train {EXAMPLES / 'llm_adapters.yaml'} {' '.join(QUICK)} adapter={preset} data.train=math_10k.json data.validation=4 "
        f"data.max_length=512 {reversible} --out runs/one"
    )


def test_the_quickstart_says_commands_that_run_and_leaves_data_for_the_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    graft_command("graft quickstart --tiny --out runs/quickstart")
    said = capsys.readouterr().out
    suggested = [line.strip() for line in said[said.index("Now try:") :].splitlines()[1:]]
    assert [line.split()[1] for line in suggested] == ["chat", "show", "merge"]
    for line in suggested:
        graft_command(line)
    assert (tmp_path / "runs/quickstart/merged/model.safetensors").is_file()
    assert (tmp_path / "runs/quickstart/quickstart.png").stat().st_size > 10_000
    graft_command(f"graft train {EXAMPLES / 'word_problems.yaml'} {' '.join(QUICK)} --out runs/word-problems")
    quick = [change for change in QUICK if "batch_size" not in change]
    graft_command(f"graft train {EXAMPLES / 'four_jobs.yaml'} {' '.join(quick)} data.validation=4 --out runs/four")
    made = {path.parent.name for path in (tmp_path / "runs/four/adapters").glob("*/README.md")}
    assert made == {"lora", "wide", "series", "prefix"}


def test_the_two_stages_of_the_hadamard_recipe_train_the_head_then_the_adapter_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    save_task_base(tmp_path / "bert", "bert")
    rows = [f"{row['text']}\t{row['label']}\n" for row in labelled_rows(20)]
    Path("reviews.tsv").write_text("text\tlabel\n" + "".join(rows))
    few = "train.epochs=1 train.batch_size=8"
    graft_command(f"graft train {EXAMPLES / 'hadamard_head.yaml'} base.model=bert {few} --out runs/head")
    graft_command("graft merge runs/head --to runs/with_head")
    graft_command(f"graft train {EXAMPLES / 'hadamard.yaml'} {few} --out runs/hadamard")
    first, second = (load_file(f"runs/{run}/adapters/{run}/adapter_model.safetensors") for run in ("head", "hadamard"))
    assert set(first) == {"classifier.linear.weight", "classifier.linear.bias"}
    merged = load_file("runs/with_head/model.safetensors")
    assert torch.equal(merged["classifier.weight"], first["classifier.linear.weight"])
    layer = "bert.encoder.layer.0.attention.output"
    parts = {"dense.linear.scale", "dense.linear.bias", "LayerNorm.norm.weight", "LayerNorm.norm.bias"}
    assert {name.removeprefix(f"{layer}.") for name in second if name.startswith(layer)} == parts
    assert all(".attention.output." in name for name in second)
