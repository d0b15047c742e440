"""Objectives over pairs of answers: loss and gradient against TRL's own trainers and against the papers' formulas written out.

TRL's trainers are made without their constructors and given the tokens: DPO and IPO by `DPOTrainer`, CPO, SimPO and ORPO by the trainers of
`trl.experimental`. TRL's ORPO also learns the prompt, so it is compared where the prompt is one token, which nothing predicts; it rounds
log-probabilities to float32. Its DPO knows no label smoothing: that, and everything else once more, is compared with the formulas.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import graft
from graft.data.datasets import TokenDataset
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import set_training
from graft.training.objectives import objective_of
from graft.training.updates.gradients import Gradients
from tests.training.conftest import attach, batcher, data, exact_norm, job_on, pairs, tiny

CASES: dict[str, Any] = {
    "dpo": {"kind": "dpo", "beta": 0.3},
    "dpo-smoothed": {"kind": "dpo", "beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"kind": "ipo", "beta": 0.2},
    "cpo": {"kind": "cpo"},
    "cpo-smoothed": {"kind": "cpo", "label_smoothing": 0.1, "nll": 0.3},
    "cpo-hinge": {"kind": "cpo", "beta": 0.5, "loss": "hinge"},
    "simpo": {"kind": "simpo", "beta": 2.0, "gamma": 0.7},
    "simpo-smoothed": {"kind": "simpo", "label_smoothing": 0.1},
    "orpo": {"kind": "orpo", "beta": 0.4},
}
IN_TRL = [name for name in CASES if name != "dpo-smoothed"]


@pytest.fixture(autouse=True)
def _norms_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)


def step_of(
    model: Any, rows: TokenDataset, objective: Any, layout: Any = "flat", budget: int = 4096, **config: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What a step over all pairs gives: scores, and gradients by name."""
    job = job_on(model, "a", rows, objective=objective, batch_size=len(rows), clip=None, **config)
    forward = Forward(model)
    decide(forward, [job], "auto", batcher())
    set_training(model, ["a"])
    with laid_out(model, layout):
        scores = Gradients().prepare(forward, [job], batcher(layout, budget))["a"].scores
    return scores, {
        name: parameter.grad.clone() for name, parameter in job.params.items() if parameter.grad is not None
    }


def sides(rows: TokenDataset) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, attention mask and labels of all chosen sequences, then all rejected ones; padded on the right."""
    examples = [each.sequences[side] for side in (0, 1) for each in rows]
    longest = max(len(each.input_ids) for each in examples)
    ids, mask, labels = (torch.full((len(examples), longest), fill) for fill in (0, 0, -100))
    for row, each in enumerate(examples):
        length = len(each.input_ids)
        ids[row, :length], mask[row, :length] = torch.as_tensor(each.input_ids).long(), 1
        labels[row, :length] = torch.where(torch.as_tensor(each.supervised), ids[row, :length], -100)
    return ids, mask, labels


def token_logps(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels by the model's own logits, 0 where there is none. [R, L - 1]"""
    logps = torch.log_softmax(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], -1)
    wanted = labels[:, 1:]
    return logps.gather(2, wanted.clamp(min=0)[..., None])[..., 0] * (wanted != -100)


class Scored:
    """A model as TRL's DPO trainer calls it: per-token log-probabilities in place of logits."""

    def __init__(self, model: Any, adapter: str | None) -> None:
        self.model, self.adapter, self.training = model, adapter, True

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> Any:
        with graft.use(self.model, self.adapter):
            logps = token_logps(self.model, input_ids, attention_mask, labels)
        nothing = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


ALONE = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value,
    unwrap_model=lambda model: model,
)  # fmt: skip


def trl_dpo(model: Any, rows: TokenDataset, config: dict[str, Any]) -> Tensor:
    from trl import DPOTrainer

    trainer = object.__new__(DPOTrainer)
    kind = {"dpo": "sigmoid", "ipo": "ipo"}[config["kind"]]
    vars(trainer).update(
        accelerator=ALONE, model=Scored(model, "a"), ref_model=Scored(model, None),
        beta=config["beta"], loss_types=[kind], loss_weights=[1.0],
        label_smoothing=0.0,
        f_divergence_type="reverse_kl", ld_alpha=None, precompute_ref_logps=False, use_weighting=False,
        aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1,
        _metrics={"train": defaultdict(list)}, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    ids, mask, labels = sides(rows)
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != -100).long()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.dpo_trainer.is_peft_model", lambda _: False)
        patch.setattr("trl.trainer.dpo_trainer.disable_gradient_checkpointing", lambda *_: nullcontext())
        return trainer._compute_loss(Scored(model, "a"), inputs, False)


