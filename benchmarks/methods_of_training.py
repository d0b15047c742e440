"""Memory by part, time and loss of every method of training, on one base and the same data.

    python benchmarks/methods_of_training.py [--shape 768,13,2048,12] [--steps 10] [--batch 8] [--only "qft;lora"] [--picture FILE] [--tiny]

The base is a LLaMA of about 100M parameters with random weights in float32. Each method trains in a process of its own: some steps, whose
processor time is taken (work beside it does not change that), and one more in which all tensors are counted. The parts:

    weights       of the base, as they are held, and of the adapter
    gradients     or what stands in for them: the stack of QFT, the copies of MeZO
    optimiser     its state after the steps
    activations   all that is alive at the end of the forward pass, besides
    moment        what the step has at most beyond these: a block that is computed again, a dequantised weight, a chunk of logits

In full training activations go while gradients come, so the parts together are more than the peak, which is measured too.

`--only` measures some methods and leaves what the results file says of the others. `--picture` draws the file and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from random_base import write_base
from turns import keep, machine

LORA = {"kind": "lora", "rank": 8, "sites": "linear"}
METHODS: dict[str, dict[str, Any]] = {
    "full, AdamW": {"train": {"method": "full", "lr": 3e-4}},
    "full, Lion": {"train": {"method": "full", "optimizer": "lion", "lr": 1e-4}},
    "full, AdamW in 8 bits": {"train": {"method": "full", "optimizer": "adamw-8bit", "lr": 3e-4}},
    "QFT": {"train": {"method": "qft", "lr": 1e-4}},
    "LoRA": {"adapter": LORA},
    "LoRA, recomputed": {"adapter": LORA, "train": {"activations": "recompute"}},
    "QLoRA, nf4": {"adapter": LORA, "base": {"quantize": "nf4"}},
    "QLoRA, int8": {"adapter": LORA, "base": {"quantize": "int8"}},
    **{f"MEFT{n}": {"adapter": {"preset": f"papers/meft{n}"}, "base": {"reversible": f"meft{n}"}} for n in (1, 2, 3)},
    "MeZO on LoRA": {"adapter": LORA, "train": {"method": "mezo", "lr": 1e-4}},
}  # fmt: skip
PARTS = ("weights", "gradients", "optimiser", "activations", "moment")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="768,13,2048,12", help="hidden size, layers, intermediate size, heads")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="methods, separated by semicolons")
    parser.add_argument("--picture", help="draw the results file to this file, and stop")
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "methods_of_training.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(shape="32,3,48,4", steps=2, batch=2)
    return args


def main() -> None:
    args = options()
    if args.worker:
        print(json.dumps(measured(args, json.loads(args.worker))))
        return
    if args.picture:
        draw(json.loads(Path(args.out).read_text()), Path(args.picture))
        return
    kept = Path(args.out)
    found: dict[str, Any] = json.loads(kept.read_text())["methods"] if args.only and kept.exists() else {}
    shape = {name: getattr(args, name) for name in ("shape", "steps", "batch")}
    with tempfile.TemporaryDirectory() as place:
        parameters = write_base(Path(place), args.shape, rows=max(64, 2 * args.steps * args.batch))
        for name in args.only.split(";") if args.only else METHODS:
            found[name] = one = child(args, METHODS[name], Path(place))
            parts = "  ".join(f"{part} {one[part] / 2**20:.0f}" for part in PARTS)
            print(
                f"{name:<22} {parts}  peak {one['peak'] / 2**20:.0f} MiB   {one['processor_seconds']:.2f} s   "
                f"loss {one['loss_before']:.3f} -> {one['loss_after']:.3f}",
                flush=True,
            )
    ordered = {name: found[name] for name in METHODS if name in found}
    keep({"machine": machine(args.threads), "parameters": parameters, **shape, "methods": ordered}, args.out)


def child(args: argparse.Namespace, method: dict[str, Any], place: Path) -> dict[str, Any]:
    """Measure one method in a process of its own."""
    line = [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps(method)]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(line, capture_output=True, text=True, cwd=place, env=env)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(args: argparse.Namespace, method: dict[str, Any]) -> dict[str, Any]:
    """Train by one method in this process."""
    from dataclasses import replace

    from graft.bases import pad_id
    from graft.bases.memory import memory_report
    from graft.config import load_run
    from graft.training.assembly import build
    from graft.training.batching import Batcher
    from graft.training.forward.activations import holding
    from graft.training.forward.layout import decide, laid_out
    from graft.training.forward.modes import set_training
    from graft.training.forward.tasks import forward_of
    from graft.training.updates.rules import rule_of
    from graft.training.validation import validation_scores

    run = {
        "base": {"model": "base", "dtype": "float32", **method.get("base", {})}, "data": {"train": "rows.jsonl", "validation": 16},
        "train": {"steps": args.steps + 2, "batch_size": args.batch, "lr": 1e-3, "schedule": "constant", **method.get("train", {})},
        **({"adapter": method["adapter"]} if "adapter" in method else {}),
    }  # fmt: skip
    parts = build(load_run(run))
    (job,), model = parts.jobs, parts.base.model
    weights, gradients = (
        memory_report(model).num_bytes + job.own_weights,
        job.own_bytes - job.own_weights - job.own_state,
    )
    if job.trainable.adapter is None:
        weights -= sum(each.nbytes for each in job.params.values())
    job.trainable.begin(job.optimizer)
    forward = forward_of(model)
    batcher = Batcher(4096, "padded", pad_id(parts.base.tokenizer, model))
    batcher = replace(batcher, layout=decide(forward, [job], "auto", batcher).layout)
    rule, spent, wall = rule_of(job), [], []

    def step() -> None:
        rule.update(job, rule.prepare(forward, [job], batcher)[job.name])

    with ExitStack() as stack:
        stack.enter_context(laid_out(model, batcher.layout))
        stack.enter_context(holding(model, parts.config.common().activations))
        set_training(model, [] if job.trainable.adapter is None else [job.name])
        before = validation_scores(forward, job, batcher)["validation_loss"]
        for _ in range(args.steps):
            start, begun = time.process_time(), time.perf_counter()
            step()
            spent.append(time.process_time() - start)
            wall.append(time.perf_counter() - begun)
        after = validation_scores(forward, job, batcher)["validation_loss"]
        alive, optimiser = counted(forward, job, step), sum(each.nbytes for each in job.tensors().values())
    if not rule.backward:  # what stands in for gradients is there before the forward pass
        alive["held"] = max(0, alive["held"] - gradients)
    moment = max(0, alive["peak"] - alive["held"] - gradients)
    return {
        "weights": weights, "gradients": gradients, "optimiser": optimiser, "activations": alive["held"], "moment": moment,
        "peak": weights + optimiser + alive["peak"],
        "processor_seconds": statistics.median(spent[1:]), "seconds": statistics.median(wall[1:]),
        "loss_before": before, "loss_after": after, "trained": job.trainable.count, "layout": batcher.layout,
    }  # fmt: skip


def counted(forward: Any, job: Any, step: Any) -> dict[str, int]:
    """The bytes of the tensors that a step makes: alive at the end of its forward pass, and at most."""
    from reversible_memory import Alive

    job.optimizer.zero_grad(set_to_none=True)
    alive, own, held = Alive(), type(forward).losses, [0]
    for each in (*forward.model.parameters(), *forward.model.buffers(), *job.tensors().values()):
        alive.leave_out(each)
    for _, each in job.trainable.tensors():
        alive.leave_out(each)

    def losses(*given: Any) -> Any:
        found = own(forward, *given)
        held[0] = max(held[0], alive.now)
        return found

    forward.losses = losses
    with alive:
        step()
    return {"held": held[0], "peak": alive.peak}


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar for each method, in parts that greyscale and hatches tell apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = result["methods"]
    figure, axes = pyplot.subplots(figsize=(8, 4.6))
    left = [0.0] * len(methods)
    looks = (("0.25", ""), ("0.5", ""), ("0.7", ""), ("0.88", ""), ("1.0", "////"))
    for part, (grey, hatch) in zip(PARTS, looks, strict=True):
        sizes = [one[part] / 2**20 for one in methods.values()]
        axes.barh(list(methods), sizes, left=left, color=grey, hatch=hatch, edgecolor="0.1", linewidth=0.6, label=part)
        left = [begin + size for begin, size in zip(left, sizes, strict=True)]
    for at, (total, one) in enumerate(zip(left, methods.values(), strict=True)):
        peak = one["peak"] / 2**20
        axes.plot([peak, peak], [at - 0.4, at + 0.4], color="black", linewidth=2.2)
        axes.text(total + 15, at, f"{peak:,.0f} MiB, {one['processor_seconds']:.1f} s", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(left))
    axes.set_xlabel("MiB of tensors in a step; the mark and the number are its peak; processor time of a step")
    axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.45, 1.0), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
