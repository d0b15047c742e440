"""transformers' Trainer and TRL's SFTTrainer drive a grafted model: they train it, save the adapter alone, and resume from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import graft
from tests.callers.tiny import rows, tiny_llama


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    settings: dict[str, object] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "save_steps": 4,
        "learning_rate": 5e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    return TrainingArguments(**(settings | changes))  # pyright: ignore[reportArgumentType]


def grafted() -> torch.nn.Module:
    torch.manual_seed(3)
    return graft.attach(tiny_llama(), {"math": graft.LoRA(rank=4), "idle": graft.Series(sites="mlp")})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_saves_the_adapter_and_not_the_base_and_graft_loads_the_checkpoint(tmp_path: Path) -> None:
    model = grafted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("graft.math" not in name), name
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert saved and all(".graft." in name for name in saved)
    assert not (tmp_path / "checkpoint-8" / "adapter_model.safetensors").exists()
    assert set(json.loads((tmp_path / "checkpoint-8" / "adapter_config.json").read_text())["adapters"]) == {
        "math",
        "idle",
    }
    again = graft.load(tiny_llama(), tmp_path / "checkpoint-8", name="math")
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_trainer_resumes_to_the_losses_of_an_unbroken_run(tmp_path: Path) -> None:
    whole = Trainer(model=grafted(), args=arguments(tmp_path / "a"), train_dataset=rows())
    whole.train()
    resumed = Trainer(model=grafted(), args=arguments(tmp_path / "b"), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert losses(resumed)[-4:] == pytest.approx(losses(whole)[-4:], abs=1e-6)


def test_trainer_loads_the_best_model_at_the_end(tmp_path: Path) -> None:
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "learning_rate": 1.0,
        "metric_for_best_model": "loss",
    }
    trainer = Trainer(model=grafted(), args=arguments(tmp_path, **settings), train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    stored = load_file(Path(best) / "model.safetensors")
    now = trainer.model.state_dict()  # pyright: ignore[reportOptionalMemberAccess]
    assert all(torch.equal(now[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_a_grafted_model_plain_and_packed(tmp_path: Path, packing: bool) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = grafted()
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, learning_rate=5e-2, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, logging_steps=1, packing=packing, max_length=32, gradient_checkpointing=False, save_steps=8,
        dataset_kwargs={"skip_prepare_dataset": False},
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()])
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(".graft." in name for name in load_file(tmp_path / "checkpoint-8" / "model.safetensors"))


def tokenizer() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
