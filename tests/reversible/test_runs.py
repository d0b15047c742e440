"""Runs on a reversible base: the layouts, jobs together and alone, dropout, resuming, folders, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.bases import load_model
from graft.bases.dequantising import dequantise
from graft.cli import main
from graft.config.base import BaseConfig
from graft.errors import GraftError
from graft.runs.folder import RunFolder
from tests.reversible.bases import VARIANTS
from tests.small import save_small
from tests.training.conftest import GATED, attach, batcher, data, engine_for, job_on, losses, step, tiny, world  # noqa: F401

KINDS: dict[str, Any] = {
    "a": {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.2},
    "b": {"kind": "series", "bottleneck": 4, "sites": "mlp", "dropout": 0.1},
    "c": {"kind": "prefix", "tokens": 2},
}


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def trained(path: Path, names: str, variant: Any, adapters: dict[str, Any]) -> dict[str, list[float]]:
    """The losses of jobs that train together."""
    model = graft.make_reversible(tiny(), variant)
    for name in names:
        attach(model, name, adapters[name], seed=ord(name))
    jobs = [job_on(model, name, data(20, seed=ord(name)), steps=5, batch_size=3, seed=ord(name)) for name in names]
    engine_for(jobs, model, path).run()
    lines = RunFolder(path).metrics.read()
    return {name: [line["loss"] for line in lines if line["job"] == name and "loss" in line] for name in names}


@pytest.mark.parametrize("variant", ["meft1", *(pytest.param(each, marks=pytest.mark.slow) for each in VARIANTS[1:])])
def test_jobs_of_several_kinds_train_together_as_each_does_alone(variant: Any, tmp_path: Path) -> None:
    adapters = {**KINDS, "d": f"papers/{variant}"}
    together = trained(tmp_path / "all", "abcd", variant, adapters)
    for name in adapters:
        alone = trained(tmp_path / name, name, variant, adapters)[name]
        assert together[name] == pytest.approx(alone, rel=1e-4) and len(alone) == 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_flat_layout_is_proved_and_gives_the_padded_gradients(variant: Any) -> None:
    found = []
    for layout in ("flat", "padded"):
        model = attach(graft.make_reversible(tiny(), variant), adapter=f"papers/{variant}")
        job = job_on(model, train=data(16), batch_size=6)
        outcome = step(model, [job], layout=layout)["a"]
        found.append((outcome.loss, outcome.grad_norm))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_base_in_four_bits_trains_as_the_plain_base_of_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
    folder = save_small(
        tmp_path / "base", scale=2.0, **{key: value for key, value in GATED.items() if key != "pad_token_id"}
    )
    curves = []
    for plain in (False, True):
        model = load_model(BaseConfig(model=str(folder), quantize="nf4", device="cpu"))
        if plain:
            dequantise(model, torch.float32)
        attach(graft.make_reversible(model, "meft1"), adapter="papers/meft1")
        job = job_on(model, train=data(20), steps=4, batch_size=4, lr=1e-2)
        assert engine_for([job], model, tmp_path / str(plain)).run() == "finished"
        curves.append(losses(tmp_path / str(plain)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def write_run(folder: Path, world: Path, **base: Any) -> Path:  # noqa: F811
    settings = {
        "base": {"model": str(world / "base"), "device": "cpu", "reversible": "meft2", **base},
        "adapter": {"preset": "papers/meft2"},
        "data": {"train": str(world / "data.json"), "validation": 4, "template": "alpaca"},
        "train": {"steps": 6, "batch_size": 4, "lr": 1e-2, "schedule": "constant", "save_every": 3},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))
    return path


def test_a_run_resumes_bit_for_bit_and_its_folder_answers(
    world: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Dropout of the adapters (0.1) and of the base is a part of it."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    path = write_run(tmp_path, world, dropout=True)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call("check", str(path)) == 0
    assert call("train", str(path), "--out", str(whole)) == 0
    assert call("train", str(path), "train.steps=3", "--out", str(cut)) == 0
    assert call("resume", str(cut), "train.steps=6") == 0
    assert losses(cut) == losses(whole) and len(losses(whole)) == 6
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": "say 4"}\n{"instruction": "please say 14"}\n')
    capsys.readouterr()
    answers = []
    folder = whole / "adapters" / "meft2"
    for source in ((str(whole),), ("--base", str(world / "base"), "--adapter", str(folder))):
        out = tmp_path / f"answers-{len(answers)}.jsonl"
        assert call("predict", *source, str(prompts), "--out", str(out), "--max-new-tokens", "6") == 0
        answers.append([json.loads(line)["answer"] for line in out.read_text().splitlines()])
    assert answers[0] == answers[1] and len(answers[0]) == 2
    assert "the adapters were trained on a reversible base (meft2), so the base is one" in capsys.readouterr().err
    assert json.loads((folder / "adapter_config.json").read_text())["base"]["reversible"] == "meft2"


def test_an_adapter_says_on_which_base_it_means_something(tmp_path: Path) -> None:
    model = attach(graft.make_reversible(tiny(), "meft1", anchor_every=1), adapter="papers/meft1")
    ids = torch.arange(3, 12).view(1, -1)
    wanted = model(ids).logits
    graft.save(model, "a", tmp_path / "a")
    again = graft.load(
        graft.make_reversible(tiny(), "meft1", anchor_every=None), tmp_path / "a"
    )  # anchors do not matter
    assert torch.equal(again(ids).logits, wanted)
    with pytest.raises(
        GraftError, match=r"base.reversible is meft1 there, null \(an ordinary base\) here.*Set base.reversible: meft1"
    ):
        graft.load(tiny(), tmp_path / "a")
    with pytest.raises(GraftError, match="base.reversible is meft1 there, meft3 here"):
        graft.load(graft.make_reversible(tiny(), "meft3"), tmp_path / "a")
    plain = attach(tiny())
    graft.save(plain, "a", tmp_path / "plain")
    graft.export(plain, "a", tmp_path / "peft")
    with pytest.raises(GraftError, match="base.reversible is null .* there, meft1 here"):
        graft.load(graft.make_reversible(tiny(), "meft1"), tmp_path / "plain")
    with pytest.raises(GraftError, match="made for an ordinary base, and this one is reversible"):
        graft.load(graft.make_reversible(tiny(), "meft1"), tmp_path / "peft")
