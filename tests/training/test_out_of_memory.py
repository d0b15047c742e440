"""A step that does not fit into memory says which settings would have fitted, by a count that is checked against tensors that are there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.data.datasets import TokenDataset
from graft.errors import GraftError
from graft.training import assembly, out_of_memory
from graft.training.batching import num_tokens
from graft.training.forward.activations import holding
from graft.training.forward.causal import Forward
from graft.training.forward.modes import set_training
from graft.training.out_of_memory import OutOfMemory, is_out_of_memory
from graft.training.saved import Saved, counting, saved
from graft.training.start import train
from tests.training.conftest import attach, batcher, data, engine_for, fresh, job_on, tiny

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
]  # fmt: skip


def lacking(monkeypatch: pytest.MonkeyPatch, error: BaseException, above: int, there: int | None) -> None:
    """Let passes over more tokens than `above` fail, on a machine with so many bytes."""
    own = Forward.losses

    def losses(self: Forward, batch: Any, context: Any) -> Any:
        if batch.input_ids.numel() > above:
            raise error
        return own(self, batch, context)

    monkeypatch.setattr(Forward, "losses", losses)
    monkeypatch.setattr(out_of_memory, "room", lambda device: there)


def needs(said: str) -> dict[str, float]:
    """The settings that a message names, with the gigabytes that they need."""
    return {name: float(size) for name, size in re.findall(r"([a-z_.]+: [a-z0-9-]+) \(([\d.]+) GB\)", said)}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_step_that_does_not_fit_says_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    engine = fresh(tmp_path / "run", settings={"token_budget": 90}, batch_size=8)
    lacking(monkeypatch, error, above=64, there=10**15)
    with pytest.raises(OutOfMemory) as raised:
        engine.run()
    said = str(raised.value)
    assert "does not fit into the memory of cpu: by Graft's count it needs" in said
    assert set(needs(said)) >= {"train.activations: recompute", "base.quantize: nf4", "base.quantize: int8"}
    assert any(name.startswith("train.token_budget") for name in needs(said))
    assert raised.value.__cause__ is error and error.__traceback__ is None  # its frames hold what filled the memory
    assert (
        engine.folder.read_status()["state"] == "failed" and "by Graft's count" in engine.folder.read_status()["error"]
    )


def test_what_does_not_fit_by_itself_is_said_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = fresh(tmp_path / "run", settings={"token_budget": 90}, batch_size=8)
    lacking(monkeypatch, ERRORS[0], above=64, there=1)
    with pytest.raises(OutOfMemory, match="No single setting would do: .*Together they need .*take a smaller base"):
        engine.run()
    lacking(monkeypatch, ERRORS[0], above=-1, there=1)


def test_where_not_even_short_samples_fit_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = fresh(tmp_path / "run", batch_size=8)
    own = engine.forward.losses

    def once_begun(self: Forward, batch: Any, context: Any) -> Any:
        if torch.is_grad_enabled():
            raise ERRORS[2]
        return own(batch, context)

    monkeypatch.setattr(Forward, "losses", once_begun)
    with pytest.raises(OutOfMemory, match="nor does a single sample: lower train.token_budget"):
        engine.run()


def test_another_error_stays_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("memory"))
    lacking(monkeypatch, RuntimeError("shape mismatch"), above=40, there=1)
    with pytest.raises(RuntimeError, match="^shape mismatch$"):
        fresh(tmp_path / "run", batch_size=8).run()


def test_in_company_the_job_that_is_too_large_leaves_and_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = attach(attach(tiny(), "a"), "b")
    long = TokenDataset.of([each for each in data(64) if len(each) >= 12])
    short = TokenDataset.of([each for each in data(64) if len(each) < 8])
    jobs = [job_on(model, "a", train=short, steps=2), job_on(model, "b", train=long, steps=2)]
    engine = engine_for(jobs, model, tmp_path / "run")
    lacking(monkeypatch, ERRORS[0], above=80, there=10**15)
    assert engine.run() == "finished"
    status = engine.folder.read_status()["jobs"]
    assert status["a"]["ended"] == "finished" and status["b"]["ended"] == "failed"
    assert "train.activations: recompute" in status["b"]["error"] and status["b"]["mistake"]


def test_settings_that_are_there_already_are_not_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lacking(monkeypatch, ERRORS[0], above=64, there=None)
    with pytest.raises(OutOfMemory) as raised:
        fresh(tmp_path / "a", settings={"activations": "recompute"}, batch_size=8, optimizer="lion").run()
    assert not {"train.activations: recompute", "train.optimizer: lion"} & set(needs(str(raised.value)))


def test_full_training_is_told_of_optimisers_and_qft(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    run = graft.Run.load(
        {
            "base": {"model": "base", "device": "cpu", "dtype": "float32"}, "data": {"train": "data.json", "template": "alpaca"},
            "train": {"method": "full", "steps": 2, "batch_size": 12},
        }
    )  # fmt: skip
    lacking(monkeypatch, ERRORS[1], above=1000, there=10**15)
    monkeypatch.setattr(out_of_memory, "held_bytes", lambda device: 10**6)  # the process itself is far larger
    monkeypatch.setattr(out_of_memory, "saved", lambda *given: Saved((1.0, 1.0), (0.5, 0.5), 0.0))
    with pytest.raises(OutOfMemory) as raised:
        train(run.config, tmp_path / "out", quiet=True)
    found = needs(str(raised.value))
    assert not any(name.startswith("base.quantize") for name in found)
    assert {"train.optimizer: adamw-8bit", "train.optimizer: lion", "train.method: qft"} <= set(found)
    assert found["train.method: qft"] <= found["train.optimizer: lion"]
    with pytest.raises(OutOfMemory, match="by Graft's count it needs"):
        run.check()


def test_a_base_that_cannot_be_loaded_is_told_of_fewer_bits(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes against the parameters of the base, counted by hand."""
    monkeypatch.chdir(world)

    def failing(*given: Any) -> Any:
        raise ERRORS[0]

    monkeypatch.setattr(assembly, "load_base", failing)
    config = {"base": {"model": "base"}, "adapter": "lora", "data": {"train": "data.json", "template": "alpaca"}}
    with pytest.raises(
        OutOfMemory, match="Its weights take, without anything else: bfloat16 0.00 GB, nf4 0.00 GB, int8"
    ):
        graft.Run.load(config).check()


