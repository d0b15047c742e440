"""One LoRA job: PEFT with transformers.Trainer or TRL's SFTTrainer against Graft, on the same base, rows and initial weights.

    python benchmarks/train_vs_peft.py --data alpaca.json --tokenizer gpt2/ [--steps 24] [--repeats 2] [--dtype float32] [--dropout 0.05]
        [--quantise nf4|fp4|int8] [--peer trainer|trl] [--tiny]

Against the Trainer, each step has the same rows in the same order. TRL packs (its default strategy, best fit decreasing, attention within
each sample): its steps have other rows, about as many tokens, so that speed and memory are compared and the loss curves are not. With
dropout the curves differ by the masks, which each tool draws for itself.

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
from train_peers import TARGETS, load_base, run_peft
from turns import compared, keep, machine, peak_bytes, release, take_turns

TINY = {"shape": "32,2,48,4", "steps": 4, "repeats": 1, "batch": 8, "micro": 4, "max_length": 128, "threads": 1}
"""What --tiny sets: a run of seconds, which measures nothing."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="Alpaca rows (JSON)")
    parser.add_argument("--tokenizer", help="folder or hub name of the GPT-2 tokenizer")
    parser.add_argument("--peer", choices=["trainer", "trl"], default="trainer", help="what drives PEFT")
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA")
    parser.add_argument(
        "--tiny", action="store_true", help="rows and words of Graft's own, a base that measures nothing"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="samples per optimiser step")
    parser.add_argument("--micro", type=int, default=16, help="samples per forward pass of the Trainer")
    parser.add_argument("--budget", type=int, default=1024, help="tokens per forward pass of Graft")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--quantise", choices=["nf4", "fp4", "int8"], help="both bases in few bits, with bitsandbytes (QLoRA)"
    )
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    parser.add_argument("--shape", default="512,8,1376,8", help="hidden size, layers, intermediate size, heads")
    parser.add_argument(
        "--sorted", action="store_true", help="give the Trainer each step's rows sorted by length (less padding)"
    )
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "train_vs_peft.json"))
    parser.add_argument("--worker", choices=["graft", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    elif args.data is None or args.tokenizer is None:
        parser.error("name --data and --tokenizer, or give --tiny")
    args.micro = min(args.micro, args.batch)
    return args


def tiny_inputs(args: argparse.Namespace, work: Path) -> None:
    """Word problems as rows, and the tokenizer of the base that ships with Graft."""
    import graft.seedling
    from graft.quickstart.problems import generate

    (work / "rows.json").write_text(json.dumps(generate("train", 4 * args.steps * args.batch)))
    args.data, args.tokenizer = str(work / "rows.json"), str(graft.seedling.path())


def prepare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Base, tokens and initial weights, written once for both tools."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from graft.config.data import DataConfig, SourceConfig
    from graft.data.batches import samples_of_step
    from graft.data.preparing import prepare as prepare_data

    if args.tiny:
        tiny_inputs(args, work)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.save_pretrained(work / "tokenizer")
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
    epoch = train.epoch_order(0, 0)
    order = [int(i) for i in epoch[:needed]]
    if args.sorted:
        order = [i for step in range(args.steps) for i in samples_of_step(train, epoch, args.batch, step)]
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


def run_graft(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch

    import graft
    from graft.config.train import TrainConfig
    from graft.data.datasets import TokenDataset
    from graft.data.samples import Example
    from graft.runs.folder import RunFolder
    from graft.training.engine import Engine
    from graft.training.job import Job
    from graft.training.records.progress import Reporter
    from graft.training.settings import Settings

    rows = np.load(work / "rows.npz")
    examples = [
        Example(rows["input_ids"][a:b], rows["supervised"][a:b], "alpaca", index + 1)
        for index, (a, b) in enumerate(zip(rows["starts"][:-1], rows["starts"][1:], strict=True))
    ]
    if args.quantise:
        from graft.bases import load_model
        from graft.config.base import BaseConfig

        if args.threads:
            torch.set_num_threads(args.threads)
        settings = {"model": str(work / "base"), "quantize": args.quantise, "dtype": args.dtype}
        model = load_model(BaseConfig.model_validate(settings))
    else:
        model = load_base(args, work)
    graft.attach(model, {"lora": graft.LoRA(rank=args.rank, alpha=2 * args.rank, dropout=args.dropout, sites="linear")})
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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import peft
    import torch
    import transformers
    import trl

    with tempfile.TemporaryDirectory() as scratch:
        facts = prepare(args, Path(scratch))
        release()
        runs = take_turns(__file__, ("peft", "graft"), args.repeats, Path(scratch))
    hidden = ("data", "tokenizer", "out", "worker", "work", "tiny")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)}
    return {
        "settings": {key: value for key, value in vars(args).items() if key not in hidden},
        **facts,
        "machine": machine(args.threads),
        "versions": versions,
        **compared(runs, "graft", "peft", same_rows=args.peer == "trainer"),
    }


def main() -> None:
    args = options()
    if args.worker:
        result = {"graft": run_graft, "peft": run_peft}[args.worker](args, Path(args.work))
        print(json.dumps(result))
        return
    result = measure(args)
    keep(result, args.out)
    difference = result["largest_relative_loss_difference"]
    curves = "the curves are of other rows" if difference is None else f"losses differ by at most {difference:.1e}"
    print(
        f"Graft / PEFT: {result['speed_ratio']:.2f}x tokens/s (by processor time {result['processor_ratio']:.2f}x), "
        f"{result['peak_ratio']:.2f}x peak memory ({result['training_ratio']:.2f}x of what training adds); {curves}"
    )
    if args.dtype == "float32" and not args.dropout and difference is not None and difference > 1e-3:
        raise SystemExit("the loss curves are not equal")


if __name__ == "__main__":
    main()