def trl_batch(rows: TokenDataset) -> dict[str, Tensor]:
    """The batch of TRL's CPO and ORPO trainers."""
    batch: dict[str, Tensor] = {}
    for side, parts in zip(
        ("chosen", "rejected"), zip(*(part.chunk(2) for part in sides(rows)), strict=True), strict=True
    ):
        for name, part in zip(("input_ids", "attention_mask", "labels"), parts, strict=True):
            batch[f"{side}_{name}"] = part
    return batch


def trl_others(model: Any, rows: TokenDataset, config: dict[str, Any]) -> Tensor:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    trainer = object.__new__(ORPOTrainer if config["kind"] == "orpo" else CPOTrainer)
    vars(trainer).update(
        accelerator=ALONE, is_encoder_decoder=False, pad_token_id=0, padding_value=0, aux_loss_enabled=False, alpha=0.0,
        beta=config.get("beta", 0.1), label_smoothing=config.get("label_smoothing", 0.0),
        loss_type="simpo" if config["kind"] == "simpo" else config.get("loss", "sigmoid"),
        simpo_gamma=config.get("gamma", 0.5), cpo_alpha=0.0 if config["kind"] == "simpo" else config.get("nll", 1.0),
    )  # fmt: skip
    with graft.use(model, "a"):
        return trainer.get_batch_loss_metrics(model, trl_batch(rows))[0]