@pytest.mark.parametrize("way", ["keep", "recompute"])
def test_what_is_kept_is_what_autograd_holds(way: Any) -> None:
    """The count of a block against the bytes of all tensors in the graph, walked from the loss, and recomputation against its inputs."""
    model, count, inputs = attach(tiny()), Counter[int](), Counter[int]()
    rows, forward = job_on(model).rows(), Forward(model)
    with holding(model, way):
        set_training(model, ["a"])
        with counting(model, count, inputs):
            loss = forward.losses(*batcher().inputs(rows, forward.device)).sum()
    tokens, width = len(rows) * max(row.tokens for row in rows), 32
    assert inputs == {0: tokens * width * 4, 1: tokens * width * 4}
    weights = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [each for each, _ in node.next_functions]
        own = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")] if way == "keep" else []
        for each in [*own, *getattr(node, "saved_tensors", ())]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in weights:
                held[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    if way == "keep":
        assert count.total() == sum(held.values())
    else:
        assert count[0] == inputs[0] and count[1] == inputs[1]


def test_the_count_foretells_other_batches() -> None:
    model = attach(tiny())
    rows, forward = job_on(model, batch_size=16).rows(), Forward(model)
    few, many = (saved(forward, some, batcher("flat")) for some in (rows[:2], rows))
    assert sum(few.blocks) == pytest.approx(sum(many.blocks), rel=0.1)
    assert many.under("recompute") < many.under("keep") and many.under("offload") < many.under("recompute")
    assert num_tokens(rows) > num_tokens(rows[:2])


def test_a_loss_that_depends_on_nothing_that_trains_is_a_named_error(tmp_path: Path) -> None:
    model = tiny()
    model.model.aside = torch.nn.Linear(32, 32)
    model.model.norm.register_forward_hook(lambda module, args, out: (model.model.aside(out), None)[1])
    graft.attach(model, {"a": {"kind": "lora", "rank": 2, "sites": "re:model.aside"}})
    for layout in ("flat", "padded"):
        engine = engine_for([job_on(model)], model, tmp_path / layout, layout=layout)
        with pytest.raises(
            GraftError, match="2 of 2 parameters of 'a' get no gradient, among them .*Choose other sites"
        ):
            engine.run()
