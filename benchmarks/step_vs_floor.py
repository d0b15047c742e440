"""What adapters cost: the time of a training step against the floor below which no adapter can get.

    python benchmarks/step_vs_floor.py [--steps 12] [--dtype float32] [--threads 2] [--tiny]

The floor is the frozen base's forward pass and the gradient of its input, on the same tokens, with the same head and loss. On top of
it come LoRA of rank 16 on all linear layers, LoRA on q and v, series adapters, and `none`: the model with all of these attached and none
of them in use. A step is everything that training does: passes, clipping, update. All samples are equally long, so that no layout has
an advantage. The ways take turns step by step in one process; reported are the medians and the median of each turn's ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_base import add_options, make_base, parsed, samples
from turns import WARM, keep, machine, peak_bytes

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora-linear": {"kind": "lora", "rank": 16, "alpha": 32, "sites": "linear"},
    "lora-qv": {"kind": "lora", "rank": 16, "alpha": 32, "sites": "attn.q attn.v"},
    "series": {"kind": "series", "bottleneck": 32},
}
FLOOR, NONE = "floor", "none"
Step = Callable[[], None]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=16, help="samples of a step, in one forward pass")
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "step_vs_floor.json"))
    return parsed(parser)


def training_step(args: argparse.Namespace, model: Any, name: str, objective: Any = None, passes: int = 1) -> Step:
    """A step of the engine, on one adapter. passes: over each sample, for which a micro-batch has room."""
    from graft.attaching.active import set_trainable
    from graft.config.train import TrainConfig
    from graft.training.batching import Batcher
    from graft.training.forward.causal import Forward
    from graft.training.forward.layout import decide
    from graft.training.forward.modes import set_training
    from graft.training.job import Job
    from graft.training.updates.rules import rule_of

    set_trainable(model, [name])
    budget = passes * args.batch * args.length
    config = TrainConfig(steps=args.steps, batch_size=args.batch, token_budget=budget, objective=objective)
    job, forward = (
        Job.make(model, name, config, samples(args, args.steps * args.batch, 0, equal=True), None),
        Forward(model),
    )
    batcher = Batcher(budget, "padded", 0)
    decide(forward, [job], "padded", batcher)

    def step() -> None:
        set_trainable(model, [name])
        set_training(model, [name])
        rule = rule_of(job)
        rule.update(job, rule.prepare(forward, [job], batcher)[job.name])

    return step


def bare_step(args: argparse.Namespace, model: Any) -> Step:
    """The base alone: forward, loss of the supervised tokens, gradient of the embedded input."""

    from graft.data.batches import padded
    from graft.ops.cross_entropy import linear_cross_entropy

    data = samples(args, args.steps * args.batch, 0, equal=True)
    batches = iter(range(0, len(data), args.batch))

    def step() -> None:
        at = next(batches)
        batch = padded([data[index] for index in range(at, at + args.batch)], list(range(args.batch)), 0)
        batch = batch.to(model.device)
        embedded = model.get_input_embeddings()(batch.input_ids).requires_grad_(True)
        inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids, "use_cache": False}
        hidden = model.model(inputs_embeds=embedded, **inputs)[0].flatten(0, 1).index_select(0, batch.target_index)
        loss = linear_cross_entropy(hidden, model.lm_head.weight, None, batch.target_ids).mean()
        loss.backward()
        loss.item()

    return step


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    import graft

    bare, model = make_base(args), make_base(args)
    parameters = sum(parameter.numel() for parameter in bare.parameters())
    bare.requires_grad_(False)
    for name, adapter in ADAPTERS.items():
        graft.attach(model, {name: {**adapter, **({"dropout": args.dropout} if adapter["kind"] == "lora" else {})}})
    graft.set_active(model, None)
    ways = {FLOOR: bare_step(args, bare), NONE: bare_step(args, model)}
    ways |= {name: training_step(args, model, name) for name in ADAPTERS}
    seconds = timed(ways, args.steps)
    ratios = {way: [own / floor for own, floor in zip(seconds[way], seconds[FLOOR], strict=True)] for way in ways}
    return {
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "repeats")},
        "parameters": parameters,
        "tokens_per_step": args.batch * args.length,
        "machine": machine(args.threads),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": {way: round(statistics.median(values), 4) for way, values in seconds.items()},
        "over_floor": {way: round(statistics.median(values), 3) for way, values in ratios.items()},
        "peak_mib": round(peak_bytes() / 2**20),
    }


def timed(ways: dict[str, Step], steps: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each step behind the warm-up, by a clock; in every turn the ways come in another order."""
    import torch

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(steps):
        for way in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
            started = clock()
            ways[way]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[way].append(clock() - started)
    return {way: values[WARM:] for way, values in seconds.items()}


def main() -> None:
    args = options()
    result = measure(args)
    keep(result, args.out)
    for way, factor in result["over_floor"].items():
        print(f"{way:<12} {result['seconds'][way]:8.3f} s   {factor:.2f}x the floor")


if __name__ == "__main__":
    main()
