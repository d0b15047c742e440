"""PEFT as `train_vs_peft.py` measures it: transformers' Trainer on padded batches, or TRL's SFTTrainer, which packs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from turns import peak_bytes, synchronise

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_base(args: argparse.Namespace, work: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    if args.quantise:
        from transformers import BitsAndBytesConfig

        four = {
            "load_in_4bit": True, "bnb_4bit_quant_type": args.quantise, "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }  # fmt: skip
        config = BitsAndBytesConfig(**({"load_in_8bit": True} if args.quantise == "int8" else four))
        return AutoModelForCausalLM.from_pretrained(
            work / "base", dtype=dtype, quantization_config=config, device_map={"": device}
        )
    base: Any = AutoModelForCausalLM.from_pretrained(work / "base", dtype=dtype)
    return base.to(device)


def peft_model(args: argparse.Namespace, work: Path) -> Any:
    """The base in PEFT's LoRA, with the same initial weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )  # fmt: skip
    model = get_peft_model(load_base(args, work), config)
    first = torch.load(work / "first.pt")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                part = name.split(".")
                parameter.copy_(first[f"{part[part.index('layers') + 1]}.{part[part.index('lora_A') - 1]}"])
    return model


def labelled(work: Path) -> list[dict[str, list[int]]]:
    """The rows in order, -100 where nothing is learnt."""
    rows, items = np.load(work / "rows.npz"), []
    for index in rows["order"]:
        cut = slice(rows["starts"][index], rows["starts"][index + 1])
        ids, supervised = rows["input_ids"][cut].tolist(), rows["supervised"][cut].tolist()
        labels = [token if learnt else -100 for token, learnt in zip(ids, supervised, strict=True)]
        items.append({"input_ids": ids, "labels": labels})
    return items


def clocked(trainer_class: Any) -> Any:
    """A Trainer that takes its rows in order and notes the tokens, seconds and loss of each step."""
    import torch
    from torch.utils.data import SequentialSampler

    class Clocked(trainer_class):
        seconds: list[float] = []
        tokens: list[int] = []
        losses: list[float] = []

        def _get_train_sampler(self, *given: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *given: Any, **more: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.tokens[-1] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *given, **more)

        def log(self, logs: dict[str, float], *given: Any, **more: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))
            super().log(logs, *given, **more)

    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *given: Any, **more: Any) -> None:
            synchronise()
            Clocked.tokens.append(0)
            self.started = time.perf_counter()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            synchronise()
            Clocked.seconds.append(time.perf_counter() - self.started)

    def made(**settings: Any) -> Any:
        return Clocked(callbacks=[Clock()], **settings)

    torch.manual_seed(0)
    return made


def arguments(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What both trainers are told."""
    import torch

    return {
        "output_dir": str(work / "trainer"), "max_steps": args.steps, "learning_rate": 1e-3, "lr_scheduler_type": "linear",
        "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(), "bf16": False, "gradient_checkpointing": False, "seed": 0,
    }  # fmt: skip


def with_trainer(args: argparse.Namespace, work: Path, model: Any) -> Any:
    """transformers' Trainer, a padded batch per forward pass."""
    import torch
    from transformers import Trainer, TrainingArguments

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        def pad(key: str, value: int) -> Any:
            parts = [torch.tensor(item[key]) for item in batch]
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

        lengths = torch.tensor([len(item["input_ids"]) for item in batch])
        mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
        return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask}

    settings = TrainingArguments(
        per_device_train_batch_size=args.micro, gradient_accumulation_steps=args.batch // args.micro, **arguments(args, work)
    )  # fmt: skip
    return clocked(Trainer)(model=model, args=settings, train_dataset=labelled(work), data_collator=collate)


def with_trl(args: argparse.Namespace, work: Path, model: Any) -> Any:
    """TRL's SFTTrainer with packing: rows of `max_length` tokens, as many per step as come nearest to the tokens of Graft's steps."""
    import datasets
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    items = labelled(work)
    tokens = sum(len(item["input_ids"]) for item in items) / args.steps
    settings = SFTConfig(
        per_device_train_batch_size=max(1, round(tokens / args.max_length)), packing=True, max_length=args.max_length,
        dataset_num_proc=None, **arguments(args, work),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = datasets.Dataset.from_list(items)
    return clocked(SFTTrainer)(model=model, args=settings, train_dataset=data, processing_class=tokenizer)


def run_peft(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    model = peft_model(args, work)
    trainer = (with_trl if args.peer == "trl" else with_trainer)(args, work, model)
    before, processor = peak_bytes(), time.process_time()
    trainer.train()
    processor = time.process_time() - processor
    return {"losses": trainer.losses, "seconds": trainer.seconds, "tokens": trainer.tokens, "peak": peak_bytes(), "before": before,
            "processor": processor}  # fmt: skip
