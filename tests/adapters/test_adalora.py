"""AdaLoRA: PEFT's numbers, PEFT's choice of ranks step by step, the budget reached in the engine, a resume bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graft
from graft.adapters.kinds.adalora import AdaLoRAAdapter, Allocator
from graft.attaching.parameters import adapter_modules, modules_of
from graft.attaching.saving import training_state
from graft.injection.state import state_of
from graft.runs.folder import RunFolder
from tests.adapters.references import Case, Twins
from tests.contract.table import attached, base, ids, logits, loss, randomise, rows
from tests.training.conftest import PowerCut, attach, breaks_at, data, engine_for, job_on, losses, tiny

ADALORA = {"P": "lora_B.default", "E": "lora_E.default", "Q": "lora_A.default"}
SITES = "attn.q attn.v mlp.down"
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
STEPS = 14


def sites_of(model: nn.Module) -> dict[str, AdaLoRAAdapter]:
    found = dict(modules_of(model, state_of(model), "a"))
    return {path: module for path, module in found.items() if isinstance(module, AdaLoRAAdapter)}


def allocator_of(model: nn.Module) -> Allocator:
    (found,) = (module for module in adapter_modules(model, "a") if isinstance(module, Allocator))
    return found


@pytest.mark.parametrize(("dropout", "training"), [(0.0, False), (0.4, True)])
def test_outputs_and_gradients_equal_peft(dropout: float, training: bool) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.AdaLoraConfig(init_r=4, lora_alpha=6, lora_dropout=dropout, total_step=STEPS, **TARGETS)
    Twins(
        "llama", graft.AdaLoRA(init_rank=4, target_rank=2, alpha=6, dropout=dropout, sites=SITES), theirs, ADALORA
    ).assert_same(training)


@pytest.mark.parametrize("interval", [1, 2])
def test_losses_and_ranks_follow_peft_step_by_step(interval: int) -> None:
    """Two runs of their own, from the same start: loss with its penalty, importance, budget, choice and the final masks."""
    peft = pytest.importorskip("peft")
    ours = graft.AdaLoRA(init_rank=5, target_rank=2, alpha=6, warmup=2, final=3, interval=interval, sites=SITES)
    theirs = {
        "init_r": 5,
        "target_r": 2,
        "lora_alpha": 6,
        "tinit": 2,
        "tfinal": 3,
        "deltaT": interval,
        "total_step": STEPS,
    }
    twins = Twins("llama", ours, peft.AdaLoraConfig(task_type="CAUSAL_LM", **theirs, **TARGETS), ADALORA, scale=0.1)
    optimizers = [torch.optim.SGD([pair[side] for pair in twins.pairs.values()], lr=0.3) for side in (0, 1)]
    budgets = []
    for step in range(1, STEPS + 1):
        inputs = ids(4, 8, seed=step)
        allocator = allocator_of(twins.model)
        penalty = allocator.penalty()
        assert penalty is not None
        values = [loss(twins.model, inputs) + penalty, twins.reference(input_ids=inputs, labels=inputs).loss]
        torch.testing.assert_close(values[0], values[1], atol=5e-5, rtol=0)
        for value, optimizer in zip(values, optimizers, strict=True):
            value.backward()
            optimizer.step()
        allocator.after_step(step, STEPS)
        twins.reference.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for key, (mine, other) in twins.pairs.items():
            if key.endswith(".E"):
                assert torch.equal(mine != 0, other.view(-1) != 0), (step, key)
            torch.testing.assert_close(mine, other.view_as(mine), atol=1e-4, rtol=0)
        budgets.append(sum(int((mine != 0).sum()) for key, (mine, _) in twins.pairs.items() if key.endswith(".E")))
    pattern = twins.reference.peft_config["default"].rank_pattern
    for path, site in sites_of(twins.model).items():
        (theirs_kept,) = (kept for key, kept in pattern.items() if f"{path.removesuffix('.linear')}.lora_E" in key)
        assert site.kept.tolist() == theirs_kept
    assert budgets[0] == budgets[1] == 30 and budgets[-1] == budgets[-4] == 12 and len(set(budgets)) > 3


def test_the_budget_is_the_cubic_between_warm_up_and_the_last_choice() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.AdaLoRA(init_rank=6, target_rank=2, warmup=0.1, final=0.2, sites="attn.q")})
    allocator = allocator_of(model)
    assert allocator.schedule(100) == (10, 80)
    assert [allocator.budget(step, 100) for step in (1, 10, 45, 80, 100)] == [
        12,
        12,
        5,
        4,
        4,
    ]  # 4 + 8 / 2^3 at half way


def test_a_penalty_of_orthogonal_factors_is_zero_and_of_others_that_of_the_paper() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.AdaLoRA(init_rank=2, target_rank=1, orthogonality=0.25, sites="attn.q@0")})
    (site,), allocator = sites_of(model).values(), allocator_of(model)
    with torch.no_grad():
        site.P.copy_(torch.eye(32, 2))
        site.Q.copy_(torch.eye(2, 32))
    first = allocator.penalty()
    assert first is not None and first.item() == 0.0
    with torch.no_grad():
        site.P.mul_(2)  # P^T P - 1 = 3 * 1 of norm 3 sqrt(2); Q's is zero; their mean, times a quarter
    second = allocator.penalty()
    assert second is not None and second.item() == pytest.approx(0.25 * 3 * 2**0.5 / 2)
    graft.detach(model)
    graft.attach(model, {"a": graft.AdaLoRA(orthogonality=0.0, sites="attn.q@0")})
    assert allocator_of(model).penalty() is None


def test_a_run_too_short_for_its_schedule_and_a_budget_that_grows_are_errors() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.AdaLoRA(warmup=5, final=5)})
    with pytest.raises(graft.GraftError, match="no steps left to move ranks in a run of 10"):
        allocator_of(model).after_step(1, 10)
    with pytest.raises(graft.GraftError, match="target_rank 8 is more than init_rank 4"):
        graft.attach(model, {"b": {"kind": "adalora", "init_rank": 4}})


ADAPTER = {"kind": "adalora", "init_rank": 4, "target_rank": 2, "warmup": 2, "final": 4, "dropout": 0.2, "sites": SITES}


def world(path: Path, **settings: Any) -> Any:
    model = attach(tiny(), adapter=ADAPTER)
    return engine_for([job_on(model, steps=12, train=data(24))], model, path, save_every=4, **settings)


def test_the_engine_reaches_the_budget_with_unequal_ranks_and_publishes_the_kept_ones(tmp_path: Path) -> None:
    engine = world(tmp_path / "run")
    assert engine.run() == "finished"
    sites = sites_of(engine.model)
    ranks = [int(site.kept.sum()) for site in sites.values()]
    assert sum(ranks) == 2 * len(sites) and len(set(ranks)) > 1
    assert all(torch.equal(site.E != 0, site.kept) for site in sites.values())
    folder = graft.save(engine.model, "a", tmp_path / "saved")
    names = {name.rsplit(".", 1)[1] for name in load_file(folder / "adapter_model.safetensors")}
    assert names == {"P", "E", "Q", "kept"}
    assert json.loads((folder / "adapter_config.json").read_text())["adapter"]["target_rank"] is None
    loaded = graft.load(tiny(), folder)
    inputs = torch.arange(3, 13)[None]
    assert torch.equal(logits(loaded, inputs), logits(engine.model.eval(), inputs))
    assert [int(site.kept.sum()) for site in sites_of(loaded).values()] == ranks


def test_a_loop_of_ones_own_reaches_the_budget_too() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.AdaLoRA(init_rank=4, target_rank=2, sites=SITES), "b": graft.LoRA(rank=2)})
    optimizer = torch.optim.AdamW(graft.parameter_groups(model, "a", lr=1e-2))
    for step in range(1, 11):
        penalty = graft.penalty(model, "a")
        assert penalty is not None and graft.penalty(model, "b") is None
        (loss(model, ids(4, 8, seed=step)) + penalty).backward()
        optimizer.step()
        graft.after_step(model, "a", step, 10)
        optimizer.zero_grad()
    ranks = [int(site.kept.sum()) for site in sites_of(model).values()]
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1


def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = world(tmp_path / "whole")
    whole.run()
    for cut, saved in ((6, 4), (9, 8)):  # while ranks are being given, and after
        path = tmp_path / f"cut{cut}"
        parted = world(path)
        parted.jobs[0].rows = breaks_at(parted.jobs[0], cut)
        with pytest.raises(PowerCut):
            parted.run()
        again = world(path)
        RunFolder(path).metrics.keep(lambda line, saved=saved: line["step"] <= saved)
        assert again.run(checkpoint=saved) == "finished"
        assert losses(path) == losses(tmp_path / "whole")
        ours, theirs = (training_state(engine.model, "a") for engine in (whole, again))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()) and len(ours) == len(theirs)


def test_a_published_adapter_that_trains_on_leaves_dropped_ranks_alone() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.AdaLoRA(init_rank=4, target_rank=None, sites="attn.q")})
    randomise(model, "a")
    with torch.no_grad():
        for site in sites_of(model).values():
            site.kept[1] = False
    expected = logits(model, ids())
    loss(model, ids()).backward()
    for site in sites_of(model).values():
        assert site.E.grad is not None and site.E.grad[1] == 0 and site.E.grad[0] != 0
        with torch.no_grad():
            site.E[1] = 7.0
    assert torch.equal(logits(model, ids()), expected)


@rows("llama-adalora")
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_model_gives_ranks_to_its_own_sites(row: Any, twin: Any) -> None:
    model = attached(row)
    other = twin(model)
    assert torch.equal(logits(other, ids()), logits(model, ids()))
    assert {id(site) for site in allocator_of(other).adapters} == {id(site) for site in sites_of(other).values()}


def test_the_file_that_peft_wrote_computes_the_same(shared: Path) -> None:
    """PEFT cuts the tensors to the kept ranks; here they return to their places among `init_r`, the others' E being zero."""
    oracle = Case(shared, "peft/llama-adalora")
    config = oracle.config
    ours = graft.AdaLoRA(init_rank=config["init_r"], target_rank=None, alpha=config["lora_alpha"], sites=SITES)
    graft.attach(oracle.model, {"a": ours})
    with torch.no_grad():
        for path, site in sites_of(oracle.model).items():
            module = path.removesuffix(".linear")
            kept = torch.tensor(config["rank_pattern"][f"{module}.lora_E"])
            site.kept.copy_(kept)
            site.P[:, kept] = oracle.tensors[f"{module}.lora_B"]
            site.E[kept] = oracle.tensors[f"{module}.lora_E"].view(-1)
            site.Q[kept] = oracle.tensors[f"{module}.lora_A"]
    oracle.assert_matches()


