"""`train.activations`: the same gradients whatever becomes of the activations, by ranges of layers, and what does not go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import graft
from graft.config import load_run
from graft.errors import GraftError
from graft.training.forward import activations as module
from graft.training.forward.activations import holding, refuse_nothing_to_gain, ways_of
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import set_training
from tests.task_bases import save_task_base
from tests.training.conftest import GATED, attach, batcher, engine_for, gradients, job_on, losses, take_step, tiny
from tests.training.test_task_forward import answered, labelled, loaded
from tests.training.test_task_forward import job_on as job_on_base
from tests.training.test_task_forward import run as run_on

LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.3}
PREFIX: dict[str, Any] = {"kind": "prefix", "tokens": 3}


def one_step(family: str, adapter: Any, layout: Any, way: Any) -> tuple[float, torch.Tensor]:
    """The loss and the gradient of the first step."""
    model = attach(tiny(family), adapter=adapter)
    job, forward = job_on(model, clip=None), Forward(model)
    decide(forward, [job], layout, batcher())
    with laid_out(model, layout), holding(model, way):
        set_training(model, ["a"])
        loss = take_step(forward, [job], layout)["a"].loss
    return loss, gradients(job)


@pytest.mark.parametrize("way", ["recompute", "offload", {"0": "offload", "last1": "recompute"}], ids=str)
@pytest.mark.parametrize(
    ("family", "adapter", "layout"),
    [("llama", LORA, "flat"), ("gpt2", LORA, "padded"), ("opt", PREFIX, "flat"), ("falcon", PREFIX, "padded")],
)
def test_every_way_gives_the_gradients_of_keeping_bit_for_bit(family: str, adapter: Any, layout: Any, way: Any) -> None:
    plain, gradient = one_step(family, adapter, layout, "keep")
    loss, found = one_step(family, adapter, layout, way)
    assert loss == plain and torch.equal(found, gradient)


def test_jobs_in_company_train_the_same(tmp_path: Path) -> None:
    curves = []
    for number, way in enumerate(("keep", "offload", {"1": "offload"})):
        model = attach(attach(tiny(), "a", adapter=LORA), "b", adapter=PREFIX)
        jobs = [job_on(model, "a", steps=3), job_on(model, "b", steps=4)]
        assert engine_for(jobs, model, tmp_path / str(number), activations=way).run() == "finished"
        curves.append(losses(tmp_path / str(number)))
    assert curves[0] == curves[1] == curves[2]


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_offloading_moves_activations_and_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block of LLaMA saves for backward, counted where it is packed."""
    moved: list[int] = []

    entered = module._Offload.__enter__

    def noting(self: Any) -> Any:
        pack = self.pack_hook
        self.pack_hook = lambda tensor: (
            packed := pack(tensor),
            isinstance(packed, tuple) and moved.append(address(tensor)),
        )[0]
        return entered(self)

    monkeypatch.setattr(module._Offload, "__enter__", noting)
    model = tiny()
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # so that linear layers keep their weights for the gradient of their input
    weights = {address(each) for each in model.parameters()}
    model.train()
    with holding(model, {"0": "offload"}):
        for layer in model.model.layers:
            layer.training = True
        model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    assert moved and not weights & set(moved)
    assert all(parameter.grad is not None for parameter in model.parameters())


