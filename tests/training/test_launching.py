"""`graft train --processes 2`: every mode gives what one process gives; what is wrong is said once; a lost process comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graft.cli import main

JOBS = """
base: {model: base, dtype: DTYPE}
data: {train: data.json, template: alpaca, validation: 4}
train: {steps: 8, batch_size: 4, lr: 1e-3, schedule: constant, save_every: 2, token_budget: 400}
jobs:
  lora: {adapter: {kind: lora, rank: 4, sites: linear, dropout: 0.2}}
  deep: {adapter: {kind: lora, rank: 2, sites: attn.q@1}, train: {steps: 5}}
  one: {adapter: {kind: series, bottleneck: 4}, train: {seed: 3, batch_size: 1}}
  prefix: {adapter: {kind: prefix, tokens: 2}}
  dora: {adapter: {kind: dora, rank: 2, sites: attn.q}}
"""
PIPELINE = ["--processes", "2", "distributed.mode=pipeline"]


def graft(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "graft", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=240
    )


def trained(folder: Path, out: str, *words: str) -> dict[tuple[int, str], float]:
    """Train; step and job -> training or validation loss."""
    done = graft(folder, "train", "jobs.yaml", "--out", out, "--overwrite", *words)
    assert done.returncode == 0, done.stderr
    return losses(folder / out)


def losses(run: Path) -> dict[tuple[int, str], float]:
    """Step and job -> training or validation loss, as metrics.jsonl has them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "validation_loss")
    return {(line["step"], f"{line['job']} {key}"): line[key] for line in lines for key in keys if key in line}


def weights(run: Path) -> dict[str, Any]:
    """Job and tensor -> the trained tensors."""
    files = sorted((run / "adapters").glob("*/adapter_model.safetensors"))
    return {f"{path.parent.name} {name}": each for path in files for name, each in load_file(path).items()}


def place(world: Path, dtype: str = "float32") -> Path:
    """The folder with the jobs in it."""
    (world / "jobs.yaml").write_text(JOBS.replace("DTYPE", dtype))
    return world


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "bfloat16", "nf4", "fp4", "int8"])
def test_every_mode_gives_what_one_process_gives(world: Path, base: str) -> None:
    quantised = base in ("nf4", "fp4", "int8")
    folder = place(world, "float32" if quantised else base)
    more = [f"base.quantize={base}"] if quantised else []
    wanted = trained(folder, "one", *more)
    found = {
        mode: trained(folder, mode, "--processes", "2", f"distributed.mode={mode}", *more)
        for mode in ("spread", "ddp", "fsdp2", "pipeline")
    }
    for mode, own in found.items():
        assert own.keys() == wanted.keys()
        assert own == pytest.approx(wanted, rel=2e-2 if base == "bfloat16" else 1e-6), mode
        if base != "bfloat16":
            for key, tensor in weights(folder / "one").items():
                assert float((weights(folder / mode)[key] - tensor).abs().max()) <= 2e-5, (mode, key)
    assert found["fsdp2"] == found["ddp"]  # the same split: to the last bit


