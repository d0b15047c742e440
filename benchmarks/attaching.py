"""What one more adapter costs beside others: attach, detach, and the switches that every run and evaluation makes.

    python benchmarks/attaching.py [--beside 1,16,64,128,1024] [--repeats 7] [--tiny]

Timed is processor time on the embedded base, one thread. Beside N LoRAs of rank 8 on all linear layers one more is attached and
detached; `set_trainable` and `set_training` switch from one adapter to another, `evaluating` enters and leaves evaluation mode. Reported
are medians in milliseconds, and each over its value beside one adapter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from turns import keep, machine, processor_milliseconds

import graft
from graft.attaching.active import set_trainable
from graft.config import BaseConfig
from graft.training.forward.modes import evaluating, set_training

TINY = {"beside": "1,3", "repeats": 1}
NEW = "new"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", default="1,16,64,128,1024", help="numbers of adapters that are attached already")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "attaching.json"))
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    return args


def measured(model: Any, repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time of each operation."""
    names = graft.names(model)
    first, last = names[0], names[-1]
    config = graft.LoRA(rank=8, sites="linear")

    def enter() -> None:
        with evaluating(model):
            pass

    operations: dict[str, Callable[[], Any]] = {
        "attach": lambda: graft.attach(model, {NEW: config}),
        "detach": lambda: graft.detach(model, NEW),
        "set_trainable": lambda: set_trainable(model, [first]),
        "set_trainable_back": lambda: set_trainable(model, [last]),
        "set_training": lambda: set_training(model, [first]),
        "evaluating": enter,
        "set_training_back": lambda: set_training(model, [last]),
    }
    return processor_milliseconds(operations, repeats)


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    from graft.bases import load_base

    model = load_base(BaseConfig(model="seedling", dtype="float32", device="cpu")).model
    found: dict[int, dict[str, float]] = {}
    for number in sorted(map(int, args.beside.split(","))):
        missing = range(len(graft.names(model)), number)
        if missing:
            graft.attach(model, {f"a{each}": graft.LoRA(rank=8, sites="linear") for each in missing})
        found[number] = measured(model, args.repeats)
        print(
            f"beside {number:5d}: " + "  ".join(f"{name} {value:.2f} ms" for name, value in found[number].items()),
            flush=True,
        )
    fewest = found[min(found)]
    keep(
        {
            "machine": machine(1),
            "milliseconds": found,
            "over_fewest": {
                n: {name: value / fewest[name] for name, value in each.items()} for n, each in found.items()
            },
        },
        args.out,
    )


if __name__ == "__main__":
    main()