def deeper() -> Any:
    """A LLaMA of four blocks."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GATED, "num_hidden_layers": 4}))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("recompute", "rrrr"), ({"0-1": "recompute"}, "rr.."), ({"first1": "offload", "last2": "recompute"}, "o.rr"),
        ({"1,3": "offload", "2": "keep"}, ".oko"), ({"3": "recompute"}, "...r"),
    ],
    ids=str,
)  # fmt: skip
def test_ranges_name_layers(given: Any, wanted: str) -> None:
    model = deeper()
    found = {id(layer): way[0] for layer, way in ways_of(model, given)}
    assert "".join(found.get(id(layer), ".") for layer in model.model.layers) == wanted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"0-9": "recompute"}, "layers 0-9 do not exist; this model has layers 0 to 3"),
        ({"0-2": "recompute", "last2": "keep"}, "layer 2 is in more than one range"),
        ({"last0": "recompute"}, "'last0' is not a layer range"),
    ],
    ids=str,
)
def test_layers_that_are_not_there_or_named_twice_are_errors(given: Any, said: str) -> None:
    with pytest.raises(GraftError, match=said), holding(deeper(), given):
        pass


def test_offloading_from_a_cpu_is_an_error(tmp_path: Path) -> None:
    for way in ("offload", {"0": "offload"}):
        with pytest.raises(GraftError, match="on cpu, where there is nothing to gain: set keep or recompute"):
            refuse_nothing_to_gain(way, torch.device("cpu"))
    for way in ("keep", "recompute", {"0": "recompute"}):
        refuse_nothing_to_gain(way, torch.device("cpu"))
    refuse_nothing_to_gain("offload", torch.device("cuda"))


RUN = "base: {model: seedling}\nadapter: lora\ndata: {train: rows.jsonl}\n"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ([], "keep"), (["train.activations=recompute"], "recompute"), (["train.gradient_checkpointing=true"], "recompute"),
        (["train.gradient_checkpointing=false"], "keep"), (["train.activations={3: offload}"], {"3": "offload"}),
        (["train.activations={0-1: offload, last2: recompute}"], {"0-1": "offload", "last2": "recompute"}),
        (["train.gradient_checkpointing=false", "train.activations=recompute"], "recompute"),
    ],
    ids=str,
)  # fmt: skip
def test_the_setting_has_one_place(tmp_path: Path, changes: list[str], wanted: Any) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    found = load_run(tmp_path / "run.yaml", changes)
    assert found.common().activations == wanted
    assert load_run_again(tmp_path, found).common().activations == wanted


def load_run_again(place: Path, config: Any) -> Any:
    """The configuration as a run folder keeps it."""
    import json

    (place / "again.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    return load_run(place / "again.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.activations=recomputed"], "train.activations must be"),
        (["train.activations={}"], "must be keep, recompute, offload, or a mapping"),
        (["train.activations={attn@3: recompute}"], "'attn@3' is none"),
        (["train.activations={0-3: drop}"], "keep.*recompute.*offload"),
        (["train.gradient_checkpointing=1"], "gradient_checkpointing must be true or false"),
        (["train.gradient_checkpointing=true", "train.activations=offload"], "but activations is set too: remove one"),
        (["train.activations=recompute", "train.compile=true"], "does not go with train.activations"),
        (["train.activations={0: offload}", "train.compile=true"], "does not go with train.activations"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, changes: list[str], said: str) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    with pytest.raises(GraftError, match=said):
        load_run(tmp_path / "run.yaml", changes)


def test_jobs_share_it(tmp_path: Path) -> None:
    jobs = "base: {model: seedling}\ndata: {train: rows.jsonl}\ntrain: {gradient_checkpointing: true}\njobs: {a: {adapter: lora}}\n"
    (tmp_path / "run.yaml").write_text(jobs)
    found = load_run(tmp_path / "run.yaml")
    assert found.common().activations == "recompute" == found.each()["a"].train.activations
    for key in ("activations=recompute", "gradient_checkpointing=true"):
        with pytest.raises(GraftError, match=key.partition("=")[0]):
            load_run(tmp_path / "run.yaml", [f"jobs.a.train.{key}"])


def test_a_run_that_would_offload_from_a_cpu_ends_before_its_first_step(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f'{{"instruction": "say {n}", "output": "{n}"}}' for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "run.yaml").write_text(RUN + "train: {steps: 1, batch_size: 4, activations: offload}\n")
    with pytest.raises(GraftError, match="there is nothing to gain"):
        graft.Run.load("run.yaml", "base.device=cpu").train(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "classification"), ("modernbert", "classification"), ("t5", "seq2seq"), ("bart", "seq2seq")],
)
def test_recomputing_blocks_of_other_tasks_changes_nothing(tmp_path: Path, family: str, task: str) -> None:
    folder, curves = save_task_base(tmp_path / "base", family), []
    for way in ("keep", "recompute"):
        base = loaded(folder, task)
        data = labelled(base) if task == "classification" else answered(base)
        lines = run_on(base, [job_on_base(base, "a", data, steps=3)], tmp_path / way, activations=way)
        curves.append([line["loss"] for line in lines])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
