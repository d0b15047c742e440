"""What the benchmarks share: tools that take turns, each run a process of its own, and the ratios between them.

Wall time is what a user waits for; processor time does not change with what else the machine does; memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WARM = 2
"""Steps at the start that are not timed."""

Run = dict[str, Any]
"""losses, seconds and tokens by step; peak and before (bytes); processor (seconds of the whole training)."""


def peak_bytes() -> int:
    """Peak resident memory of this process, or of the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def speed(run: dict[str, Any]) -> float:
    """Tokens per second behind the warm-up, by the median time per token: one slow step on a shared machine does not count."""
    pairs = list(zip(run["seconds"], run["tokens"], strict=True))[WARM:]
    return 1.0 / statistics.median(seconds / tokens for seconds, tokens in pairs)


def watch() -> Any:
    """A reporter for Graft's engine that shows nothing and notes the wall time from one step's end to the next in `seconds`, all that
    happens between steps included; the first step has no beginning and counts 0 (it belongs to the warm-up). `first` is the time from here
    to the end of the first step."""
    from graft.training.records.progress import Reporter

    class Watch(Reporter):
        def __init__(self) -> None:
            super().__init__(0, quiet=True)
            self.seconds: list[float] = []
            self.first = 0.0
            self._made, self._ended = time.perf_counter(), None

        def step(self, step: int, metrics: dict[str, Any]) -> None:
            synchronise()
            now = time.perf_counter()
            self.first = self.first or now - self._made
            self.seconds.append(0.0 if self._ended is None else now - self._ended)
            self._ended = now

    return Watch()


def synchronise() -> None:
    """Wait until the GPU, where there is one, has done what it was asked."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Give the GPU's memory back to other processes, once nothing here refers to it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def take_turns(script: str, tools: Sequence[str], repeats: int, scratch: Path) -> dict[str, list[Run]]:
    """Run `script --worker TOOL --work SCRATCH` with this process's arguments, the tools in turns; each prints its run as JSON."""
    runs: dict[str, list[Run]] = {tool: [] for tool in tools}
    for repeat in range(repeats):
        for tool in tools if repeat % 2 == 0 else tools[::-1]:
            line = [sys.executable, script, *sys.argv[1:], "--worker", tool, "--work", str(scratch)]
            answer = subprocess.run(
                line, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
            )
            if answer.returncode:
                raise SystemExit(answer.stderr)
            run = json.loads(answer.stdout.splitlines()[-1])
            runs[tool].append(run)
            print(f"{tool:<18} {speed(run):8.0f} tokens/s   peak {run['peak'] / 2**20:7.0f} MiB", flush=True)
    return runs


def compared(runs: dict[str, list[Run]], ours: str, theirs: str, same_rows: bool = True) -> dict[str, Any]:
    """Speed, processor time, memory and loss curves of two tools, and their ratios (medians over the turns).

    same_rows: whether step k has the same rows in both, so that the curves can be compared.
    """
    pairs = list(zip(runs[ours], runs[theirs], strict=True))
    peak = {tool: statistics.median(run["peak"] for run in runs[tool]) for tool in runs}
    growth = {tool: peak[tool] - statistics.median(run["before"] for run in runs[tool]) for tool in runs}
    ratios = [speed(own) / speed(other) for own, other in pairs]
    curves = {tool: runs[tool][0]["losses"] for tool in runs}
    return {
        "tokens_per_second": {tool: [round(speed(run), 1) for run in runs[tool]] for tool in runs},
        "speed_ratios": [round(ratio, 3) for ratio in ratios],
        "speed_ratio": round(statistics.median(ratios), 3),
        "processor_seconds": {tool: [round(run["processor"], 2) for run in runs[tool]] for tool in runs},
        "processor_ratio": round(statistics.median(per_token(other) / per_token(own) for own, other in pairs), 3),
        "peak_mib": {tool: round(peak[tool] / 2**20) for tool in runs},
        "peak_ratio": round(peak[ours] / peak[theirs], 3),
        "training_mib": {tool: round(growth[tool] / 2**20) for tool in runs},
        "training_ratio": round(growth[ours] / growth[theirs], 3),
        "largest_relative_loss_difference": max(
            abs(own - other) / other for own, other in zip(curves[ours], curves[theirs], strict=True)
        )
        if same_rows
        else None,
        "losses": {tool: [round(loss, 6) for loss in curve] for tool, curve in curves.items()},
    }


def per_token(run: Run) -> float:
    """Processor seconds per token, of the whole training."""
    return run["processor"] / sum(run["tokens"])


def processor_milliseconds(
    ways: Mapping[str, Callable[[], Any]],
    repeats: int,
    warm: int = 0,
    before: Callable[[str], Any] = lambda name: None,
) -> dict[str, float]:
    """Median milliseconds of processor time of each way. They take turns, of which the first `warm` do not count.

    before: what prepares a way, by its name, and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm + repeats):
        for name, way in ways.items():
            before(name)
            start = time.process_time()
            way()
            if turn >= warm:
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def pass_options(description: str | None, result: str) -> argparse.Namespace:
    """The options of a benchmark of passes over a batch of one length. result: the name of its file in `results`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / result))
    args = parser.parse_args()
    if args.tiny:
        args.repeats, args.rows, args.length = 1, 2, 8
    return args


def graft_command(folder: Path, threads: int, *words: str, variables: Mapping[str, str] | None = None) -> str:
    """Run Graft's command line in a folder, in a process of its own; what it wrote to stdout. variables: all others of its environment."""
    env = {**(os.environ if variables is None else variables), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-m", "graft", *words], capture_output=True, text=True, env=env, cwd=folder)
    if done.returncode:
        raise SystemExit(f"graft {' '.join(words)} failed:\n{done.stderr}{done.stdout}")
    return done.stdout


def free_port() -> int:
    """A port at which processes can meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def machine(threads: int) -> dict[str, Any]:
    """Where a benchmark ran."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    used = threads or torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cores": os.cpu_count(), "threads": used, "load_at_end": load, "platform": platform.platform(), "gpu": gpu}


def keep(result: dict[str, Any], out: str) -> None:
    """Write a result where it is asked for."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
