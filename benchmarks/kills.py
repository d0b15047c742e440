"""Kill one of two processes of a run at random instants (SIGKILL), go on, and compare the losses with those of the unbroken run.

    python benchmarks/kills.py [--tries 20] [--rank 1] [--mode ddp] [--tiny]

An instant is drawn evenly over the whole run, loading and closing included. The other process has to end by itself. Then two processes go
on. Losses have to be those of the unbroken run to the last bit. The JSON under benchmarks/results says how many were.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from turns import free_port, keep, machine

JOBS = """
base: {model: seedling, dtype: float32}
data: {train: data.json, template: alpaca, validation: 4}
train: {steps: 10, batch_size: 2, lr: 1e-3, save_every: 2, token_budget: 400, layout: padded}
distributed: {mode: MODE, timeout: 20}
jobs:
  lora: {adapter: {kind: lora, rank: 4, sites: attn.q attn.v, dropout: 0.2}}
  series: {adapter: {kind: series, bottleneck: 8}, train: {seed: 3, batch_size: 1}}
"""


def one_rank(rank: int, port: int, folder: str, go_on: bool) -> None:
    """What a process does."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip
    import torch

    from graft.config import load_run
    from graft.runs.contents import is_run
    from graft.training import resume, train

    torch.set_num_threads(1)
    if go_on and is_run(Path(folder)):
        resume(Path(folder), quiet=True)
    else:
        train(load_run("run.yaml"), Path(folder), quiet=True, overwrite=go_on)


def start(folder: str, go_on: bool) -> list[Any]:
    """Two processes of the run."""
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["graft.training", "transformers"])
    processes = [context.Process(target=one_rank, args=(rank, port, folder, go_on)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def end(processes: list[Any], seconds: float = 90) -> list[int | None]:
    """Wait for both; their exit codes, None for one that did not end."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def losses(folder: str) -> dict[tuple[int, str], float]:
    """Step and job -> training or validation loss."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {
        (line["step"], f"{line['job']} {key}"): line[key]
        for line in lines
        for key in ("loss", "validation_loss")
        if key in line
    }


def main() -> None:
    """Run the tries."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--mode", default="ddp", choices=["ddp", "spread"])
    parser.add_argument("--seconds", type=float, default=3000.0, help="begin no further try after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="one try, which only proves that the script runs")
    parser.add_argument("--out", default=None)
    given = parser.parse_args()
    given.tries = 1 if given.tiny else given.tries
    out = str(
        Path(given.out or Path(__file__).parent / "results" / f"kills_rank{given.rank}_{given.mode}.json").resolve()
    )
    began, rng = time.monotonic(), random.Random(given.rank)
    os.chdir(tempfile.mkdtemp())
    rows = [{"instruction": f"say {at}", "input": "", "output": f"it is {at * at}"} for at in range(40)]
    Path("data.json").write_text(json.dumps(rows))
    Path("run.yaml").write_text(JOBS.replace("MODE", given.mode))
    assert end(start("warm", go_on=False)) == [0, 0]
    timed = time.monotonic()
    assert end(start("unbroken", go_on=False)) == [0, 0]
    whole, wanted = time.monotonic() - timed, losses("unbroken")
    tries: list[dict[str, Any]] = []
    while len(tries) < given.tries and time.monotonic() - began < given.seconds:
        folder, instant = f"run{len(tries)}", rng.uniform(0, whole)
        processes = start(folder, go_on=False)
        time.sleep(instant)
        processes[given.rank].kill()
        killed = time.monotonic()
        survivor = end(processes)[1 - given.rank]
        seconds = time.monotonic() - killed
        codes = end(start(folder, go_on=True))
        equal = codes == [0, 0] and losses(folder) == wanted
        tries.append(
            {
                "instant": round(instant, 2),
                "survivor": survivor,
                "seconds": round(seconds, 1),
                "codes": codes,
                "equal": equal,
            }
        )
        print(tries[-1], flush=True)
        facts = {
            "rank": given.rank,
            "mode": given.mode,
            "seconds_of_the_run": round(whole, 1),
            "equal": sum(each["equal"] for each in tries),
        }
        keep({"machine": machine(1), **facts, "tries": tries}, out)


if __name__ == "__main__":
    main()