@pytest.mark.slow
def test_parts_stay_in_the_number_format_of_the_files(world: Path) -> None:
    folder = place(world)
    narrow = folder / "narrow"
    shutil.copytree(folder / "base", narrow, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(narrow, dtype=torch.bfloat16).save_pretrained(narrow)
    found = {
        mode: trained(folder, mode, "--processes", "2", f"distributed.mode={mode}", "base.model=narrow")
        for mode in ("ddp", "fsdp2")
    }
    assert found["fsdp2"] == found["ddp"]
    streams = ("--processes", "2", "distributed.mode=ddp", "base.model=narrow", "base.offload=host")
    assert trained(folder, "streams", *streams) == found["ddp"]
    done = graft(
        folder, "check", "jobs.yaml", "--processes", "2", "--json", "distributed.mode=fsdp2", "base.model=narrow"
    )
    weights = json.loads(done.stdout)["jobs"]["lora"]["trial"]["memory"]["weights"]
    model = AutoModelForCausalLM.from_pretrained(narrow)
    blocks = sum(each.numel() for each in model.model.layers.parameters())
    others = sum(each.numel() for each in model.parameters()) - blocks
    assert weights == pytest.approx((2 * blocks + 4 * others) / 2, rel=0.05)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_in_another_mode(world: Path) -> None:
    folder = place(world)
    wanted = trained(folder, "whole")
    trained(folder, "parts", "--processes", "2", "distributed.mode=ddp", "train.steps=2", "jobs.deep.train.steps=2")
    steps = ["train.steps=3", "train.steps=4", "train.steps=6", "train.steps=8"]
    two = ["--processes", "2"]
    ways = [
        [*two, "distributed.mode=pipeline"],
        [*two, "distributed.mode=spread"],
        ["distributed.mode=auto"],
        [*two, "distributed.mode=fsdp2"],
    ]
    for step, way in zip(steps, ways, strict=True):
        deep = f"jobs.deep.train.steps={min(5, int(step[-1]))}"
        done = graft(folder, "resume", "parts", step, deep, *way)
        assert done.returncode == 0, done.stderr
    training = {key: loss for key, loss in losses(folder / "parts").items() if key[1].endswith(" loss")}
    assert training == pytest.approx({key: wanted[key] for key in training}, rel=1e-6)
    assert len(training) == sum(key[1].endswith(" loss") for key in wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*PIPELINE, "distributed.stages=[1, 2]"], "are 2 stages of 3 blocks, but there are 2 processes, and base has 2 blocks"),
        (["--processes", "3", "distributed.mode=pipeline"], "base has 2 blocks, fewer than the 3 processes"),
        (["--processes", "2", "distributed.stages=[1, 1]"], "stages are for mode pipeline, and mode is auto"),
        ([*PIPELINE, "train.answers=2"], "pipeline does not take train.answers"),
        ([*PIPELINE, "base.reversible=meft1"], "pipeline does not take base.reversible"),
        ([*PIPELINE, "scheduler.memory=1"], "pipeline does not take scheduler.memory"),
        (["--processes", "2", "distributed.mode=single"], "2 processes were started"),
        (["distributed.mode=ddp"], "there is one process"),
        (["--processes", "2", "train.lr=-1"], "train.lr"),
        (["--processes", "2", "base.model=nowhere"], "'nowhere' is not a folder"),
        (["--processes", "6", "distributed.mode=spread"], "5 jobs for 6 processes"),
        (["--processes", "2", "distributed.mode=fsdp2", "base.offload=host"], "does not take base.offload"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_once_on_one_line(world: Path, words: list[str], said: str) -> None:
    done = graft(place(world), "train", "jobs.yaml", "--out", "wrong", *words)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and said in lines[-1], done.stderr
    assert len(lines) == 1, lines
    assert not (world / "wrong" / "status.json").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_comes_back_and_the_run_goes_on(world: Path) -> None:
    folder = place(world)
    wanted = trained(folder, "unbroken", "--processes", "2", "distributed.mode=ddp")
    command = [sys.executable, "-m", "graft", "train", "jobs.yaml", "--out", "killed", "--processes", "2", "--restarts", "1"]  # fmt: skip
    process = subprocess.Popen(
        [*command, "distributed.mode=ddp"], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    metrics, until = folder / "killed" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < until and not (metrics.exists() and metrics.read_text().count("\n") >= 10):
        time.sleep(0.02)
    os.kill(_ranks(process.pid)[1], signal.SIGKILL)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 0, said
    assert losses(folder / "killed") == wanted


def test_what_is_started_again_goes_on_with_its_own_run_alone(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place(world))
    command = ["train", "jobs.yaml", "--out", "again", "train.steps=1", "jobs.deep.train.steps=1"]

    def ended(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main([*command, *more])
        return int(end.value.code or 0), capsys.readouterr().err

    assert ended()[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    code, said = ended()
    assert code == 0 and "nothing to resume" in said
    code, said = ended("train.lr=1e-2")
    assert code == 2 and "already holds a run" in said


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_as_in_one_process(world: Path) -> None:
    command = [sys.executable, "-m", "graft", "train", "jobs.yaml", "--out", "stopped", "--processes", "2", "--restarts", "1"]  # fmt: skip
    process = subprocess.Popen(
        [*command, "train.steps=4000"], cwd=place(world), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics, until = world / "stopped" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < until and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 130 and "Traceback" not in said, said
    assert json.loads((world / "stopped" / "status.json").read_text())["state"] == "stopped"


def _ranks(parent: int) -> list[int]:
    """The processes that a launcher started, in the order of their ranks."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found: dict[int, int] = {}
    for child in map(int, children):
        variables = dict(
            each.split("=", 1) for each in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in each
        )
        if "RANK" in variables:
            found[int(variables["RANK"])] = child
    return [found[rank] for rank in sorted(found)]
