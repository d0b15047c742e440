"""KTO: loss and gradient against TRL's trainer and against the paper's formula, however a step is cut, and from a file to a run."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import graft
from graft.attaching.active import set_trainable
from graft.config.data import DataConfig
from graft.data.datasets import TokenDataset
from graft.data.inspect import coloured
from graft.data.marked import with_mismatched
from graft.data.preparing import prepare
from graft.data.samples import Example
from graft.errors import GraftError
from graft.training.forward.causal import Forward
from graft.training.forward.modes import set_training
from tests.small import small_tokenizer
from tests.training.conftest import VOCABULARY, attach, data, exact_norm, job_on, pairs, take_step, tiny
from tests.training.test_objectives import ALONE, Scored, compare, sides, step_of, token_logps

CASES: dict[str, Any] = {
    "plain": {"kind": "kto"},
    "beta": {"kind": "kto", "beta": 0.7},
    "weights": {"kind": "kto", "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.4},
}


@pytest.fixture(autouse=True)
def _norms_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)


def marked(count: int, seed: int = 0, good: float = 0.5) -> TokenDataset:
    random, made = np.random.default_rng(seed), []
    for row in range(count):
        asked, answer = (random.integers(3, VOCABULARY, int(random.integers(1, 7))) for _ in range(2))
        ids = np.concatenate([asked, answer]).astype(np.int32)
        example = Example(ids, np.arange(len(ids)) >= len(asked), "marked.jsonl", row + 1)
        made.append(replace(example, desirable=bool(random.random() < good)))
    return TokenDataset.of(with_mismatched(made, 64))


def by_trl(model: Any, rows: TokenDataset, config: dict[str, Any]) -> Tensor:
    from trl import KTOTrainer

    trainer = object.__new__(KTOTrainer)
    vars(trainer).update(
        accelerator=ALONE, model=Scored(model, "a"), ref_model=Scored(model, None), beta=config.get("beta", 0.1),
        desirable_weight=config.get("desirable_weight", 1.0), undesirable_weight=config.get("undesirable_weight", 1.0),
        loss_type="kto", calculate_KL=True, precompute_ref_logps=False, aux_loss_enabled=False, _total_train_tokens=0,
        _tp_size=1, _metrics={"train": defaultdict(list)}, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    inputs: dict[str, Any] = {"label": torch.tensor([bool(row.desirable) for row in rows])}
    for prefix, part in zip(("", "KL_"), zip(*(each.chunk(2) for each in sides(rows)), strict=True), strict=True):
        ids, mask, labels = part
        inputs |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
        inputs[f"{prefix}completion_mask"] = (labels != -100).long()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.kto_trainer.is_peft_model", lambda _: False)
        patch.setattr("trl.trainer.kto_trainer.disable_gradient_checkpointing", lambda *_: nullcontext())
        return trainer._compute_loss(Scored(model, "a"), inputs, False)


def written_out(model: Any, rows: TokenDataset, config: dict[str, Any]) -> Tensor:
    """Equations 7 and 8 of the paper on summed log-probabilities of the model's own logits."""
    ids, mask, labels = sides(rows)
    with graft.use(model, "a"):
        own = token_logps(model, ids, mask, labels).sum(1)
    with graft.use(model, None), torch.no_grad():
        base = token_logps(model, ids, mask, labels).sum(1)
    gains, mismatched = (own - base).chunk(2)
    beta, distance = config.get("beta", 0.1), max(0.0, float(mismatched.mean()))
    total: Any = 0.0
    for gain, row in zip(gains, rows, strict=True):
        weight = config.get("desirable_weight" if row.desirable else "undesirable_weight", 1.0)
        value = torch.sigmoid(beta * ((gain - distance) if row.desirable else (distance - gain)))
        total = total + weight * (1 - value)
    return total / len(rows)


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("good", [0.0, 0.5, 1.0])
def test_loss_and_gradient_equal_the_formula_of_the_paper(case: str, layout: str, good: float) -> None:
    model, rows = attach(tiny(dtype=torch.float64)), marked(7, seed=3, good=good)
    compare(step_of(model, rows, CASES[case], layout), written_out(model, rows, CASES[case]), model, 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_trl(case: str) -> None:
    pytest.importorskip("trl")
    for seed in range(4):
        model, rows = attach(tiny(dtype=torch.float64)), marked(7, seed=seed)
        given = step_of(model, rows, CASES[case])
        compare(given, by_trl(model, rows, CASES[case]), model, 1e-6)
    assert any(step_of(attach(tiny()), marked(7, seed=seed), "kto")[0]["kl"] > 0 for seed in range(4))


def test_however_a_step_is_cut_and_in_any_company_it_is_the_same_step() -> None:
    adapter, found = {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.3}, []
    for layout, budget in (("flat", 4096), ("flat", 60), ("flat", 1), ("padded", 4096), ("padded", 40)):
        model = attach(tiny(dtype=torch.float64), adapter=adapter)
        found.append(step_of(model, marked(6), CASES["weights"], layout, budget))
    (scores, gradients), *others = found
    for other, theirs in others:
        assert other == pytest.approx(scores, rel=1e-9, abs=1e-12)
        for name, gradient in gradients.items():
            assert float((theirs[name] - gradient).abs().max()) <= 1e-10 * float(gradient.abs().max() + 1e-12)

    model = attach(attach(tiny(dtype=torch.float64), adapter=adapter), "b")
    attach(model, "c", {"kind": "series", "bottleneck": 4})
    jobs = [
        job_on(model, "a", marked(6), objective=CASES["weights"], batch_size=6, clip=None),
        job_on(model, "b", pairs(6), objective="dpo", batch_size=6),
        job_on(model, "c", data(6), batch_size=6),
    ]
    set_trainable(model, ["a", "b", "c"])
    set_training(model, ["a", "b", "c"])
    together = take_step(Forward(model), jobs, "padded", 100)
    assert together["a"].loss == pytest.approx(scores["loss"], rel=1e-9)
    assert together["a"].scores["kl"] == pytest.approx(scores["kl"], rel=1e-9, abs=1e-12)


def test_good_answers_become_likelier_and_bad_ones_less() -> None:
    model = attach(tiny(), adapter={"kind": "lora", "rank": 8, "sites": "linear"})
    job = job_on(model, "a", marked(16), objective={"kind": "kto", "beta": 0.5}, batch_size=16, steps=20)
    outcomes = [take_step(Forward(model), [job])["a"] for _ in range(20)]
    assert outcomes[-1].loss < outcomes[0].loss - 0.1
    assert outcomes[-1].scores["rewards_chosen"] > 0 > outcomes[-1].scores["rewards_rejected"]
    assert outcomes[-1].scores["accuracy"] > 0.9


def test_the_data_and_the_objective_must_fit() -> None:
    with pytest.raises(GraftError, match="kto takes prompt, completion and label"):
        job_on(attach(tiny()), "a", pairs(4), objective="kto")
    with pytest.raises(GraftError, match="answers that are marked by a label"):
        job_on(attach(tiny()), "a", marked(4), objective="dpo")
    with pytest.raises(GraftError, match="two or more samples"):
        marked(1)


def test_rows_with_a_label_become_marked_answers(tmp_path: Any) -> None:
    tokenizer = small_tokenizer()
    rows = [
        {"prompt": "hi", "completion": "good", "label": True},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bad"}], "label": 0},
    ]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    sources = [str(tmp_path / f"{number}.jsonl") for number in (0, 1)]
    config = DataConfig(train=sources, task="preference", template="plain", cache=False)
    done = prepare(config, tokenizer)
    assert [example.desirable for example in done.train] == [True, True, False, False]
    assert done.report.marked == (2, 2) and done.report.train.samples == 4
    assert "2 answers are marked good and 2 bad." in done.report.notes
    assert "bad: " in coloured(done.train[2], tokenizer).plain
    first = done.train[0]
    assert first.rejected is not None and first.num_targets == int(first.supervised.sum())
    again = prepare(config.model_copy(update={"cache": True}), tokenizer, tmp_path / "cache")
    cached = prepare(config.model_copy(update={"cache": True}), tokenizer, tmp_path / "cache")
    assert cached.cached and cached.train.digest == again.train.digest == done.train.digest
    assert cached.report == again.report
    (tmp_path / "2.csv").write_text("prompt,completion,label\na,b,maybe\n")
    with pytest.raises(GraftError, match="row 1, field 'label': must be true for a good answer"):
        prepare(config.model_copy(update={"train": str(tmp_path / "2.csv")}), tokenizer)


def test_mismatched_sequences_join_a_prompt_with_the_answer_of_another() -> None:
    rows = list(marked(9, seed=5))
    for example in rows:
        start = int(np.argmax(example.supervised))
        second = example.rejected
        assert second is not None and second.input_ids[:start].tolist() == example.input_ids[:start].tolist()
        assert not second.supervised[:start].any() and second.supervised[start:].all()
        ends = [other.input_ids[int(np.argmax(other.supervised)) :].tolist() for other in rows]
        assert any(end[: len(second.input_ids) - start] == second.input_ids[start:].tolist() for end in ends)


@pytest.mark.parametrize("longest", [8, 10, 64])
def test_mismatched_sequences_are_those_of_trl(longest: int) -> None:
    """The prompts differ, so the sample before, of which the last one comes before the first, is the partner in both."""
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    random, made = np.random.default_rng(3), []
    for row in range(9):
        asked = np.array([row + 3, *random.integers(3, VOCABULARY, int(random.integers(0, 4)))])
        answer = random.integers(3, VOCABULARY, int(random.integers(1, 5)))
        ids = np.concatenate([asked, answer]).astype(np.int32)
        made.append(Example(ids, np.arange(len(ids)) >= len(asked), "marked.jsonl", row + 1, desirable=True))
    starts = [int(np.argmax(example.supervised)) for example in made]
    ids = [example.input_ids.tolist() for example in made]
    given = [
        {
            "prompt_ids": own[:start],
            "completion_ids": own[start:],
            "KL_completion_ids": ids[at - 1][starts[at - 1] :],
            "label": True,
        }
        for at, (own, start) in enumerate(zip(ids, starts, strict=True))
    ]
    wanted = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=longest)(given)
    for at, example in enumerate(with_mismatched(made, longest)):
        second, real = example.rejected, wanted["KL_attention_mask"][at].bool()
        assert second is not None
        assert second.input_ids.tolist() == wanted["KL_input_ids"][at][real].tolist()
        assert second.supervised.tolist() == wanted["KL_completion_mask"][at][real].bool().tolist()
