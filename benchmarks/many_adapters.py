"""What one more job costs the host in every step: many LoRAs on one small base, each a job with its own data, optimiser and schedule.

    python benchmarks/many_adapters.py [--jobs 8,64,256,1024] [--dropout 0] [--repeats 7] [--before SRC] [--profile] [--tiny]

Timed is processor time on a random LLaMA of 2 blocks (14 linear layers), one thread, one row for each job and step. Beside every company
runs one job with as many rows: what remains over it, divided by the number of jobs, is what a job costs the host in a step. Reported are
medians in milliseconds. `--before` measures another state of Graft beside this one. `--profile` prints where the time of the largest
company goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_base import make_base, samples
from turns import keep, machine

import graft
from graft.attaching.active import set_trainable
from graft.config.train import TrainConfig
from graft.training.banking import arrange
from graft.training.batching import Batcher
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from graft.training.isolation import joint_step
from graft.training.job import Job

TINY = {"jobs": "2,3", "repeats": 1}
WARM = 3
"""Steps that are not timed."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="8,64,256,1024", help="numbers of jobs, separated by commas")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--before", help="the folder src of another state, to compare with")
    parser.add_argument("--profile", action="store_true", help="print where the time of the largest company goes")
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "many_adapters.json"))
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    base = {"shape": "64,2,128,4", "vocabulary": 256, "length": 12, "dtype": "float32", "threads": 1, "quantise": None}
    vars(args).update(base)
    return args


def stepper(args: argparse.Namespace, jobs: int, rows: int) -> tuple[Callable[[], Any], float]:
    """What takes one step of so many jobs, each with so many rows; and the milliseconds that attaching an adapter took."""
    model, names = make_base(args), [f"job{number}" for number in range(jobs)]
    start = time.process_time()
    for name in names:  # one by one, as runs attach them
        graft.attach(model, {name: graft.LoRA(rank=8, sites="linear", dropout=args.dropout)})
    attached = 1000 * (time.process_time() - start) / jobs
    set_trainable(model, names)
    made = []
    for number, name in enumerate(names):
        settings = {"batch_size": rows, "lr": 1e-3 * (1 + number % 3), "seed": number, "steps": 1000}
        made.append(Job.make(model, name, TrainConfig(**settings), samples(args, 16 * rows, number), None))
    forward, batcher = Forward(model), Batcher(8192, "flat", 0)
    decide(forward, made, "auto", batcher)
    arrange(model, made)

    def step() -> None:
        with laid_out(model, "flat"):
            _, failures = joint_step(forward, made, batcher)
        assert not failures, failures

    return step, attached


def seconds_of(step: Callable[[], Any]) -> float:
    start = time.process_time()
    step()
    return 1000 * (time.process_time() - start)


def measured(args: argparse.Namespace, jobs: int) -> tuple[dict[str, float], Callable[[], Any]]:
    """The medians of one number of jobs: company and single job take turns."""
    (company, attached), (single, _) = stepper(args, jobs, 1), stepper(args, 1, jobs)
    times: list[tuple[float, float]] = []
    for turn in range(WARM + args.repeats):
        pair = seconds_of(company), seconds_of(single)
        times += [pair] if turn >= WARM else []
    step, alone = (statistics.median(each) for each in zip(*times, strict=True))
    found = {
        "step": step,
        "one_job_of_as_many_rows": alone,
        "per_job": statistics.median((own - other) / jobs for own, other in times),
        "attach": attached,
    }
    return found, company


def elsewhere(args: argparse.Namespace, jobs: int) -> dict[str, float]:
    """The same medians of another state of Graft."""
    words = [__file__, "--jobs", jobs, "--dropout", args.dropout, "--repeats", args.repeats, "--out", os.devnull]
    env = {**os.environ, "PYTHONPATH": args.before}
    said = subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True, text=True, env=env)
    return json.loads(said.stdout.splitlines()[-1])


def profile(step: Callable[[], Any]) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    found: dict[int, dict[str, float]] = {}
    step: Callable[[], Any] | None = None
    for number in sorted(map(int, args.jobs.split(","))):
        found[number], step = measured(args, number)
        if args.before:
            found[number]["per_job_before"] = elsewhere(args, number)["per_job"]
        print(
            f"{number:5d} jobs: " + "  ".join(f"{name} {each:.3f} ms" for name, each in found[number].items()),
            flush=True,
        )
    if args.profile and step is not None:
        profile(step)
    fewest = found[min(found)]
    over = {
        number: {name: each[name] / fewest[name] for name in ("per_job", "attach")} for number, each in found.items()
    }
    settings = {"dropout": args.dropout, "rank": 8, "tokens_per_row": args.length}
    print(json.dumps(found[max(found)]))
    keep({"machine": machine(1), **settings, "milliseconds": found, "over_fewest": over}, args.out)


if __name__ == "__main__":
    main()
