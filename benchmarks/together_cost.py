"""What several adapters on one row cost: one adapter, two on each row, and the same two on rows of their own.

    python benchmarks/together_cost.py [--repeats 15] [--rows 8] [--length 128] [--tiny]

Timed is processor time on one thread on the embedded base in float32: training steps (forward and backward) and forward passes without
gradients. `two` are N rows with both adapters, `apart` are 2 N rows, N for each adapter. Reported are medians in milliseconds, ratios to
one adapter on N rows, and the microseconds that choosing a combination takes when it is known.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from turns import keep, machine, pass_options, processor_milliseconds

import graft
from graft.config import BaseConfig

PAIRS = {
    "lora, lora": ({"kind": "lora", "rank": 8, "sites": "linear"}, {"kind": "lora", "rank": 8, "sites": "linear"}),
    "lora, dora": ({"kind": "lora", "rank": 8, "sites": "linear"}, {"kind": "dora", "rank": 8, "sites": "linear"}),
    "series, lora": ({"kind": "series", "bottleneck": 32, "sites": "mlp"}, {"kind": "lora", "rank": 8}),
    "prefix, lora": ({"kind": "prefix", "tokens": 10}, {"kind": "lora", "rank": 8}),
}


def measured(model: Any, pair: tuple[dict[str, Any], dict[str, Any]], args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each way, the ratios to one adapter, and the microseconds of a choice."""
    graft.attach(model, {"a": pair[0], "b": pair[1]})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (args.rows, args.length), generator=generator)
    batches: dict[str, tuple[list[Any], torch.Tensor]] = {
        "one": (["a"] * args.rows, ids),
        "two": ([["a", "b"]] * args.rows, ids),
        "apart": (["a"] * args.rows + ["b"] * args.rows, torch.cat([ids, ids])),
    }
    graft.set_active(model, ["a", "b"])

    def prepare(way: str) -> None:
        model.zero_grad()
        model.train(way.startswith("step"))

    def logits(name: str) -> torch.Tensor:
        rows, inputs = batches[name]
        with graft.route(model, rows):
            return model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits

    ways: dict[str, Callable[[], Any]] = {}
    for name in batches:
        ways[f"step {name}"] = lambda name=name: logits(name).square().mean().backward()
        ways[f"forward {name}"] = torch.no_grad()(lambda name=name: logits(name))
    found = processor_milliseconds(ways, args.repeats, warm=2, before=prepare)
    start = time.process_time()
    for _ in range(1000):
        with graft.use(model, ["a", "b"]):
            pass
    choice = (time.process_time() - start) * 1000
    graft.detach(model)
    ratios = {f"{what} {way} / one": found[f"{what} {way}"] / found[f"{what} one"]
              for what in ("step", "forward") for way in ("two", "apart")}  # fmt: skip
    return {**found, **ratios, "microseconds of a choice": choice}


def main() -> None:
    from graft.bases import load_base

    args = pass_options(__doc__, "together_cost.json")
    torch.set_num_threads(1)
    model = load_base(BaseConfig(model="seedling", dtype="float32", device="cpu")).model
    found: dict[str, dict[str, float]] = {}
    for name, pair in PAIRS.items():
        found[name] = measured(model, pair, args)
        print(name, {key: round(value, 2) for key, value in found[name].items()}, flush=True)
    keep({"machine": machine(1), "rows": args.rows, "length": args.length, "milliseconds": found}, args.out)


if __name__ == "__main__":
    main()
