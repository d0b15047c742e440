"""One LoRA job with `train.compile` against eager code: padded, as the graph is, and token-flat, which is what a run does by itself.

    python benchmarks/compiled.py [--steps 24] [--repeats 2] [--dtype float32] [--threads 2] [--tiny]

All three start from the same adapter on the same base of random weights and see the same rows in the same order; their loss curves have
to be equal, or the script fails. Each way is a process of its own; the ways take turns. Reported are tokens/s (real tokens, wall time from
the end of one step to that of the next, the first two not timed), processor time, the peak of memory and what training adds to the base,
and apart from all that the seconds from the start of training to the end of the first step: in a compiled run these are the proof and
the making of the graph. Inductor keeps what it made on the disk; here each process begins with an empty folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from random_base import add_options, make_base, parsed, samples
from turns import Run, compared, keep, machine, peak_bytes, release, take_turns, watch

WAYS: dict[str, dict[str, Any]] = {
    "padded": {"layout": "padded"},
    "flat": {"layout": "flat"},
    "compiled": {"layout": "padded", "compile": "inductor"},
}
LR, CLIP = 1e-3, 1.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="samples per step")
    parser.add_argument("--budget", type=int, default=4096, help="tokens per forward pass")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sites", default="linear", help="of LoRA")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "compiled.json"))
    parser.add_argument("--worker", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parsed(parser)


def prepare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The adapter as it starts."""
    import graft

    model = make_base(args)
    count = model.num_parameters()
    graft.attach(model, {"lora": graft.LoRA(rank=args.rank, alpha=2 * args.rank, sites=args.sites)})
    graft.save(model, "lora", work / "graft")
    return {"parameters": count, "trained": sum(tensor.numel() for _, tensor in graft.parameters(model, "lora"))}


def train(args: argparse.Namespace, work: Path) -> Run:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=work)

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
    job = Job.make(model, "lora", config, samples(args, args.steps * args.batch, seed=0), None)
    folder, clock = RunFolder(tempfile.mkdtemp(dir=work)).create(), watch()
    settings = Settings(pad_id=0, token_budget=args.budget, **WAYS[args.worker])
    before, processor = peak_bytes(), time.process_time()
    Engine(model, [job], folder, settings, clock, lambda job: None).run()
    processor, lines = time.process_time() - processor, folder.metrics.read()
    losses, tokens = ([line[key] for line in lines] for key in ("loss", "tokens"))
    return {"losses": losses, "seconds": clock.seconds, "tokens": tokens, "peak": peak_bytes(), "before": before,
            "processor": processor, "first": clock.first}  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        facts = prepare(args, Path(scratch))
        release()
        runs = take_turns(__file__, list(WAYS), args.repeats, Path(scratch))
    hidden = ("out", "worker", "work")
    against = {
        way: compared({key: runs[key] for key in ("compiled", way)}, "compiled", way) for way in ("padded", "flat")
    }
    return {
        "settings": {key: value for key, value in vars(args).items() if key not in hidden},
        **facts,
        "machine": machine(args.threads),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "seconds_to_the_end_of_the_first_step": {
            way: round(statistics.median(run["first"] for run in runs[way]), 2) for way in WAYS
        },
        **{f"against_{way}": result for way, result in against.items()},
    }


def main() -> None:
    args = options()
    if args.worker:
        print(json.dumps(train(args, Path(args.work))))
        return
    result = measure(args)
    keep(result, args.out)
    padded, flat = (result[f"against_{way}"] for way in ("padded", "flat"))
    differences = [found["largest_relative_loss_difference"] for found in (padded, flat)]
    first = result["seconds_to_the_end_of_the_first_step"]["compiled"]
    print(
        f"Compiled / eager: {padded['speed_ratio']:.2f}x tokens/s of padded batches, {flat['speed_ratio']:.2f}x of token-flat ones; peak "
        f"memory {padded['peak_ratio']:.2f}x and {flat['peak_ratio']:.2f}x; {first:.0f} s "
        f"to the end of the first step; losses differ by at most {max(differences):.1e}"
    )
    if max(differences) > (1e-3 if args.dtype == "float32" else 5e-2):
        raise SystemExit("the loss curves are not equal")


if __name__ == "__main__":
    main()
