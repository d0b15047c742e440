"""From a YAML to a run folder and back: what lies there, what is refused before anything is written, and the two verbs."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import graft
from graft.cli import main
from graft.config import RunConfig, load_run
from graft.data.templates import template_of
from graft.errors import GraftError, MissingExtra
from graft.runs.folder import RunFolder
from graft.training import resume, train
from tests.training.conftest import losses

LORA = {"kind": "lora", "rank": 4, "sites": "linear"}


@pytest.fixture
def configured(world: Path) -> Callable[..., RunConfig]:
    def make(adapter: Any = LORA, data: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
        return load_run(
            {
                "base": {"model": str(world / "base"), "device": "cpu"},
                "adapter": adapter,
                "data": {"train": str(world / "data.json"), "template": "alpaca", "cache": False, **(data or {})},
                "train": {"steps": 3, "batch_size": 4, "lr": 1e-2, **settings},
            }
        )

    return make


def test_a_run_folder_holds_all_that_a_run_leaves(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = train(configured(data={"validation": 4}), tmp_path / "run", quiet=True)
    there = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert there == {
        ".lock", "config.yaml", "lock.json", "status.json", "metrics.jsonl", "events.jsonl", "samples.jsonl",
        "adapters/lora/adapter_config.json", "adapters/lora/adapter_model.safetensors", "adapters/lora/template.json",
        "adapters/lora/README.md", "checkpoints/last.json", "checkpoints/best.json",
        *(f"checkpoints/{step:06d}/{file}" for step in (1, 3) for file in ("state.json", "lora.safetensors", "rng.safetensors")),
    }  # fmt: skip
    assert folder.config.train.steps == 3 and folder.read_status()["state"] == "finished"
    lock = json.loads((folder.path / "lock.json").read_text())
    assert (
        lock["base"]["digest"]
        and len(lock["data"]) == 64
        and lock["template"] == template_of(folder.adapter_dir("lora")).digest
    )
    sample = folder.samples.read()[0]
    assert sample["text"].endswith(sample["trained_on"]) and "it is" in sample["trained_on"] and sample["row"] >= 1


def test_the_saved_adapter_is_the_trained_one(
    configured: Callable[..., RunConfig], world: Path, tmp_path: Path
) -> None:
    folder = train(configured(), tmp_path / "run", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    plain = model(input_ids=torch.arange(2, 12)[None]).logits
    graft.load(model, folder.adapter_dir("lora"))
    assert not torch.equal(model(input_ids=torch.arange(2, 12)[None]).logits, plain)
    again = train(configured(init_from=str(folder.adapter_dir("lora")), lr=1e-9), tmp_path / "again", quiet=True)
    assert losses(again.path)[0] < losses(folder.path)[0]


def test_a_resumed_run_does_without_the_adapter_it_began_from(
    configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    first = train(configured(steps=1), tmp_path / "first", quiet=True)
    folder = train(configured(init_from=str(first.adapter_dir("lora")), save_every=2), tmp_path / "run", quiet=True)
    wanted = losses(folder.path)
    shutil.rmtree(first.path)
    shutil.rmtree(folder.checkpoint_dir(3))
    folder.status({"state": "stopped"})
    resume(folder, quiet=True)
    assert losses(folder.path) == wanted and folder.read_status()["state"] == "finished"


def test_the_model_card_says_what_was_done(configured: Callable[..., RunConfig], world: Path, tmp_path: Path) -> None:
    folder = train(configured(data={"validation": 4, "train_on": "all"}), tmp_path / "run", quiet=True)
    card = (folder.adapter_dir("lora") / "README.md").read_text()
    best = json.loads((folder.path / "checkpoints/best.json").read_text())["lora"]
    for part in (
        "base_model: base\n", "kind lora, sites linear, rank 4", "20 samples", "| Template | alpaca (", "train_on all",
        "steps 3, batch_size 4, lr 0.01", "3 of 3", f"{best['loss']:.4f}", "flat batches", "graft.load(model",
    ):  # fmt: skip
        assert part in card
    assert "warmup" not in card and str(world / "base") not in card  # the base's own name, and no path of this machine


def test_the_same_seed_gives_the_same_run_and_another_one_another(
    configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    found = [
        losses(train(configured(seed=seed), tmp_path / str(n), quiet=True).path) for n, seed in enumerate((0, 0, 1))
    ]
    assert found[0] == found[1] != found[2]


def test_a_preset_is_named_by_its_last_part(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = train(configured(adapter="llm-adapters/parallel", steps=1), tmp_path / "run", quiet=True)
    assert folder.adapters() == ["parallel"]
    assert "preset llm-adapters/parallel" in (folder.adapter_dir("parallel") / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"max_length": 8}}, "longer than data.max_length=8"),
        ({"adapter": {"kind": "lora", "sites": "re:nothing"}}, "nothing"),
        ({"warmup": 50, "schedule": "linear"}, "warmup is 50 steps"),
        ({"init_from": "nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    configured: Callable[..., RunConfig], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(GraftError, match=said):
        train(configured(**changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("name", ["lock.json", "config.yaml"])
def test_a_run_that_cannot_write_its_first_files_leaves_its_place_as_it_was(
    configured: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: bool
) -> None:
    from graft.utils import files

    replace = files.os.replace

    def full(source: Any, to: Any) -> None:
        if Path(to).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(to))
        replace(source, to)

    place = tmp_path / "runs/run"
    if there:
        place.mkdir(parents=True)
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(GraftError, match=f"cannot write .*{name}: the disk is full"):
        train(configured(), place, quiet=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["run", "runs"] if there else [])


def test_an_adapter_of_another_make_is_no_start(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = train(configured(steps=1), tmp_path / "run", quiet=True)
    with pytest.raises(GraftError, match="is not what `adapter` says: rank 4 there, 8 here"):
        train(
            configured(adapter={**LORA, "rank": 8}, init_from=str(folder.adapter_dir("lora"))),
            tmp_path / "other",
            quiet=True,
        )


def test_a_folder_with_a_run_is_refused_before_anything_is_loaded(
    configured: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configured(steps=1), tmp_path / "run", quiet=True)
    monkeypatch.setattr("graft.training.start.build", lambda config: pytest.fail("loaded"))
    with pytest.raises(GraftError, match="graft resume .*--overwrite"):
        train(configured(), tmp_path / "run", quiet=True)


def test_a_missing_tracker_names_the_command_that_installs_it(
    configured: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"pip install 'graft-llm\[track\]'"):
        train(configured(loggers=["wandb"]), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_trackers_receive_the_numbers_of_metrics_jsonl(
    configured: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        """Stands for trackio and wandb, which share three functions."""

        def __init__(self) -> None:
            self.begun: dict[str, Any] = {}
            self.lines: list[tuple[int, dict[str, float]]] = []
            self.ended = False

        def init(self, **facts: Any) -> None:
            self.begun = facts

        def log(self, numbers: dict[str, float], step: int) -> None:
            self.lines.append((step, numbers))

        def finish(self) -> None:
            self.ended = True

    fakes = {"wandb": Fake(), "trackio": Fake()}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    folder = train(configured(data={"validation": 4}, loggers=["wandb", "trackio"]), tmp_path / "run", quiet=True)
    written = [
        {key: value for key, value in line.items() if key not in ("step", "job", "job_step")}
        for line in folder.metrics.read()
    ]
    for fake in fakes.values():
        assert [numbers for _, numbers in fake.lines] == written and fake.ended
        assert fake.begun["config"]["train"]["steps"] == 3 and fake.begun["name"] == "run"


def test_the_verbs_train_and_resume(
    configured: Callable[..., RunConfig], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from graft.config import dump_run

    dump_run(configured(), tmp_path / "run.yaml")
    out = tmp_path / "runs" / "a"
    assert call("train", tmp_path / "run.yaml", "adapter.rank=2", "train.steps=2", "--out", out, "--json") == 0
    given = capsys.readouterr()
    found = json.loads(given.out)
    assert found["state"] == "finished" and found["adapters"] == {"lora": str(out / "adapters/lora")}
    assert found["jobs"]["lora"]["step"] == 2 and "step 1/2  loss" in given.err and "tokens/s" in given.err
    assert RunFolder(out).config.adapter.rank == 2
    assert call("train", tmp_path / "run.yaml", "--out", out) == 2
    assert "graft resume" in capsys.readouterr().err
    assert call("train", tmp_path / "run.yaml", "train.stps=2", "--out", tmp_path / "other") == 2
    assert "steps" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert call("train", tmp_path / "run.yaml", "--out", out, "--overwrite") == 0
    assert "lora: finished at step 3/3, loss" in capsys.readouterr().out
    assert call("resume", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert call("resume", world) == 2


def call(*arguments: Any) -> int:
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_a_run_that_ctrl_c_stops_exits_like_one(
    configured: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from graft.config import dump_run
    from graft.training import engine

    dump_run(configured(), tmp_path / "run.yaml")
    plain = engine.joint_step

    def interrupted(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*given)

    monkeypatch.setattr(engine, "joint_step", interrupted)
    assert call("train", tmp_path / "run.yaml", "--out", tmp_path / "run") == 130
    assert RunFolder(tmp_path / "run").adapters() == ["lora"]
    monkeypatch.setattr(engine, "joint_step", plain)
    assert call("resume", tmp_path / "run") == 0
    assert RunFolder(tmp_path / "run").read_status()["step"] == 3


def test_progress_in_a_terminal_shows_speed_loss_rate_memory_and_time() -> None:
    from io import StringIO

    from rich.console import Console

    from graft.training.records.progress import Reporter

    text = StringIO()
    reporter = Reporter(10, console=Console(file=text, force_terminal=True, width=160))
    reporter.step(4, {"loss": 1.25, "lr": 3e-4, "tokens_per_second": 1234.0, "memory_bytes": 2**30})
    reporter.say("halfway")
    reporter.close()
    shown = text.getvalue()
    for part in ("loss 1.2500", "lr 3.00e-04", "1,234 tokens/s", "1.00 GiB", "4/10", "halfway"):
        assert part in shown
