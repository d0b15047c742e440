"""How long the processes of a pipeline wait, for 1, 2 and 4 jobs, against GPipe's flush for the same micro-batches.

    python benchmarks/pipeline_bubble.py [--shape 384,4,1024,6] [--steps 12] [--repeats 3] [--tiny]

LoRAs of rank 8 on all linear layers train on a random base in two stages, each process with one thread. `joint`: the micro-batches of all
jobs are in one step, as a pipeline of Graft runs them. `flush`: one job takes a step at a time, so that the pipe runs empty after the
micro-batches of each job, as under GPipe. Shares are those of whole steps, updates included, the first two rounds not counted:

    theory      what is idle where all passes take equally long: (D - 1) / (M + D - 1), for M micro-batches between flushes on D stages
    replayed    what the schedule leaves idle: the processor time of every forward and backward pass, each after those it depends on
    waited      what a process spent in exchanges with the other one; on a machine with other work, both also wait for the processor
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
from pathlib import Path
from typing import Any

from random_base import write_base
from turns import WARM, free_port, keep, machine

COUNTS, STAGES = (1, 2, 4), 2
YAML = """
base: {{model: base, dtype: float32}}
data: {{train: rows.jsonl, template: alpaca, overlong: drop}}
train: {{steps: {steps}, batch_size: 4, lr: 1e-3, save_every: 1000, token_budget: {budget}, layout: flat}}
adapter: {{kind: lora, rank: 8, sites: linear}}
distributed: {{mode: pipeline, stages: {stages}}}
scheduler: {{together: {together}}}
jobs: {{{jobs}}}
"""


def work(jobs: int, way: str, args: argparse.Namespace) -> None:
    """What a process does: train, and say what share of its steps it waited."""
    import torch
    from ruamel.yaml import YAML as Reader

    from graft.config import load_run
    from graft.distributed.group import Group
    from graft.training import engine, train
    from graft.training.passes import Passes

    torch.set_num_threads(1)
    plain, both_ways, seen = engine.joint_step, Passes.both_ways, list[dict[str, Any]]()

    def step(forward: Any, jobs: Any, batcher: Any) -> Any:
        group: Group = batcher.shares.group
        group.wait()  # a step begins on all at once: what passed between two steps does not count
        began, waited, busy = time.perf_counter(), group.waited, time.thread_time()
        seen.append({"forward": [], "backward": []})
        outcome = plain(forward, jobs, batcher)
        rest = time.thread_time() - busy - sum(seen[-1]["forward"] + seen[-1]["backward"])
        seen[-1] |= {"seconds": time.perf_counter() - began, "waited": group.waited - waited, "rest": rest}
        return outcome

    def noting(way: str, function: Any) -> Any:
        def call(given: Any) -> Any:
            began = time.thread_time()
            found = function(given)
            seen[-1][way].append(time.thread_time() - began)
            return found

        return call

    def passes(self: Any, forward: Any, backward: Any) -> None:
        both_ways(self, noting("forward", forward), noting("backward", backward))

    engine.joint_step, Passes.both_ways = step, passes  # type: ignore[assignment]
    os.chdir(args.work)
    values = YAML.format(
        steps=args.steps, budget=args.budget, stages=args.stages, together=1 if way == "flush" else "null",
        jobs=", ".join(f"job{number}: {{train: {{seed: {number}}}}}" for number in range(jobs)),
    )  # fmt: skip
    config = load_run(Reader(typ="safe").load(values))
    run = train(config, Path(args.work) / "runs" / f"{way}{jobs}", quiet=True, overwrite=True)
    behind = seen[WARM * (jobs if way == "flush" else 1) :]
    losses = [line["loss"] for line in run.metrics.read() if "loss" in line and line["job"] == "job0"]
    seconds = sum(each["seconds"] for each in behind)
    facts = {
        "waited": sum(each["waited"] for each in behind) / seconds,
        "job_steps_per_second": len(behind) * (1 if way == "flush" else jobs) / seconds,
        "micros": statistics.median(len(each["forward"]) for each in behind),
        "last_loss": losses[-1],
        "steps": behind,
    }
    print(json.dumps(facts))


def replayed(ranks: list[dict[str, Any]]) -> list[float]:
    """The share of each rank's time that 1F1B leaves idle, where every pass takes the processor time that it took."""
    whole, busy = 0.0, [0.0] * len(ranks)
    for steps in zip(*(rank["steps"] for rank in ranks), strict=True):
        whole += _makespan(steps) + max(each["rest"] for each in steps)
        for rank, each in enumerate(steps):
            busy[rank] += sum(each["forward"]) + sum(each["backward"]) + each["rest"]
    return [1 - each / whole for each in busy]


