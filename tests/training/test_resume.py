"""A run that is killed with SIGKILL goes on to bit-identical losses and weights. Real processes, forked from one that has torch loaded."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.config import load_run
from graft.errors import GraftError
from graft.runs.folder import RunFolder
from graft.training import resume
from tests.small import save_small
from tests.training.conftest import losses
from tests.training.killing import slow_work, work

SAVED_AT = "save_every: 3"


@pytest.fixture(scope="module")
def context() -> Any:
    made = multiprocessing.get_context("forkserver")
    loaded = ["graft.training", "datasets", "transformers.models.gpt2.modeling_gpt2", "tests.training.killing"]
    made.set_forkserver_preload([*loaded, "transformers.models.auto.tokenization_auto", "torch.optim.adamw"])
    return made


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that has state: dropout of adapter and base, warm-up, validation, a broken epoch."""
    folder = tmp_path_factory.mktemp("killed")
    save_small(folder / "base", "gpt2")
    rows = [{"instruction": f"say {number}", "input": "", "output": f"it is {number * number}"} for number in range(40)]
    (folder / "data.json").write_text(json.dumps(rows))
    path = folder / "run.yaml"
    path.write_text(
        f"""
        base: {{model: {folder / "base"}, dropout: true, device: cpu}}
        adapter: {{kind: lora, rank: 4, dropout: 0.1, sites: linear}}
        data: {{train: {folder / "data.json"}, validation: 6, template: alpaca, cache: false}}
        train: {{steps: 11, batch_size: 4, lr: 0.01, warmup: 2, schedule: cosine, validate_every: 4, {SAVED_AT}, seed: 3}}
        """.replace("\n        ", "\n")
    )
    return path


@pytest.fixture(scope="module")
def unbroken(context: Any, yaml: Path) -> Path:
    out = yaml.parent / "unbroken"
    run(context, work, yaml, out)
    return out


def run(
    context: Any,
    target: Any,
    yaml: Path,
    out: Path,
    kill: str | None = None,
    go_on: bool = False,
    until: int | None = None,
) -> int:
    """The exit code of a process; with `until` it is killed once that many lines of metrics are written."""
    process = context.Process(target=target, args=(str(yaml), str(out), kill, go_on))
    process.start()
    metrics = out / "metrics.jsonl"
    while until is not None and process.is_alive():
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= until:
            process.kill()
        time.sleep(0.005)
    process.join(120)
    return process.exitcode


def same(out: Path, wanted: Path) -> None:
    """Equal to the last bit: losses, validation losses, the adapter, the optimiser."""
    assert losses(out) == losses(wanted) and len(losses(out)) == 11
    lines, others = (
        [line for line in RunFolder(path).metrics.read() if "validation_loss" in line] for path in (out, wanted)
    )
    assert [(line["step"], line["validation_loss"]) for line in lines] == [
        (line["step"], line["validation_loss"]) for line in others
    ]
    for file in (
        "adapters/lora/adapter_model.safetensors",
        "checkpoints/000011/lora.safetensors",
        "checkpoints/000011/rng.safetensors",
    ):
        own, other = load_file(out / file), load_file(wanted / file)
        assert set(own) == set(other) and all(torch.equal(own[name], other[name]) for name in own), file
    assert RunFolder(out).read_status()["state"] == "finished"
    assert not [path for path in out.rglob(".*") if path.suffix in (".tmp", ".old")]


@pytest.fixture(
    params=[pytest.param("first", marks=pytest.mark.slow), pytest.param("writing", marks=pytest.mark.slow), "between"]
)
def killed(request: pytest.FixtureRequest, context: Any, yaml: Path) -> Iterator[tuple[str, Path]]:
    out = yaml.parent / request.param
    by_itself = request.param != "between"
    target = work if by_itself else slow_work
    code = run(context, target, yaml, out, request.param if by_itself else None, until=None if by_itself else 5)
    assert code == -signal.SIGKILL
    yield request.param, out


def test_a_killed_run_goes_on_bit_for_bit(killed: tuple[str, Path], context: Any, yaml: Path, unbroken: Path) -> None:
    """Killed before the first checkpoint stood, while a later one was half written, and between two of them."""
    moment, out = killed
    folder = RunFolder(out)
    assert folder.read_status().get("state") in ("killed", None)
    assert {"first": [], "writing": [1, 3]}.get(moment, folder.checkpoints()) == folder.checkpoints()
    assert run(context, work, yaml, out, go_on=True) == 0
    same(out, unbroken)


@pytest.mark.slow
def test_a_run_killed_again_while_it_resumes_goes_on_too(context: Any, yaml: Path, unbroken: Path) -> None:
    out = yaml.parent / "twice"
    assert run(context, work, yaml, out, kill="writing") == -signal.SIGKILL
    assert run(context, work, yaml, out, kill="first", go_on=True) == -signal.SIGKILL
    assert run(context, work, yaml, out, go_on=True) == 0
    same(out, unbroken)


def test_a_finished_run_has_nothing_to_go_on_with(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (unbroken / "metrics.jsonl").read_bytes()
    resume(unbroken)
    assert "is finished" in capsys.readouterr().err and (unbroken / "metrics.jsonl").read_bytes() == before


def test_a_run_that_is_still_running_is_refused(unbroken: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run").create()
    folder.write_config(RunFolder(unbroken).config)
    folder.status({"state": "running"})
    before = (folder.path / "status.json").read_bytes()
    with folder.claim(), pytest.raises(GraftError, match="is still running"):
        resume(folder)
    assert (folder.path / "status.json").read_bytes() == before


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="is not a run folder"):
        resume(tmp_path)


def test_data_that_changed_since_are_refused(unbroken: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(unbroken, tmp_path / "changed"))
    folder = RunFolder(out)
    folder.write_config(load_run(folder.config_path, ["data.validation=7"]))
    folder.status({"state": "stopped"})
    with pytest.raises(GraftError, match="cannot be resumed: the data of 'lora' changed since"):
        resume(out)
