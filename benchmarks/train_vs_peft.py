"""One LoRA job: PEFT with transformers.Trainer against Graft, on the same base, rows, order, batch and initial weights.

    python benchmarks/train_vs_peft.py --data alpaca.json --tokenizer gpt2/ [--steps 24] [--repeats 2] [--dtype float32]

Each run is a process of its own; the two tools take turns, so that a busy machine slows both alike. Reported are tokens/s (real
tokens, padding not counted; median over the steps behind the first two), the processor time of the whole training, which other
work on the machine does not change, the peak of resident memory, and both loss curves, which have to be equal. The base is a LLaMA
of about 50M parameters with random weights, as every download would cost more than it tells.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from turns import compared, machine, peak_bytes, take_turns

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Alpaca rows (JSON)")
    parser.add_argument("--tokenizer", required=True, help="folder or hub name of the GPT-2 tokenizer")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="samples per optimiser step")
    parser.add_argument("--micro", type=int, default=16, help="samples per forward pass of the Trainer")
    parser.add_argument("--budget", type=int, default=1024, help="tokens per forward pass of Graft")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    parser.add_argument("--shape", default="512,8,1376,8", help="hidden size, layers, intermediate size, heads")
    parser.add_argument(
        "--sorted", action="store_true", help="give the Trainer each step's rows sorted by length (less padding)"
    )
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "train_vs_peft.json"))
    parser.add_argument("--worker", choices=["graft", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.micro = min(args.micro, args.batch)
    return args


def prepare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Base, tokens and initial weights, written once for both tools."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from graft.config.schema import DataConfig, SourceConfig
    from graft.data.batches import plan_epoch
    from graft.data.preparing import prepare as prepare_data

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    hidden, layers, inner, heads = map(int, args.shape.split(","))
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=inner,
            num_attention_heads=heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
        )  # fmt: skip
    )
    base.save_pretrained(work / "base")
    needed = args.steps * args.batch
    source = SourceConfig(path=args.data, limit=needed * 2)
    data = DataConfig(train=source, template="alpaca", max_length=args.max_length, overlong="drop")
    train = prepare_data(data, tokenizer).train
    steps = plan_epoch(train, args.batch, 1 << 30, 0, 0)[: args.steps]
    order = [int(i) for i in train.epoch_order(0, 0)[:needed]]
    if args.sorted:
        order = [i for step in steps for micro in step for i in micro]
    np.savez(
        work / "rows.npz",
        input_ids=train.input_ids,
        supervised=train.supervised,
        starts=train.starts,
        order=np.array(order),
    )
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate_proj": hidden, "up_proj": hidden, "down_proj": inner}
    first = {
        f"{layer}.{name}": torch.randn(args.rank, shapes.get(name, hidden), generator=generator)
        / shapes.get(name, hidden) ** 0.5
        for layer in range(layers)
        for name in TARGETS
    }
    torch.save(first, work / "first.pt")
    real, padded = 0, 0
    for at in range(0, len(order), args.micro):
        lengths = [int(train.lengths[i]) for i in order[at : at + args.micro]]
        real, padded = real + sum(lengths), padded + max(lengths) * len(lengths)
    return {
        "parameters": sum(p.numel() for p in base.parameters()),
        "rows": needed,
        "tokens": real,
        "targets": int(sum(train.targets[i] for i in order)),
        "padding_share_of_trainer": 1 - real / padded,
    }


def load_base(args: argparse.Namespace, work: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if args.threads:
        torch.set_num_threads(args.threads)
    return AutoModelForCausalLM.from_pretrained(work / "base", dtype=getattr(torch, args.dtype))


def run_graft(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch

    import graft
    from graft.config.schema import TrainConfig
    from graft.data.datasets import TokenDataset
    from graft.data.samples import Example
    from graft.runs import RunFolder
    from graft.training.engine import Engine, Settings
    from graft.training.job import Job
    from graft.training.progress import Reporter

    rows = np.load(work / "rows.npz")
    examples = [
        Example(rows["input_ids"][a:b], rows["supervised"][a:b], "alpaca", index + 1)
        for index, (a, b) in enumerate(zip(rows["starts"][:-1], rows["starts"][1:], strict=True))
    ]
    model = load_base(args, work)
    graft.attach(model, {"lora": graft.LoRA(rank=args.rank, alpha=2 * args.rank, sites="linear")})
    first = torch.load(work / "first.pt")
    with torch.no_grad():
        for name, parameter in graft.parameters(model, "lora"):
            if name.endswith(".A"):
                part = name.split(".")
                parameter.copy_(first[f"{part[2]}.{part[4]}"])
    config = TrainConfig(steps=args.steps, batch_size=args.batch, token_budget=args.budget, lr=1e-3)
    job = Job.make(model, "lora", config, TokenDataset.of(examples), None)
    folder = RunFolder(tempfile.mkdtemp(dir=work)).create()
    settings = Settings(pad_id=0, token_budget=args.budget)
    before, processor = peak_bytes(), time.process_time()
    Engine(model, [job], folder, settings, Reporter(args.steps, quiet=True), lambda job: None).run()
    processor = time.process_time() - processor
    lines = folder.metrics.read()
    return {"losses": [line["loss"] for line in lines], "seconds": [line["seconds"] for line in lines],
            "tokens": [line["tokens"] for line in lines], "peak": peak_bytes(), "before": before, "processor": processor}  # fmt: skip


def run_peft(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = np.load(work / "rows.npz")
    model = get_peft_model(
        load_base(args, work),
        LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        ),
    )
    first = torch.load(work / "first.pt")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                part = name.split(".")
                parameter.copy_(first[f"{part[part.index('layers') + 1]}.{part[part.index('lora_A') - 1]}"])
    items = []
    for index in rows["order"]:
        cut = slice(rows["starts"][index], rows["starts"][index + 1])
        ids = torch.from_numpy(rows["input_ids"][cut].astype(np.int64))
        items.append({"input_ids": ids, "labels": torch.where(torch.from_numpy(rows["supervised"][cut]), ids, -100)})

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        def pad(key: str, value: int) -> Any:
            return torch.nn.utils.rnn.pad_sequence([item[key] for item in batch], batch_first=True, padding_value=value)

        lengths = torch.tensor([len(item["input_ids"]) for item in batch])
        mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
        return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask}

    class InOrder(Trainer):
        def _get_train_sampler(self, *given: Any) -> Any:
            return SequentialSampler(items)

    class Clock(TrainerCallback):
        seconds: list[float] = []
        losses: list[float] = []

        def on_step_begin(self, *given: Any, **more: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in (logs or {}):
                self.losses.append(float(logs["loss"]))

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(work / "trainer"), per_device_train_batch_size=args.micro, gradient_accumulation_steps=args.batch // args.micro,
        max_steps=args.steps, learning_rate=1e-3, lr_scheduler_type="linear", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(), bf16=False, seed=0,
    )  # fmt: skip
    before, processor = peak_bytes(), time.process_time()
    InOrder(model=model, args=arguments, train_dataset=items, data_collator=collate, callbacks=[clock]).train()
    processor = time.process_time() - processor
    lengths = [len(item["input_ids"]) for item in items]
    tokens = [sum(lengths[at : at + args.batch]) for at in range(0, len(lengths), args.batch)]
    return {
        "losses": clock.losses,
        "seconds": clock.seconds,
        "tokens": tokens,
        "peak": peak_bytes(),
        "before": before,
        "processor": processor,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        facts = prepare(args, Path(scratch))
        runs = take_turns(__file__, ("peft", "graft"), args.repeats, Path(scratch))
    hidden = ("data", "tokenizer", "out", "worker", "work")
    return {
        "settings": {key: value for key, value in vars(args).items() if key not in hidden},
        **facts,
        "machine": machine(args.threads),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        **compared(runs, "graft", "peft"),
    }


def main() -> None:
    args = options()
    if args.worker:
        result = {"graft": run_graft, "peft": run_peft}[args.worker](args, Path(args.work))
        print(json.dumps(result))
        return
    result = measure(args)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"Graft / PEFT: {result['speed_ratio']:.2f}x tokens/s (by processor time {result['processor_ratio']:.2f}x), "
        f"{result['peak_ratio']:.2f}x peak memory ({result['training_ratio']:.2f}x of what training adds); "
        f"losses differ by at most {result['largest_relative_loss_difference']:.1e}"
    )
    if args.dtype == "float32" and result["largest_relative_loss_difference"] > 1e-3:
        raise SystemExit("the loss curves are not equal")


if __name__ == "__main__":
    main()
