"""What several adapters on one row cost: one adapter, two on each row, and the same two on rows of their own.

    python benchmarks/together_cost.py [--repeats 15] [--rows 8] [--length 128] [--tiny]

Timed is processor time on one thread on the embedded base in float32: training steps (forward and backward) and forward passes without
gradients. `two` are N rows with both adapters, `apart` are 2 N rows, N for each adapter. Reported are medians in milliseconds, ratios to
one adapter on N rows, and the microseconds that choosing a combination takes when it is known.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from turns import keep, machine

import graft
from graft.config import BaseConfig

TINY = {"repeats": 1, "rows": 2, "length": 8}
PAIRS = {
    "lora, lora": ({"kind": "lora", "rank": 8, "sites": "linear"}, {"kind": "lora", "rank": 8, "sites": "linear"}),
    "lora, dora": ({"kind": "lora", "rank": 8, "sites": "linear"}, {"kind": "dora", "rank": 8, "sites": "linear"}),
    "series, lora": ({"kind": "series", "bottleneck": 32, "sites": "mlp"}, {"kind": "lora", "rank": 8}),
    "prefix, lora": ({"kind": "prefix", "tokens": 10}, {"kind": "lora", "rank": 8}),
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "together_cost.json"))
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    return args


def measured(model: Any, pair: tuple[dict[str, Any], dict[str, Any]], args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each way, the ratios to one adapter, and the microseconds of a choice."""
    graft.attach(model, {"a": pair[0], "b": pair[1]})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (args.rows, args.length), generator=generator)
    ways: dict[str, tuple[list[Any], torch.Tensor]] = {
        "one": (["a"] * args.rows, ids),
        "two": ([["a", "b"]] * args.rows, ids),
        "apart": (["a"] * args.rows + ["b"] * args.rows, torch.cat([ids, ids])),
    }
    graft.set_active(model, ["a", "b"])
    times: dict[str, list[float]] = {}
    for number in range(args.repeats + 2):
        for way, (rows, inputs) in ways.items():
            for what in ("step", "forward"):
                model.train(what == "step")
                start = time.process_time()
                with torch.set_grad_enabled(what == "step"), graft.route(model, rows):
                    out = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
                    if what == "step":
                        out.square().mean().backward()
                if number > 1:  # the first two warm up
                    times.setdefault(f"{what} {way}", []).append(1000 * (time.process_time() - start))
                model.zero_grad()
    start = time.process_time()
    for _ in range(1000):
        with graft.use(model, ["a", "b"]):
            pass
    choice = (time.process_time() - start) * 1000
    graft.detach(model)
    found = {name: statistics.median(each) for name, each in times.items()}
    ratios = {f"{what} {way} / one": found[f"{what} {way}"] / found[f"{what} one"]
              for what in ("step", "forward") for way in ("two", "apart")}  # fmt: skip
    return {**found, **ratios, "microseconds of a choice": choice}


def main() -> None:
    from graft.bases import load_base

    args = options()
    torch.set_num_threads(1)
    model = load_base(BaseConfig(model="seedling", dtype="float32", device="cpu")).model
    found: dict[str, dict[str, float]] = {}
    for name, pair in PAIRS.items():
        found[name] = measured(model, pair, args)
        print(name, {key: round(value, 2) for key, value in found[name].items()}, flush=True)
    keep({"machine": machine(1), "rows": args.rows, "length": args.length, "milliseconds": found}, args.out)


if __name__ == "__main__":
    main()
