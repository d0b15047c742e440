"""Losses of classes, values and answers against transformers' own; many jobs, resuming, and heads that come back whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import graft
from graft.adapters.parsing import parse
from graft.bases import Base, load_base, pad_id
from graft.bases.heads import draw_head, with_head
from graft.config.base import BaseConfig
from graft.config.train import TrainConfig
from graft.data.batches import padded
from graft.data.datasets import TokenDataset
from graft.data.labelling import Labelling
from graft.data.samples import Example, Sample
from graft.data.seq2seq import encoder_template, tokenize_seq2seq
from graft.errors import GraftError
from graft.routing.context import ForwardContext
from graft.runs.folder import RunFolder
from graft.training.engine import Engine
from graft.training.forward.layout import decide
from graft.training.forward.tasks import forward_of
from graft.training.job import Job
from graft.training.records.progress import Reporter
from graft.training.settings import Settings
from tests.task_bases import (
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    answered_rows,
    labelled_rows,
    save_task_base,
)
from tests.training.conftest import batcher

LORA = {"kind": "lora", "rank": 4, "dropout": 0.2, "sites": "linear"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: save_task_base(root / family, family) for family in (*ENCODERS, *DECODERS, *ENCODER_DECODERS)}


def loaded(folder: Path, task: str = "classification") -> Base:
    return load_base(
        BaseConfig(model=str(folder), device="cpu"), task, ("neg", "pos") if task == "classification" else ()
    )


def samples(rows: list[dict[str, Any]], read: str = "text", learnt: str = "label") -> list[Sample]:
    pairs = [(str(row[read]), str(row[learnt])) for row in rows]
    return [
        Sample(({"role": "user", "content": text}, {"role": "assistant", "content": label}), "data", number)
        for number, (text, label) in enumerate(pairs, 1)
    ]


def labelled(base: Base, count: int = 24) -> TokenDataset:
    labelling = Labelling("classification", ("neg", "pos"), ("neg", "pos"))
    return TokenDataset.of(
        [_made(labelling.example(one, base.tokenizer, 99, "error")) for one in samples(labelled_rows(count))]
    )


def valued(base: Base, count: int = 12) -> TokenDataset:
    rows = [{"text": row["text"], "label": number / 3 - 1} for number, row in enumerate(labelled_rows(count))]
    labelling = Labelling("regression")
    return TokenDataset.of([_made(labelling.example(one, base.tokenizer, 99, "error")) for one in samples(rows)])


def answered(base: Base, count: int = 12) -> TokenDataset:
    template = encoder_template("auto", base.tokenizer, None)
    made = samples(answered_rows(count), "source", "target")
    return TokenDataset.of([_made(tokenize_seq2seq(one, base.tokenizer, template, 99, "error")) for one in made])


def _made(outcome: Any) -> Example:
    assert isinstance(outcome, Example)
    return outcome


def job_on(base: Base, name: str, data: TokenDataset, seed: int = 1, adapter: Any = None, **config: Any) -> Job:
    draw_head(base.model, base.fresh, seed)
    torch.manual_seed(seed)
    graft.attach(base.model, {name: with_head(base.model, parse(adapter or LORA), base.fresh)})
    settings = {"batch_size": 8, "lr": 1e-2, "schedule": "constant", "steps": 6, "seed": seed, **config}
    return Job.make(base.model, name, TrainConfig(**settings), data, None)


def run(
    base: Base, jobs: list[Job], path: Path, checkpoint: int | None = None, **settings: Any
) -> list[dict[str, Any]]:
    folder = RunFolder(path) if path.exists() else RunFolder(path).create()
    padding = pad_id(base.tokenizer, base.model)
    engine = Engine(
        base.model, jobs, folder, Settings(pad_id=padding, **settings), Reporter(1, quiet=True), lambda job: None
    )
    engine.run(checkpoint)
    return [line for line in folder.metrics.read() if "loss" in line]


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_the_loss_of_classes_is_that_of_transformers_whatever_the_padding(
    folders: dict[str, Path], family: str
) -> None:
    base = loaded(folders[family])
    data = labelled(base, 6)
    batch = padded(list(data), range(6), pad_id(base.tokenizer, base.model))
    graft.attach(base.model, {"a": with_head(base.model, graft.LoRA(rank=4, sites="linear"), base.fresh)})
    forward = forward_of(base.model)
    losses_N = forward.losses(batch, ForwardContext("a", lengths=batch.lengths)).detach()
    for row, example in enumerate(data):
        ids, label = torch.as_tensor(example.input_ids)[None].long(), torch.tensor([example.label])
        kinds = (
            {"token_type_ids": torch.as_tensor(example.token_types)[None].long()}
            if example.token_types is not None
            else {}
        )
        with torch.no_grad():
            alone = base.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=label, **kinds)
        assert float(losses_N[row]) == pytest.approx(float(alone.loss), abs=2e-5)


def test_the_loss_of_values_is_the_squared_error(folders: dict[str, Path]) -> None:
    base = loaded(folders["bert"], "regression")
    data = valued(base, 5)
    batch = padded(list(data), range(5), pad_id(base.tokenizer, base.model))
    graft.attach(base.model, {"a": with_head(base.model, graft.LoRA(rank=4, sites="linear"), base.fresh)})
    total = forward_of(base.model).losses(batch, ForwardContext("a", lengths=batch.lengths)).mean()
    with torch.no_grad():
        theirs = base.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids,
            labels=batch.target_ids.float(),
        )  # fmt: skip
    assert float(total.detach()) == pytest.approx(float(theirs.loss), rel=1e-5)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_the_loss_of_answers_is_that_of_transformers_in_chunks_of_the_head(
    folders: dict[str, Path], family: str
) -> None:
    base = loaded(folders[family], "seq2seq")
    data = answered(base, 5)
    graft.attach(base.model, {"a": graft.LoRA(rank=4, sites="linear")})
    forward = forward_of(base.model)
    padding = pad_id(base.tokenizer, base.model)
    batch = padded(list(data), range(5), padding)
    assert forward.prove_head(batch, ForwardContext("a")) == "chunks"
    total = forward.losses(batch, ForwardContext("a")).mean()
    assert batch.answer_ids is not None and batch.answer_mask is not None
    with torch.no_grad():
        labels = batch.answer_ids.masked_fill(batch.answer_mask == 0, -100)
        theirs = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    assert float(total.detach()) == pytest.approx(float(theirs.loss), rel=1e-5)
    total.backward()
    assert all(
        bool(parameter.grad.any()) for name, parameter in graft.parameters(base.model, "a") if name.endswith("B")
    )


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("t5", "seq2seq")])
def test_a_job_in_company_and_in_other_micro_batches_learns_what_it_learns_alone(
    folders: dict[str, Path], tmp_path: Path, family: str, task: str
) -> None:
    def of(base: Base) -> TokenDataset:
        return labelled(base) if task == "classification" else answered(base)

    curves = {}
    for name, seed in (("first", 1), ("second", 2)):
        base = loaded(folders[family], task)
        lines = run(base, [job_on(base, name, of(base), seed, lr=1e-3)], tmp_path / name)
        curves[name] = [line["loss"] for line in lines]
    base = loaded(folders[family], task)
    jobs = [job_on(base, name, of(base), seed, lr=1e-3) for name, seed in (("first", 1), ("second", 2))]
    lines = run(base, jobs, tmp_path / "both", token_budget=96)
    for name, curve in curves.items():
        assert [line["loss"] for line in lines if line["job"] == name] == pytest.approx(curve, rel=2e-4)
    assert curves["first"] != pytest.approx(curves["second"], rel=1e-3)


@pytest.mark.parametrize(("family", "task"), [("roberta", "classification"), ("bart", "seq2seq")])
def test_a_resumed_run_goes_on_to_the_same_losses_bit_for_bit(
    folders: dict[str, Path], tmp_path: Path, family: str, task: str
) -> None:
    def fresh() -> tuple[Base, Job]:
        base = loaded(folders[family], task)
        return base, job_on(base, "a", labelled(base) if task == "classification" else answered(base))

    base, job = fresh()
    whole = [line["loss"] for line in run(base, [job], tmp_path / "run", save_every=2)]
    base, job = fresh()
    RunFolder(tmp_path / "run").metrics.keep(lambda line: line["step"] <= 4)
    again = [line["loss"] for line in run(base, [job], tmp_path / "run", checkpoint=4, save_every=2)]
    assert again == whole


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta", "electra", "modernbert", "llama"])
def test_a_saved_adapter_brings_its_head_whatever_head_the_base_was_drawn_with(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    base = loaded(folders[family])
    run(base, [job_on(base, "a", labelled(base), steps=3)], tmp_path / "run")
    graft.save(base.model, "a", tmp_path / "adapter")
    ids = torch.randint(2, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), graft.use(base.model, "a"):
        wanted = base.model(input_ids=ids).logits
    for seed in (11, 12):
        torch.manual_seed(seed)
        plain = AutoModelForSequenceClassification.from_pretrained(folders[family], num_labels=2).eval()
        plain.config.pad_token_id = base.model.config.pad_token_id  # decoders without one take a single row
        before = plain(input_ids=ids).logits
        graft.load(plain, tmp_path / "adapter")
        with torch.no_grad():
            assert torch.equal(plain(input_ids=ids).logits, wanted)
        assert not torch.allclose(before, wanted)


def test_the_head_that_comes_with_the_base_stays_as_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    base = loaded(folders["bert"])
    base.model.save_pretrained(tmp_path / "own")
    base.tokenizer.save_pretrained(tmp_path / "own")
    own = loaded(tmp_path / "own")
    assert own.fresh == ()
    job = job_on(own, "a", labelled(own), steps=2)
    assert not any("classifier" in name for name in job.params)
    with pytest.raises(GraftError, match=r"has a head for 2 labels \(neg, pos\), but the data have 3"):
        load_base(BaseConfig(model=str(tmp_path / "own")), "classification", ("a", "b", "c"))


def test_flat_batches_of_labels_are_refused(folders: dict[str, Path]) -> None:
    base = loaded(folders["bert"])
    job = job_on(base, "a", labelled(base))
    forward = forward_of(base.model)
    assert decide(forward, [job], "auto", batcher()).layout == "padded"
    with pytest.raises(GraftError, match=r"layout is flat, but samples with labels"):
        decide(forward, [job], "flat", batcher())


def test_a_fresh_head_is_trained_once_and_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    base = loaded(folders["bert"])
    alone = with_head(base.model, parse({"kind": "head", "sites": "head"}), base.fresh)
    assert [part.kind for part in alone.parts()] == ["head"]
    with pytest.raises(GraftError, match=r"kind 'full' adapts 'classifier', a head that the base lacks"):
        with_head(base.model, parse([{"kind": "lora"}, {"kind": "full", "sites": "head"}]), base.fresh)
    biased = job_on(base, "a", labelled(base), adapter={"kind": "bitfit"}, steps=3)
    run(base, [biased], tmp_path / "run")
    graft.save(base.model, "a", tmp_path / "adapter")
    ids = torch.arange(4, 12)[None]
    with torch.no_grad(), graft.use(base.model, "a"):
        wanted = base.model(input_ids=ids).logits
    again = loaded(folders["bert"])
    draw_head(again.model, again.fresh, seed=9)
    graft.load(again.model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize(("family", "task"), [("roberta", "classification"), ("bert", "regression"), ("t5", "seq2seq")])
def test_a_bfloat16_base_learns(folders: dict[str, Path], tmp_path: Path, family: str, task: str) -> None:
    classes = ("neg", "pos") if task == "classification" else ()
    base = load_base(BaseConfig(model=str(folders[family]), device="cpu", dtype="bfloat16"), task, classes)
    data = {"classification": labelled, "regression": valued, "seq2seq": answered}[task](base)
    job = job_on(base, "a", data, steps=25, adapter={"kind": "lora", "rank": 4, "sites": "linear"})
    losses = [line["loss"] for line in run(base, [job], tmp_path / "run")]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) and {each.dtype for each in job.params.values()} == {
        torch.float32
    }


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_can_be_a_classifier_too(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    base = loaded(folders[family])
    lines = run(base, [job_on(base, "a", labelled(base), steps=3)], tmp_path / "run")
    assert len(lines) == 3
