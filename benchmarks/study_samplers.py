"""How near the samplers of a study come to the optimum of a surrogate: rank, alpha, dropout and learning rate, 50 points, 10 seeds.

    python benchmarks/study_samplers.py [--budget 50] [--seeds 10] [--tiny]

The surrogate is a loss with its optimum at 0.8. As in real tuning, the best learning rate falls with the rank and with alpha. One point is
asked at a time. Reported are the mean and the worst best value over seeds, and the processor time of all questions.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

from turns import keep, machine

from graft.config.study import SearchConfig
from graft.study.samplers.base import Known
from graft.study.samplers.choosing import sampler_of
from graft.study.samplers.space import Codes, Space

OPTIMUM = 0.8
SPACE = {
    "rank": [4, 8, 16, 32, 64, 128],
    "alpha": [0.5, 1, 2, 4],
    "dropout": [0.0, 0.01, 0.05, 0.1],
    "lr": {"low": 1e-6, "high": 1e-2, "log": True},
}


def surrogate(space: Space, codes: Codes) -> float:
    """0.8 at rank 32, alpha twice the rank, dropout 0.05 and lr 10^-3.5; more elsewhere."""
    values = space.settings(codes)
    rank, alpha = math.log2(values["rank"]) - 5, math.log2(values["alpha"]) - 1
    rate = math.log10(values["lr"]) + 3.5 + 0.25 * rank + 0.2 * alpha
    return OPTIMUM + 0.02 * rate**2 + 0.003 * rank**2 + 0.002 * alpha**2 + 0.05 * abs(values["dropout"] - 0.05)


def best_of(name: str, budget: int, seed: int) -> float:
    space = Space.of(SearchConfig.model_validate({"space": SPACE, "budget": budget}))
    sampler, known, repeated = sampler_of(name, space, 1, seed), [], 0
    while len(known) < budget and repeated < budget:
        new = [each for each in sampler.ask(known, 1) if all(each != one.codes for one in known)]
        repeated += not new
        known += [Known(each, "done", (surrogate(space, each),)) for each in new]
    return min(each.values[0] for each in known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "study_samplers.json"))
    args = parser.parse_args()
    if args.tiny:
        args.budget, args.seeds = 6, 1
    found: dict[str, Any] = {}
    for name in ("random", "optuna", "nomad"):
        started = time.process_time()
        best = [best_of(name, args.budget, seed) for seed in range(args.seeds)]
        found[name] = {
            "mean": statistics.fmean(best),
            "worst": max(best),
            "within_0.005": sum(value - OPTIMUM <= 0.005 for value in best),
            "best": best,
            "processor_seconds": time.process_time() - started,
        }
        print(f"{name:7s} mean {found[name]['mean']:.4f}  worst {found[name]['worst']:.4f}", flush=True)
    keep(
        {"machine": machine(1), "budget": args.budget, "seeds": args.seeds, "optimum": OPTIMUM, "samplers": found},
        args.out,
    )


if __name__ == "__main__":
    main()
