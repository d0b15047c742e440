"""Merging into few bits: which numbers are chosen, that files hold exactly these, and that an adapter is not rounded away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.bases import load_base
from graft.bases.into_bits import IntoBits
from graft.bases.losses import compared, mean_loss
from graft.bases.merged import MergeReport, write_merged
from graft.bases.quantised import quantised
from graft.bases.recovering import RoundedWeight, holding, train_rounding
from graft.bases.requantising import Target
from graft.cli import main
from graft.config.base import BaseConfig
from graft.data.batches import Batch, padded
from graft.data.samples import Example
from graft.ops.grid import Grid, grid_of
from graft.ops.packed import dequantised
from graft.testing.case import randomise
from tests.small import save_small
from tests.walk import graft_command

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
BITS = ["nf4", "fp4", "int8"]
LORA = {"kind": "lora", "rank": 2, "sites": "linear"}


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def at_random(w: Tensor, grid: Grid, generator: torch.Generator | None = None) -> RoundedWeight:
    return RoundedWeight(w, grid, generator or torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", BITS)
def test_the_nearest_numbers_are_those_that_bitsandbytes_chooses(bits: Any) -> None:
    w = weight(48, 128)
    grid = grid_of(w, bits, double_quant=False)
    found = dequantised(grid.layer(at_random(w, grid).to_the_nearest().codes(), None, torch.float32))
    if bits == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(w.half())
        wanted = codes.float() * scales[:, None] / 127
        torch.testing.assert_close(
            found, wanted, atol=float(scales.max()) / 127 * 1.01, rtol=0
        )  # it rounds in half precision
    else:
        wanted = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(w, quant_type=bits))
        assert found is not None and torch.equal(found, wanted)


@pytest.mark.parametrize("bits", BITS)
def test_stochastic_rounding_takes_a_neighbouring_level_and_keeps_the_mean(bits: Any) -> None:
    w, count = weight(4, 64), 2000
    grid = grid_of(w, bits, double_quant=True)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([at_random(w, grid, generator).dense() for _ in range(count)]).double()
    inside = w.clamp(grid.scales * grid.levels[0], grid.scales * grid.levels[-1])  # the scales are rounded too
    below, above = drawn.amin(0), drawn.amax(0)
    assert bool(((below <= inside + 1e-7) & (inside <= above + 1e-7)).all())
    assert all(len(drawn[:, i, j].unique()) <= 2 for i in range(4) for j in range(64))
    # Five standard errors of the mean of numbers that lie one step apart at most.
    assert bool(((drawn.mean(0) - inside).abs() <= 5 * (above - below) / 2 / count**0.5 + 1e-7).all())


def rows(classes: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(4):
        ids = torch.randint(5, 250, (12,), generator=generator).numpy()
        found.append(Example(ids, (ids > 0) & (torch.arange(12).numpy() > 3), "rows", 1))
    return [padded(found, range(4), 0)]


def merged(folder: Path, base_bits: str | None, bits: Any, adapter: Any, to: Path) -> tuple[MergeReport, Any]:
    config = BaseConfig.model_validate({"model": str(folder), "device": "cpu", "quantize": base_bits})
    base = load_base(config)
    graft.attach(base.model, {"a": adapter})
    randomise(base.model, "a", size=0.05)
    report = write_merged(base, "a", [[5, 6, 7, 8]], to, into=IntoBits(Target(bits, steps=6), rows(), rows(), "rows"))
    return report, load_base(BaseConfig.model_validate({"model": str(to), "device": "cpu"}))


@pytest.mark.parametrize("base_bits", [None, "nf4"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_files_hold_the_numbers_that_were_measured(
    family: str, bits: str, base_bits: str | None, tmp_path: Path
) -> None:
    folder = save_small(tmp_path / "base", family)
    report, again = merged(folder, base_bits, bits, [LORA, {"kind": "full", "sites": "norm"}], tmp_path / "to")
    found, said = quantised(again.model), report.few_bits
    assert found is not None and said is not None
    assert found.method.startswith(bits) and found.layers == said.layers and report.max_difference < 1e-5
    assert mean_loss(again.model, rows()) == pytest.approx(said.losses.merged, abs=1e-5)
    (batch,) = rows()
    labels = torch.where(torch.arange(12) > 3, batch.input_ids, -100)
    with torch.no_grad():
        theirs = again.model(input_ids=batch.input_ids, labels=labels).loss
    assert float(theirs) == pytest.approx(said.losses.merged, abs=1e-5)


def test_what_an_adapter_adds_is_still_there_on_average_and_is_gone_when_rounded_to_the_nearest(tmp_path: Path) -> None:
    # The base's weights lie on the levels; the share <Q - W, D> / <D, D> is 1 in the mean of stochastic rounding, by its definition.
    base = load_base(
        BaseConfig.model_validate(
            {"model": str(save_small(tmp_path / "base", hidden_size=64)), "quantize": "nf4", "device": "cpu"}
        )
    )
    own = dequantised(base.model.get_submodule("model.layers.0.mlp.up_proj"))
    assert own is not None
    added = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)) * own.std() / 50
    grid = grid_of(own + added, "nf4", double_quant=False)

    def share(rounded: RoundedWeight) -> float:
        return float(((rounded.dense() - own) * added).sum() / (added * added).sum())

    generator = torch.Generator().manual_seed(0)
    drawn = [share(at_random(own + added, grid, generator)) for _ in range(200)]
    assert share(at_random(own + added, grid).to_the_nearest()) < 0.3
    spread = torch.tensor(drawn).std().item() / len(drawn) ** 0.5
    assert sum(drawn) / len(drawn) == pytest.approx(1, abs=5 * spread)


def test_training_the_rounding_brings_answers_closer_and_moves_few_weights(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "base", hidden_size=64)
    model: Any = load_base(BaseConfig.model_validate({"model": str(folder), "device": "cpu"})).model.requires_grad_(
        False
    )
    rounded: dict[str, RoundedWeight] = {}
    for number, path in enumerate(("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")):
        w = model.get_submodule(path).weight.detach()
        generator = torch.Generator().manual_seed(number)
        rounded[path] = at_random(w, grid_of(w, "nf4", double_quant=True), generator)
    own = {path: model.get_submodule(path).weight.clone() for path in rounded}

    def far() -> float:
        return compared(model, rows(), {"rounded": lambda: holding(model, rounded)})[1]["rounded"].divergence

    before, was_far, rate = {path: each.codes() for path, each in rounded.items()}, far(), 3e-4
    train_rounding(model, rounded, rows(), 40, rate)
    assert far() < 0.9 * was_far
    for path, each in rounded.items():
        assert torch.equal(model.get_submodule(path).weight, own[path])
        moved = (each.codes() - before[path]).abs()
        # Adam moves a share by the rate of a step at most, so a random threshold is met with the probability of the sum of rates.
        assert int(moved.max()) <= 1 and 0 < float(moved.float().mean()) < 2 * rate * 40


@pytest.mark.slow
def test_the_command_says_what_each_rounding_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    data = "".join(json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(data)
    (tmp_path / "run.yaml").write_text(
        "base: {model: seedling, quantize: nf4}\ndata: {train: rows.jsonl, validation: 8}\nadapter: lora\n"
        "train: {steps: 4, batch_size: 4, lr: 3e-3}\n"
    )
    graft_command("graft train run.yaml --out runs/a")
    capsys.readouterr()
    graft_command("graft merge runs/a --to merged --quantize nf4 --steps 3 --json")
    said = json.loads(capsys.readouterr().out)["few_bits"]
    assert said["kind"] == "nf4" and said["layers"] == 28 and said["rows"] == "8 rows of data.validation"
    graft_command("graft merge runs/a --to again --quantize int8 --steps 0")
    shown = capsys.readouterr().out
    assert "28 linear layers in int8, rounding" in shown and "of the adapter's gain" in shown
    shutil.copytree("runs/a/adapters/lora", "elsewhere")
    with pytest.raises(SystemExit):
        main(
            [
                "merge",
                "--base",
                "seedling",
                "--adapter",
                "elsewhere",
                "--any-base",
                "--to",
                "third",
                "--quantize",
                "nf4",
            ]
        )
    assert "needs the run that trained the adapter" in " ".join(capsys.readouterr().err.split())
