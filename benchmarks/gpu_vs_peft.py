"""One LoRA job on a GPU: PEFT by a plain loop against Graft's engine, on a base of LLaMA-3.2-3B's shape with random weights.

    python benchmarks/gpu_vs_peft.py [--lengths 768|alpaca] [--shape llama-3.2-3b] [--steps 40] [--repeats 2] [--tiny]

The settings are those of PEFT's method comparison: bfloat16, batches of 4, samples of up to 768 tokens, LoRA of rank 32 on q and v
(PEFT's own choice for LLaMA; `--sites linear` for all linear layers), AdamW, clipping. `--lengths 768` draws lengths evenly from 76 to
768; `alpaca` by the quantiles of Alpaca's rows, which have 111 tokens on average. The second half of each sample is learnt. PEFT runs
each batch padded, without what a Trainer does besides. Both start from the same adapter on the same base and see the same rows in the
same order.

Each run is a process of its own; the two take turns. Reported are tokens/s (real tokens, wall time from the end of one step to that of
the next; the GPU is waited for), the peak of the GPU's memory and what training adds to the base, and both loss curves, which have to
be equal. Without a GPU only --tiny runs, which measures nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peft_loop import peft_loop
from random_base import add_options, make_base, parsed, samples
from turns import Run, compared, keep, machine, peak_bytes, release, take_turns, watch

SITES = {"qv": "attn.q attn.v", "linear": "linear"}
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
ALPACA = (38, 59, 72, 97, 136, 178, 324, 718)
"""Tokens at these quantiles, of rows of Alpaca in its own template, by GPT-2's tokenizer."""
LONGEST = 768
LR, CLIP = 1e-4, 1.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, shape="llama-3.2-3b", vocabulary=128256)
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument("--lengths", default=str(LONGEST), choices=[str(LONGEST), "alpaca"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="samples per step")
    parser.add_argument("--budget", type=int, default=4096, help="tokens per forward pass of Graft")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sites", default="qv", choices=list(SITES))
    parser.add_argument("--dropout", type=float, default=0.0, help="each tool then draws masks of its own")
    parser.add_argument("--kernels", default="auto", choices=["auto", "off", "liger"], help="Graft's train.kernels")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpu_vs_peft.json"))
    parser.add_argument("--worker", choices=["graft", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parsed(parser)


def data_of(args: argparse.Namespace) -> Any:
    """As many samples as the steps take, the same for both tools."""
    count = args.steps * args.batch
    drawn = np.random.default_rng(1).uniform(size=count)
    at = ((0.0, 1.0), (LONGEST // 10, LONGEST)) if args.lengths == str(LONGEST) else (QUANTILES, ALPACA)
    lengths = [int(length) for length in np.interp(drawn, *at)]
    return samples(args, count, seed=0, lengths=[8 + length % 8 for length in lengths] if args.tiny else lengths)


def prepare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The adapter as it starts, in Graft's format and in PEFT's."""
    import graft

    model, data = make_base(args), data_of(args)
    lora = graft.LoRA(rank=args.rank, alpha=2 * args.rank, dropout=args.dropout, sites=SITES[args.sites])
    graft.attach(model, {"lora": lora})
    graft.save(model, "lora", work / "graft")
    graft.export(model, "lora", work / "peft", format="peft")
    trained = sum(parameter.numel() for _, parameter in graft.parameters(model, "lora"))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()) - trained,
        "trained": trained,
        "tokens": int(data.lengths.sum()),
        "tokens_of_a_sample": {"mean": round(float(data.lengths.mean()), 1), "most": int(data.lengths.max())},
    }


def run_graft(args: argparse.Namespace, work: Path) -> Run:
    import graft
    from graft.config.train import TrainConfig
    from graft.runs.folder import RunFolder
    from graft.training.engine import Engine
    from graft.training.job import Job
    from graft.training.settings import Settings

    model = make_base(args)
    graft.load(model, work / "graft", name="lora")
    config = TrainConfig(
        steps=args.steps, batch_size=args.batch, token_budget=args.budget, lr=LR, clip=CLIP, schedule="constant"
    )
    job, clock = Job.make(model, "lora", config, data_of(args), None), watch()
    folder = RunFolder(tempfile.mkdtemp(dir=work)).create()
    before, processor = peak_bytes(), time.process_time()
    settings = Settings(pad_id=0, token_budget=args.budget, kernels=args.kernels)
    engine = Engine(model, [job], folder, settings, clock, lambda job: None)
    engine.run()
    processor, lines = time.process_time() - processor, folder.metrics.read()
    losses, tokens = ([line[key] for line in lines] for key in ("loss", "tokens"))
    return {"losses": losses, "seconds": clock.seconds, "tokens": tokens, "peak": peak_bytes(), "before": before,
            "processor": processor, "layout": engine.layout, "time": engine.recorder.clock.read(),
            "kernels": engine.recorder.acceleration.kernels}  # fmt: skip


def run_peft(args: argparse.Namespace, work: Path) -> Run:
    from peft import PeftModel

    from graft.data.batches import samples_of_step, steps_per_epoch

    data, model = data_of(args), PeftModel.from_pretrained(make_base(args), work / "peft", is_trainable=True).train()
    order, count = data.epoch_order(0, 0), steps_per_epoch(data, args.batch)
    steps = [[data[index] for index in samples_of_step(data, order, args.batch, step)] for step in range(count)]
    before, processor = peak_bytes(), time.process_time()
    kept = peft_loop(model, steps, LR, CLIP)
    return {"losses": kept["loss"], "seconds": kept["seconds"], "tokens": kept["tokens"], "peak": peak_bytes(), "before": before,
            "processor": time.process_time() - processor}  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        facts = prepare(args, Path(scratch))
        release()
        runs = take_turns(__file__, ("peft", "graft"), args.repeats, Path(scratch))
    hidden = ("out", "worker", "work", "length", "tiny")
    return {
        "settings": {key: value for key, value in vars(args).items() if key not in hidden},
        **facts,
        "machine": machine(args.threads),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "layout_of_graft": runs["graft"][0]["layout"],
        "kernels_of_graft": runs["graft"][0]["kernels"],
        "time_of_graft": runs["graft"][0]["time"],
        **compared(runs, "graft", "peft"),
    }


def main() -> None:
    args = options()
    if args.worker:
        print(json.dumps({"graft": run_graft, "peft": run_peft}[args.worker](args, Path(args.work))))
        return
    import torch

    if not torch.cuda.is_available() and not args.tiny:
        raise SystemExit(
            f"{Path(__file__).name} measures on a GPU, and torch sees none here: --tiny proves that it runs"
        )
    result = measure(args)
    keep(result, args.out)
    difference = result["largest_relative_loss_difference"]
    print(
        f"Graft / PEFT: {result['speed_ratio']:.2f}x tokens/s, {result['peak_ratio']:.2f}x peak memory "
        f"({result['training_ratio']:.2f}x of what training adds); losses differ by at most {difference:.1e}"
    )
    if not args.dropout and difference > (1e-3 if args.dtype == "float32" else 5e-2):
        raise SystemExit("the loss curves are not equal")


if __name__ == "__main__":
    main()