def written_out(model: Any, rows: TokenDataset, config: dict[str, Any]) -> Tensor:
    """The papers' formulas on summed log-probabilities of the model's own logits."""
    ids, mask, labels = sides(rows)
    with graft.use(model, "a"):
        own = token_logps(model, ids, mask, labels)
    with graft.use(model, None), torch.no_grad():
        base = token_logps(model, ids, mask, labels)
    counts = (labels[:, 1:] != -100).sum(1)
    chosen, rejected = own.sum(1).chunk(2)
    chosen_base, rejected_base = base.sum(1).chunk(2)
    few, many = counts.chunk(2)
    kind, beta, wrong = config["kind"], config.get("beta", 0.1), config.get("label_smoothing", 0.0)
    nll = -chosen.sum() / few.sum()

    def cross_entropy(margin: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(margin, torch.full_like(margin, 1 - wrong))

    if kind == "dpo":
        return cross_entropy(beta * (chosen - rejected - chosen_base + rejected_base))
    if kind == "ipo":
        return (((chosen - chosen_base) / few - (rejected - rejected_base) / many - 0.5 / beta) ** 2).mean()
    if kind == "cpo":
        hinge = torch.clamp(1 - beta * (chosen - rejected), min=0).mean()
        return (hinge if config.get("loss") == "hinge" else cross_entropy(beta * (chosen - rejected))) + config.get(
            "nll", 1.0
        ) * nll
    if kind == "simpo":
        return cross_entropy(beta * (chosen / few - rejected / many) - config.get("gamma", 0.5))
    odds = [torch.exp(mean) / (1 - torch.exp(mean)) for mean in (chosen / few, rejected / many)]
    return nll - beta * F.logsigmoid(torch.log(odds[0] / odds[1])).mean()


def compare(given: Any, wanted: Tensor, model: Any, tolerance: float) -> None:
    """Loss to a tolerance, and the gradient of every parameter to ten times that as a share of the largest entry."""
    scores, gradients = given
    names = list(gradients)
    params = dict(graft.parameters(model, "a"))
    theirs = torch.autograd.grad(wanted, [params[name] for name in names])
    assert scores["loss"] == pytest.approx(float(wanted.detach()), rel=tolerance)
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    assert largest > 1e-6
    for name, gradient in zip(names, theirs, strict=True):
        assert float((gradients[name] - gradient).abs().max()) <= 10 * tolerance * largest, name


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_formula_of_the_paper(case: str, layout: str) -> None:
    model, rows = attach(tiny(dtype=torch.float64)), pairs(7)
    compare(step_of(model, rows, CASES[case], layout), written_out(model, rows, CASES[case]), model, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", IN_TRL)
def test_loss_and_gradient_equal_those_of_trl(case: str, dtype: torch.dtype) -> None:
    pytest.importorskip("trl")
    model, config = attach(tiny(dtype=dtype)), CASES[case]
    rows = pairs(7, prompt=1 if config["kind"] == "orpo" else 0)
    theirs = trl_dpo if config["kind"] in ("dpo", "ipo") else trl_others
    exact = dtype == torch.float64 and config["kind"] != "orpo"
    compare(step_of(model, rows, config), theirs(model, rows, config), model, 1e-10 if exact else 1e-6)


def test_the_defaults_are_those_of_trl() -> None:
    trl = pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    def default(config: type, name: str) -> Any:
        return config.__dataclass_fields__[name].default

    made = {kind: objective_of(job_config(kind)).config for kind in ("dpo", "ipo", "cpo", "orpo", "simpo")}
    assert made["dpo"].beta == made["ipo"].beta == default(trl.DPOConfig, "beta")
    assert made["cpo"].beta == made["simpo"].beta == default(CPOConfig, "beta")
    assert (made["cpo"].loss, made["cpo"].nll) == (default(CPOConfig, "loss_type"), default(CPOConfig, "cpo_alpha"))
    assert made["simpo"].gamma == default(CPOConfig, "simpo_gamma")
    assert made["orpo"].beta == default(ORPOConfig, "beta")


def job_config(objective: Any) -> Any:
    from graft.config import TrainConfig

    return TrainConfig(objective=objective).objective


@pytest.mark.parametrize("case", CASES)
def test_however_a_step_is_cut_it_is_the_same_step(case: str) -> None:
    """With dropout; a pair and its reference never part, in either layout."""
    found = []
    for layout, budget in (("flat", 4096), ("flat", 60), ("flat", 1), ("padded", 4096), ("padded", 90), ("padded", 1)):
        model = attach(
            tiny(dtype=torch.float64), adapter={"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.3}
        )
        found.append(step_of(model, pairs(6), CASES[case], layout, budget))
    (scores, gradients), *others = found
    for other, theirs in others:
        assert other == pytest.approx(scores, rel=1e-9, abs=1e-12)
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert float((theirs[name] - gradient).abs().max()) <= 1e-10 * largest


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_a_micro_batch_holds_whole_pairs_with_their_reference_within_the_budget(layout: Any) -> None:
    model = attach(tiny())
    for objective, parts in (("dpo", 4), ("simpo", 2)):
        rows = job_on(model, train=pairs(12), objective=objective, batch_size=12).rows()
        assert len(rows) == 12 * parts
        for micro in batcher(layout, 100).cut(rows):
            lengths = [len(row.example) for row in micro]
            size = sum(lengths) if layout == "flat" else len(lengths) * max(lengths)
            assert size <= 100 or len(micro) == parts
            assert sorted(row.position for row in micro) == sorted([*{row.position for row in micro}] * parts)
            who = [row.adapter for row in micro]
            assert who == sorted(who, key=lambda name: name is None)


def test_the_sides_of_a_pair_have_dropout_of_their_own() -> None:
    rows = job_on(attach(tiny()), train=pairs(4), objective="simpo", batch_size=4).rows()
    assert len({row.seed for row in rows}) == 8
    plain = job_on(attach(tiny()), train=data(4), batch_size=4).rows()
    assert [row.seed for row in plain] == [row.seed for row in rows if row.part == 0]


def test_a_fresh_adapter_is_its_reference() -> None:
    model = tiny(dtype=torch.float64)
    graft.attach(model, {"a": {"kind": "lora", "rank": 4, "sites": "linear"}})
    scores, _ = step_of(model, pairs(5), "dpo")
    assert scores["loss"] == pytest.approx(np.log(2), rel=1e-12)
    assert scores["margin"] == scores["rewards_chosen"] == scores["accuracy"] == 0.0
