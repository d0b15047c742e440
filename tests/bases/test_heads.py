"""Heads of classifiers: which layers are fresh, how they are drawn, what the base's own head keeps, and merged models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import graft
from graft.bases import load_base, own_classes, own_task
from graft.bases.context import context_length
from graft.bases.heads import draw_head, with_head
from graft.bases.merged import write_merged
from graft.config.base import BaseConfig
from graft.data.labelling import Labelling
from graft.errors import GraftError
from graft.generation.loaded import load_candidates
from tests.task_bases import save_task_base

FRESH = {
    "bert": ("classifier",),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
    "deberta": ("pooler.dense", "classifier"),
    "electra": ("classifier.dense", "classifier.out_proj"),
    "modernbert": ("head.dense", "classifier"),
    "llama": ("score",),
    "bart": ("classification_head.dense", "classification_head.out_proj"),
    "t5": ("classification_head.dense", "classification_head.out_proj"),
}


@pytest.mark.parametrize("family", FRESH)
def test_fresh_are_the_linear_layers_of_the_head_and_a_seed_draws_them_alike(tmp_path: Path, family: str) -> None:
    config = BaseConfig(model=str(save_task_base(tmp_path / "base", family)), device="cpu")
    torch.manual_seed(1)
    base = load_base(config, "classification", ("a", "b", "c"))
    torch.manual_seed(2)
    again = load_base(config, "classification", ("a", "b", "c"))
    assert set(base.fresh) == set(FRESH[family]) and base.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    weights = [[each.model.get_submodule(path).weight for path in base.fresh] for each in (base, again)]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    body = {name: tensor.clone() for name, tensor in base.model.state_dict().items() if not name.startswith(base.fresh)}
    draw_head(base.model, base.fresh, seed=7)
    draw_head(again.model, again.fresh, seed=8)
    assert not any(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    draw_head(again.model, again.fresh, seed=7)
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert all(torch.equal(tensor, base.model.state_dict()[name]) for name, tensor in body.items())


def test_an_encoder_that_lacks_weights_of_its_body_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_task_base(tmp_path / "base", "bert")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        GraftError, match=r"lack the weights of 'bert\.encoder\.layer\.1\.output\.dense', which is not part"
    ):
        load_base(BaseConfig(model=str(folder), device="cpu"), "classification", ("a", "b"))


def test_a_pooler_that_is_missing_is_fresh_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_task_base(tmp_path / "base", "bert")
    tensors = {name: each for name, each in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = load_base(BaseConfig(model=str(folder), device="cpu"), "classification", ("a", "b"))
    assert base.fresh == ("bert.pooler.dense", "classifier")


def test_a_base_says_what_its_own_head_is_for(tmp_path: Path) -> None:
    plain = BaseConfig(model=str(save_task_base(tmp_path / "plain", "bert")))
    assert own_classes(plain) is None and own_task(plain) == "causal"
    assert own_task(BaseConfig(model=str(save_task_base(tmp_path / "t5", "t5")))) == "seq2seq"
    for task, classes in (("classification", ("no", "yes")), ("regression", ())):
        base = load_base(plain, task, classes)
        base.model.save_pretrained(tmp_path / task)
        base.tokenizer.save_pretrained(tmp_path / task)
        config = BaseConfig(model=str(tmp_path / task))
        assert own_task(config) == task and load_base(config, task, classes).fresh == ()
    assert own_classes(BaseConfig(model=str(tmp_path / "classification"))) == ("no", "yes")


def test_positions_that_no_token_gets_are_no_room(tmp_path: Path) -> None:
    base = load_base(BaseConfig(model=str(save_task_base(tmp_path / "base", "roberta"))), "classification", ("a", "b"))
    room = context_length(base.model)
    assert room == 128 - 2  # RoBERTa's first token stands behind the padding's position, 1
    base.model(input_ids=torch.full((1, room), 9))
    with pytest.raises((IndexError, RuntimeError)):
        base.model(input_ids=torch.full((1, room + 1), 9))


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert"])
def test_a_merged_classifier_is_a_plain_model_with_its_head_and_its_names(tmp_path: Path, family: str) -> None:
    config = BaseConfig(model=str(save_task_base(tmp_path / "base", family)), device="cpu")
    base = load_base(config, "classification", ("no", "yes"))
    graft.attach(base.model, {"a": with_head(base.model, graft.LoRA(rank=4, sites="linear"), base.fresh)})
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in graft.parameters(base.model, "a"):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.arange(5, 14)[None]
    with torch.no_grad(), graft.use(base.model, "a"):
        wanted = base.model(input_ids=ids).logits
    labelling = Labelling("classification", ("0", "1"), ("no", "yes"))
    report = write_merged(base, "a", [ids[0].tolist()], tmp_path / "merged", labelling.save)
    assert report.max_difference < 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert AutoConfig.from_pretrained(tmp_path / "merged").id2label == {0: "no", 1: "yes"}
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-4)
    (candidate,) = load_candidates(None, BaseConfig(model=str(tmp_path / "merged"), device="cpu")).candidates
    assert candidate.name == "base" and candidate.template.labelling == labelling  # type: ignore[attr-defined]


def test_a_merged_encoder_decoder_answers_alike(tmp_path: Path) -> None:
    config = BaseConfig(model=str(save_task_base(tmp_path / "base", "t5")), device="cpu")
    base = load_base(config, "seq2seq")
    graft.attach(base.model, {"a": graft.LoRA(rank=4, sites="linear")})
    with torch.no_grad():
        for _, parameter in graft.parameters(base.model, "a"):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    report = write_merged(base, "a", [[5, 6, 7, 1]], tmp_path / "merged")
    assert report.max_difference < 1e-3 and report.tokens == 4
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == [
        "T5ForConditionalGeneration"
    ]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "</s>"


def _with_own_head(folder: Path, family: str, classes: tuple[str, ...]) -> BaseConfig:
    """A base on disk that brings a head for these classes."""
    plain = load_base(
        BaseConfig(model=str(save_task_base(folder / "plain", family)), device="cpu"), "classification", classes
    )
    draw_head(plain.model, plain.fresh, seed=5)
    plain.model.save_pretrained(folder / "own")
    plain.tokenizer.save_pretrained(folder / "own")
    return BaseConfig(model=str(folder / "own"), device="cpu")


@pytest.mark.parametrize("family", FRESH)
def test_a_head_that_the_base_brings_is_drawn_anew_where_that_is_wanted(tmp_path: Path, family: str) -> None:
    config = _with_own_head(tmp_path, family, ("no", "yes"))
    wanted = config.model_copy(update={"head": "fresh"})
    assert own_classes(config) == ("no", "yes") and own_classes(wanted) is None
    kept, drawn = (load_base(each, "classification", ("no", "yes")) for each in (config, wanted))
    assert kept.fresh == () and set(drawn.fresh) == set(FRESH[family])
    for name, tensor in kept.model.state_dict().items():
        layer, _, end = name.rpartition(".")
        assert torch.equal(tensor, drawn.model.state_dict()[name]) == (layer not in drawn.fresh or end == "bias"), name


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_fresh_head_may_have_another_number_of_classes(tmp_path: Path, family: str) -> None:
    config = _with_own_head(tmp_path, family, ("no", "yes"))
    with pytest.raises(
        GraftError,
        match=r"has a head for 2 labels \(no, yes\), but the data have 3: base.head: fresh draws a new one",
    ):
        load_base(config, "classification", ("a", "b", "c"))
    base = load_base(config.model_copy(update={"head": "fresh"}), "classification", ("a", "b", "c"))
    assert set(base.fresh) == set(FRESH[family]) and base.model.num_labels == 3
    kept = AutoModelForSequenceClassification.from_pretrained(config.model).state_dict()
    for name, tensor in base.model.state_dict().items():
        if not name.startswith(base.fresh):
            assert torch.equal(tensor, kept[name]), name
    values = load_base(config.model_copy(update={"head": "fresh"}), "regression")
    assert values.model.num_labels == 1 and set(values.fresh) == set(FRESH[family])


def test_a_fresh_head_is_for_tasks_that_have_one(tmp_path: Path) -> None:
    config = BaseConfig(model=str(save_task_base(tmp_path / "base", "llama")), device="cpu", head="fresh")
    with pytest.raises(
        GraftError, match=r"base.head: fresh is for data.task classification and regression; this run has causal"
    ):
        load_base(config)
