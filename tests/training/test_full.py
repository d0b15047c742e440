"""Full training: the steps are those of a plain loop over transformers' model, and a run leaves an ordinary model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from graft.attaching.bare import keep_context
from graft.config import load_run
from graft.config.train import TrainConfig
from graft.errors import GraftError
from graft.training.batching import num_tokens
from graft.training.forward.activations import holding
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import set_training
from graft.training.job import Job
from graft.training.resuming import resume
from graft.training.start import train
from graft.training.updates.gradients import Gradients
from graft.training.updates.rounding import stochastic_bfloat16
from tests.training.conftest import batcher, data, exact_norm, losses, take_step, tiny
from tests.walk import graft_command


@pytest.fixture(autouse=True)
def _norms_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)


def job_of(model: Any, method: Any = "full", count: int = 16, **config: Any) -> Job:
    keep_context(model)
    settings = {"batch_size": 4, "lr": 1e-2, "schedule": "constant", "steps": 6, "method": method, **config}
    return Job.make(model, "full", TrainConfig(**settings), data(count), None)


def loss_of(model: Any, job: Job) -> torch.Tensor:
    """The mean loss of the job's next step, sample by sample through the model's own logits."""
    total, count = torch.zeros(()), 0
    for row in job.rows():
        ids = torch.as_tensor(row.example.input_ids).long()
        each = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        picked = each[torch.as_tensor(row.example.supervised[1:])]
        total, count = total + picked.sum(), count + len(picked)
    return total / count


def steps(model: Any, job: Job, count: int, layout: Any, budget: int = 4096, again: bool = False) -> list[float]:
    forward, taken = Forward(model), []
    decide(forward, [job], "auto", batcher())
    with laid_out(model, layout), holding(model, "recompute"):
        set_training(model, [])
        taken = [take_step(forward, [job], layout, budget)["full"].loss for _ in range(count)]
    return taken


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_steps_are_those_of_a_plain_loop(family: str) -> None:
    plain = tiny(family, torch.float64)
    optimizer, expected = torch.optim.AdamW(plain.parameters(), 1e-2, weight_decay=0.1), []
    guide = job_of(tiny(family, torch.float64))
    for _ in range(3):
        loss = loss_of(plain, guide)
        expected.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        guide.advance()
    for layout, budget in (("padded", 4096), ("padded", 24), *([("flat", 40)] if family != "opt" else [])):
        model = tiny(family, torch.float64)
        job = job_of(model, weight_decay=0.1, clip=0.5)
        assert steps(model, job, 3, layout, budget) == pytest.approx(expected, rel=1e-7)
        for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")
        assert set(model.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        ("all", lambda name: True),
        ("attn", lambda name: "self_attn" in name),
        ("mlp@1 norm", lambda name: "layers.1.mlp" in name or "norm" in name),
        ("layer@0", lambda name: "layers.0." in name),
        ("embed head", lambda name: "embed" in name or "lm_head" in name),
        (["attn.q", r"re:.*\.down_proj"], lambda name: "q_proj" in name or "down_proj" in name),
    ],
    ids=["all", "attn", "mlp and norm", "layer", "tables", "pattern"],
)  # fmt: skip
def test_the_parts_that_are_named_train_and_no_others(parts: Any, trained: Any) -> None:
    model = tiny()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    job = job_of(model, {"kind": "full", "parts": parts})
    assert set(job.params) == {name for name in before if trained(name)}
    steps(model, job, 2, "flat")
    changed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert changed == set(job.params)


def test_a_shared_weight_trains_once() -> None:
    model = tiny("gpt2")
    job = job_of(model, {"kind": "full", "parts": "head"})
    assert list(job.params) == ["transformer.wte.weight"]
    assert set(job_of(tiny("gpt2")).params) == {name for name, _ in model.named_parameters()}


def test_micro_batches_are_added_up_in_float32() -> None:
    """Against sums in float64 of the gradients of single micro-batches in bfloat16."""

    def made(**more: Any) -> tuple[Any, Job]:
        model = tiny(dtype=torch.bfloat16)
        return model, job_of(model, batch_size=16, clip=None, **more)

    model, job = made()
    exact = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in job.params.items()}
    rows = job.rows()
    forward, size = Forward(model), job.objective.size(rows)
    set_training(model, [])
    for micro in batcher(budget=20).cut(rows):
        model.zero_grad()
        sums = torch.segment_reduce(
            forward.losses(*batcher().inputs(micro, forward.device)).double(), "sum",
            lengths=torch.tensor([row.targets for row in micro]),
        )  # fmt: skip
        job.objective.share(micro, sums, size).backward()
        for name, each in job.params.items():
            assert each.grad is not None
            exact[name] += each.grad.double()
    assert num_tokens(rows) > 100
    errors = {}
    for wide in (None, "float32"):
        model, job = made(accumulate_in=wide)
        set_training(model, [])
        Gradients().prepare(Forward(model), [job], batcher(budget=20))
        found = {name: each.grad for name, each in job.params.items() if each.grad is not None}
        assert found.keys() == exact.keys() and {each.dtype for each in found.values()} == {torch.bfloat16}
        errors[wide] = max(
            float((each.double() - exact[name]).abs().max() / exact[name].abs().max()) for name, each in found.items()
        )
    assert errors["float32"] < 2**-8 < errors[None]


def test_stochastic_rounding_keeps_what_bfloat16_loses() -> None:
    """The mean of many weights is that of float32; the nearest weight never moves; in backward it is the same step."""
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    found = torch.stack([stochastic_bfloat16(values, torch.Generator().manual_seed(at)).float() for at in range(400)])
    nearest = values.to(torch.bfloat16).float()
    assert float((found.mean(0) - values).abs().mean()) < 0.1 * float((nearest - values).abs().mean())
    assert bool(((found - values).abs() <= 2.0**-7 * values.abs()).all())
    assert torch.equal(stochastic_bfloat16(nearest, torch.Generator().manual_seed(0)).float(), nearest)

    moved, states = {}, []
    for method in ({}, {"rounding": "stochastic"}, {"rounding": "stochastic", "update": "in_backward"}):
        model = tiny(dtype=torch.bfloat16)
        job = job_of(model, {"kind": "full", "parts": "mlp", **method}, clip=None, lr=2e-5)
        before = {name: each.detach().float() for name, each in job.params.items()}
        for _ in range(6):
            take_step(Forward(model), [job], "padded")
        moved[str(method)] = [
            float((each.detach().float() - before[name]).abs()[before[name].abs() > 0.02].mean())
            for name, each in job.params.items()
        ]
        states.append({**job.trainable.state(), **job.tensors()})
        if method:
            assert {each.dtype for name, each in job.tensors().items() if "exp_avg" in name} == {torch.float32}
    plain, stochastic, _ = moved.values()
    assert max(plain) == 0.0 and min(stochastic) > 1e-5
    for name, each in states[1].items():
        assert torch.equal(each, states[2][name]), name


RUN: dict[str, Any] = {
    "base": {"model": "base", "device": "cpu", "dtype": "float32"},
    "data": {"train": "data.json", "template": "alpaca", "validation": 4},
    "train": {"method": "full", "steps": 6, "batch_size": 4, "save_every": 3, "validate_every": 2, "lr": 1e-3},
}


def test_a_run_leaves_an_ordinary_model_and_resumes_bit_for_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    whole = train(load_run(RUN), tmp_path / "whole", quiet=True)
    half = train(load_run(RUN, ["train.steps=3", "train.schedule=constant"]), tmp_path / "half", quiet=True)
    unbroken = train(load_run(RUN, ["train.schedule=constant"]), tmp_path / "unbroken", quiet=True)
    resume(half, ["train.steps=6"], quiet=True)
    assert losses(half.path) == losses(unbroken.path)
    assert [(folder.path / "model" / "model.safetensors").read_bytes() for folder in (half, unbroken)] == [
        (unbroken.path / "model" / "model.safetensors").read_bytes()
    ] * 2

    # the best weights, which AutoModel loads, with the keys of the base
    best = json.loads((whole.path / "checkpoints" / "best.json").read_text())["full"]
    state = load_file(whole.checkpoint_dir(best["step"]) / "full.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(whole.path / "model")
    base: Any = AutoModelForCausalLM.from_pretrained("base")
    assert set(model.state_dict()) == set(base.state_dict())
    for name, each in model.named_parameters():
        assert torch.equal(each, state[f"adapter/{name}"])
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)

    # every command that takes a run takes it
    graft_command(f"graft eval {whole.path}")
    result = json.loads(next((whole.path / "eval").glob("*/result.json")).read_text())
    (scored,) = result["results"]
    assert scored["name"] == "full" and scored["trained"]["train"]["method"]["kind"] == "full"
    last = [line for line in whole.metrics.read() if "validation_loss" in line and line["step"] == best["step"]]
    assert scored["loss"] == pytest.approx(last[0]["validation_loss"], rel=1e-4)
    graft_command(f"graft chat {whole.path} --prompt hello --max-new-tokens 2")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    graft_command(
        f"graft predict {whole.path} {tmp_path / 'prompts.txt'} --out {tmp_path / 'out.jsonl'} --max-new-tokens 2"
    )
    capsys.readouterr()
    graft_command(f"graft show {whole.path}")
    assert "adapter               full" in capsys.readouterr().out
    graft_command(f"graft check {whole.path}")
    capsys.readouterr()
    for command, said in (
        (f"graft merge {whole.path} --to {tmp_path / 'm'}", "trained the base itself, so there is nothing to merge"),
        (
            f"graft export {whole.path} --to {tmp_path / 'm'}",
            "trained the base itself, so there is no adapter to export",
        ),
        (f"graft eval {whole.path} --base seedling", "so another base has nothing of it: leave out --base"),
        (
            f"graft chat --base base --adapter {whole.path} --prompt hello",
            "trained a whole model and no adapter: name it as a base",
        ),
    ):
        with pytest.raises(AssertionError):
            graft_command(command)
        assert said in " ".join(capsys.readouterr().err.split())

    # a new run may replace it, but not one on its own model
    with pytest.raises(GraftError, match="which the run would replace: name another folder"):
        train(load_run(RUN, [f"base.model={whole.path / 'model'}"]), whole.path, overwrite=True, quiet=True)
    train(load_run(RUN, [f"base.model={whole.path / 'model'}", "train.steps=1"]), half.path, overwrite=True, quiet=True)
    (half.path / "model" / "notes.txt").write_text("mine")
    adapter = ["adapter={kind: lora}", "train.method=adapter", "train.steps=1"]
    train(load_run(RUN, adapter), half.path, overwrite=True, quiet=True)
    assert [path.name for path in (half.path / "model").iterdir()] == ["notes.txt"]


def test_a_part_trains_in_company_of_a_fresh_head(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"row {n}", "label": ["odd", "even"][n % 2 == 0]} for n in range(16)]
    Path("labelled.json").write_text(json.dumps(rows))
    run = {
        "base": {**RUN["base"], "model": str(world / "base")},
        "data": {"task": "classification", "train": "labelled.json", "validation": 4},
        "train": {"method": {"kind": "full", "parts": "attn@0"}, "steps": 2, "batch_size": 4},
    }
    folder = train(load_run(run), "out", quiet=True)
    stored = load_file(folder.checkpoint_dir(2) / "full.safetensors")
    own = {name.removeprefix("adapter/") for name in stored if name.startswith("adapter/")}
    assert "score.weight" in own and all("layers.0.self_attn" in name for name in own - {"score.weight"})
    graft_command("graft eval out")
    (scored,) = json.loads(next(Path("out/eval").glob("*/result.json")).read_text())["results"]
    assert scored["total"] == 4


def test_mezo_trains_the_base_too(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    method = "train.method={kind: mezo, parts: attn norm, restore: subtract}"
    changes = [method, "train.steps=4", "train.lr=1e-4", "train.schedule=constant"]
    whole = train(load_run(RUN, changes), tmp_path / "whole", quiet=True)
    half = train(load_run(RUN, [*changes, "train.steps=2"]), tmp_path / "half", quiet=True)
    resume(half, ["train.steps=4"], quiet=True)
    assert losses(half.path) == losses(whole.path)
    model: Any = AutoModelForCausalLM.from_pretrained(whole.path / "model")
    base: Any = AutoModelForCausalLM.from_pretrained("base")
    changed = {name for name, each in model.named_parameters() if not torch.equal(each, base.state_dict()[name])}
    assert changed and all("self_attn" in name or "norm" in name for name in changed)
