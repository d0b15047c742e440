"""Two processes of one thread against one process of two threads: speed, memory of a process, and bytes that are sent.

    python benchmarks/world.py [--shape 512,8,1376,8] [--steps 12] [--repeats 3] [--tiny]

Four LoRAs of rank 8 on all linear layers train together on a random base, by each mode in turns. Reported are tokens per second (the
median step, the first two not counted), the processor time that all processes take for a token in the same steps, which does not change
with what else the machine does, the most anonymous memory that a process held (weights that are mapped from the file do not count), the
bytes that the ranks sum per step, and those of the adapters. What fsdp2 gathers of the base is not counted there: per pass and
rank it is the base in forward, and again in backward.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from random_base import write_base
from turns import WARM, free_port, keep, machine

WAYS = {"one": (1, 2), "ddp": (2, 1), "spread": (2, 1), "fsdp2": (2, 1)}
"""Processes, and threads of each."""
YAML = """
base: {{model: base, dtype: float32}}
data: {{train: rows.jsonl, template: alpaca, overlong: drop}}
train: {{steps: {steps}, batch_size: 4, lr: 1e-3, save_every: 1000, token_budget: 1024}}
adapter: {{kind: lora, rank: 8, sites: linear}}
distributed: {{mode: {mode}}}
jobs: {{a: , b: {{train: {{seed: 1}}}}, c: {{train: {{seed: 2}}}}, d: {{train: {{seed: 3}}}}}}
"""


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def work(way: str, folder: Path, steps: int, out: Path) -> None:
    """What a process does: train, and say what it saw."""
    import torch

    from graft.config import load_run
    from graft.distributed.group import Group
    from graft.training import engine, train

    torch.set_num_threads(WAYS[way][1])
    plain, sent, most, ended = Group.sum_, [0], [0], threading.Event()
    plain_step, busy = engine.joint_step, list[float]()

    def step(*given: Any) -> Any:
        began = time.process_time()
        outcome = plain_step(*given)
        busy.append(time.process_time() - began)
        return outcome

    def counted(group: Any, values: Any) -> Any:
        sent[0] += values.nbytes if group.size > 1 else 0
        return plain(group, values)

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], anonymous_bytes())

    Group.sum_, engine.joint_step = counted, step  # type: ignore[method-assign,assignment]
    threading.Thread(target=watch, daemon=True).start()
    os.chdir(folder)
    config = load_run(_values(way, steps))
    run = train(config, out, quiet=True, overwrite=True)
    ended.set()
    lines = [line for line in run.metrics.read() if "seconds" in line]
    by_step: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        by_step.setdefault(line["step"], []).append(line)
    speeds = [
        sum(line["tokens"] for line in each) / each[0]["seconds"] for step, each in by_step.items() if step > WARM
    ]
    tokens = sum(line["tokens"] for line in lines if line["step"] > WARM)
    adapters = sum(path.stat().st_size for path in out.glob("adapters/*/adapter_model.safetensors"))
    facts = {
        "tokens_per_second": statistics.median(speeds), "anonymous": most[0], "sent_per_step": sent[0] / steps, "adapters": adapters,
        "processor_ms_per_token": 1000 * sum(busy[WARM:]) / tokens, "last_loss": lines[-1]["loss"],
    }  # fmt: skip
    print(json.dumps(facts))


def _values(way: str, steps: int) -> Any:
    from ruamel.yaml import YAML as Reader

    return Reader(typ="safe").load(YAML.format(steps=steps, mode="single" if way == "one" else way))


def turn(way: str, folder: Path, steps: int) -> list[dict[str, Any]]:
    """One training by a way; what each of its processes saw."""
    count, threads = WAYS[way]
    port = free_port()
    command = [sys.executable, __file__, "--worker", way, "--work", str(folder), "--steps", str(steps)]
    own = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        for rank in range(count)
    ]  # fmt: skip
    started = [
        subprocess.Popen(command, env={**own, **(rank if count > 1 else {})}, stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{way} failed")
    return [json.loads(each.splitlines()[-1]) for each in said]


def main() -> None:
    """Run the ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="512,8,1376,8", help="hidden size, layers, intermediate size, heads")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a base that only proves that the script runs")
    parser.add_argument("--worker", choices=list(WAYS))
    parser.add_argument("--work", default=None)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "world.json"))
    args = parser.parse_args()
    if args.worker:
        work(args.worker, Path(args.work), args.steps, Path(args.work) / "runs" / args.worker)
        return
    if args.tiny:
        args.shape, args.steps, args.repeats = "32,2,48,4", 4, 1
    with tempfile.TemporaryDirectory() as scratch:
        parameters = write_base(Path(scratch), args.shape, 64)
        seen: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
        for repeat in range(args.repeats):
            for way in list(WAYS) if repeat % 2 == 0 else list(WAYS)[::-1]:
                began = time.monotonic()
                seen[way].append(turn(way, Path(scratch), args.steps))
                print(
                    f"{way:<8} {seen[way][-1][0]['tokens_per_second']:8.0f} tokens/s  {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    ways = {
        way: {
            "tokens_per_second": [round(each[0]["tokens_per_second"], 1) for each in runs],
            "processor_ms_per_token": [round(sum(rank["processor_ms_per_token"] for rank in each), 3) for each in runs],
            "anonymous_mib": [round(max(rank["anonymous"] for rank in each) / 2**20) for each in runs],
            "sent_bytes_per_step": round(runs[0][0]["sent_per_step"]),
            "adapter_bytes": runs[0][0]["adapters"],
            "last_loss": runs[0][0]["last_loss"],
        }
        for way, runs in seen.items()
    }
    keep({"machine": machine(2), "parameters_of_the_base": parameters, "steps": args.steps, "ways": ways}, args.out)
    print(json.dumps(ways, indent=1))


if __name__ == "__main__":
    main()