def _driven(model: Any, folder: Path, **changes: Any) -> Any:
    """transformers' Trainer over a grafted model, with plain SGD and two micro-batches to a step."""
    from transformers import Trainer, TrainingArguments

    from tests.callers.tiny import rows as samples

    settings = {"output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8,
                "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "learning_rate": 0.3,
                "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.5, "save_strategy": "no", "seed": 0}  # fmt: skip
    callbacks = changes.pop("callbacks", [graft.callback()])
    args = TrainingArguments(**(settings | changes))
    return Trainer(model=model, args=args, train_dataset=samples(), callbacks=callbacks)  # pyright: ignore[reportArgumentType]


def _to_drive() -> Any:
    from tests.callers.tiny import tiny_llama

    torch.manual_seed(3)
    spec = graft.AdaLoRA(init_rank=4, target_rank=2, warmup=1, final=2, sites="attn.q attn.v")
    return graft.attach(tiny_llama(), {"a": spec})


def test_under_trainer_a_callback_does_what_a_loop_of_ones_own_does(tmp_path: Path) -> None:
    """The same batches, penalty and clipping once per step; the same ranks in the end."""
    model = _to_drive()
    trainer = _driven(model, tmp_path)
    batches: list[dict[str, torch.Tensor]] = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **more: (batches.append(inputs), compute(model, inputs, **more))[1]
    trainer.train()
    own = _to_drive().train()
    trained = [parameter for _, parameter in graft.parameters(own, "a")]
    optimizer = torch.optim.SGD(trained, lr=0.3)
    for step in range(8):
        pair = [
            {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
            for batch in batches[2 * step : 2 * step + 2]
        ]
        term = graft.penalty(own, "a")
        assert term is not None
        (
            sum(own(**batch).loss for batch in pair) / 2 + term
        ).backward()  # rows of one length, so the mean of means is the mean
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        graft.after_step(own, "a", step + 1, 8)
        optimizer.zero_grad()
    mine, other = sites_of(model), sites_of(own)
    assert sum(int(site.kept.sum()) for site in mine.values()) == 2 * len(mine)
    for path, site in mine.items():
        assert torch.equal(site.kept, other[path].kept)
        for key in "PEQ":
            torch.testing.assert_close(getattr(site, key), getattr(other[path], key), atol=1e-5, rtol=0)


def test_a_trainer_resumes_in_the_midst_of_the_schedule(tmp_path: Path) -> None:
    whole = _to_drive()
    _driven(whole, tmp_path / "whole", save_strategy="steps", save_steps=4).train()
    resumed = _to_drive()
    trainer = _driven(resumed, tmp_path / "again")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for path, site in sites_of(resumed).items():
        assert torch.equal(site.kept, sites_of(whole)[path].kept)
        torch.testing.assert_close(site.E, sites_of(whole)[path].E, atol=1e-6, rtol=0)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_training_without_the_callback_warns_once_and_with_it_never(tmp_path: Path, optim: str) -> None:
    with pytest.warns(UserWarning, match=r"callbacks=\[graft.callback\(\)\]") as caught:
        _driven(_to_drive(), tmp_path, callbacks=[], optim=optim).train()
    assert sum("AdaLoRA" in str(each.message) for each in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*AdaLoRA.*")
        _driven(_to_drive(), tmp_path, optim=optim).train()
        fixed = _to_drive()
        graft.detach(fixed)
        graft.attach(fixed, {"a": graft.AdaLoRA(init_rank=4, target_rank=None, sites="attn.q")})
        _driven(fixed, tmp_path, callbacks=[], optim=optim).train()


def test_the_callback_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(graft.GraftError, match="has no steps left to move ranks in a run of 3"):
        _driven(_to_drive(), tmp_path, max_steps=3).train()
    trainer = _driven(_to_drive(), tmp_path)
    trainer.args.fp16 = True
    with pytest.raises(
        graft.GraftError, match="adapter 'a' has a penalty, which the Trainer does not scale under fp16"
    ):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