def _makespan(steps: tuple[dict[str, Any], ...]) -> float:
    """The time from the first forward pass of a step to the last backward pass. steps: the step of each rank."""
    last, micros = len(steps) - 1, len(steps[0]["forward"])
    orders = [
        [("forward", at) for at in range(min(last - rank, micros))]
        + [
            each
            for at in range(micros)
            for each in (("forward", at + last - rank), ("backward", at))
            if each[1] < micros
        ]
        for rank in range(len(steps))
    ]
    ends: dict[tuple[int, str, int], float] = {}
    clocks = [0.0] * len(steps)
    while any(orders):
        for rank, order in enumerate(orders):
            while order:
                way, at = order[0]
                before = rank - 1 if way == "forward" else rank + 1
                if 0 <= before <= last and (before, way, at) not in ends:
                    break
                order.pop(0)
                clocks[rank] = max(clocks[rank], ends.get((before, way, at), 0.0)) + steps[rank][way][at]
                ends[rank, way, at] = clocks[rank]
    return max(clocks)


def turn(jobs: int, way: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One training; what each of its processes saw."""
    port = free_port()
    given = [
        "--jobs",
        jobs,
        "--work",
        args.work,
        "--steps",
        args.steps,
        "--budget",
        args.budget,
        "--stages",
        args.stages,
    ]
    command = [sys.executable, __file__, "--worker", way, *map(str, given)]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(STAGES), "MASTER_ADDR": "localhost"}
    started = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(STAGES)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{way} with {jobs} jobs failed")
    return [json.loads(each.splitlines()[-1]) for each in said]


def main() -> None:
    """Run all numbers of jobs in turns, both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="384,8,1024,6", help="hidden size, layers, intermediate size, heads")
    parser.add_argument("--stages", default="[4, 4]", help="blocks of each process")
    parser.add_argument("--budget", type=int, default=320, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a base that only proves that the script runs")
    parser.add_argument("--worker", choices=["joint", "flush"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", default=None)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "pipeline_bubble.json"))
    args = parser.parse_args()
    if args.worker:
        work(args.jobs, args.worker, args)
        return
    if args.tiny:
        args.shape, args.stages, args.steps, args.repeats = "32,2,48,4", "[1, 1]", 4, 1
    with tempfile.TemporaryDirectory() as args.work:
        parameters = write_base(Path(args.work), args.shape, 64)
        seen: dict[tuple[int, str], list[list[dict[str, Any]]]] = {}
        for _ in range(args.repeats):
            for jobs in COUNTS:
                for way in ("joint", "flush") if jobs > 1 else ("joint",):
                    seen.setdefault((jobs, way), []).append(turn(jobs, way, args))
                    found = seen[jobs, way][-1]
                    shares = [
                        f"{each['waited']:.0%} ({idle:.0%})" for each, idle in zip(found, replayed(found), strict=True)
                    ]
                    print(f"{jobs} jobs, {way}: waited (replayed) {' and '.join(shares)}", flush=True)
    found = [
        {
            "jobs": jobs, "way": way, "micro_batches": runs[0][0]["micros"],
            "theory": round((STAGES - 1) / (runs[0][0]["micros"] + STAGES - 1), 3),
            "replayed": [[round(share, 3) for share in replayed(each)] for each in runs],
            "waited": [[round(rank["waited"], 3) for rank in each] for each in runs],
            "job_steps_per_second": [round(each[0]["job_steps_per_second"], 2) for each in runs],
            "last_loss": runs[0][-1]["last_loss"],
        }
        for (jobs, way), runs in seen.items()
    ]  # fmt: skip
    keep({"machine": machine(1), "parameters_of_the_base": parameters, "steps": args.steps, "runs": found}, args.out)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
