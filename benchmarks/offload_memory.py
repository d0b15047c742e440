"""Peak memory and time of a step with blocks that stream (`base.offload: host`) and with blocks that stay, and what was predicted.

    python benchmarks/offload_memory.py [--hidden 768] [--layers 14] [--steps 4] [--tiny]

The base is a LLaMA with random weights, whose files are in bfloat16; on a CPU it computes in float32. A LoRA of rank 8 on all linear layers
trains on rows of 64 tokens. Each way is a process of its own. On a CPU the peak is that of anonymous memory (what the system cannot drop,
unlike pages mapped from files), sampled while the run trains; on a GPU that of the allocated tensors. Predicted is what `graft check` says
that the base takes. Losses have to be the same to the last bit on a CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from random_base import write_base
from turns import keep, machine

WAYS = ("stays", "streams")
ACTIVATIONS = ("keep", "recompute")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "offload_memory.json"))
    args = parser.parse_args()
    if args.tiny:
        args.hidden, args.layers, args.steps = 64, 2, 2
    return args


def write_inputs(folder: Path, args: argparse.Namespace) -> None:
    """A base in bfloat16, and data beside it."""
    write_base(folder, f"{args.hidden},{args.layers},{args.hidden * 11 // 4},4", rows=0, dtype="bfloat16", tied=False)
    rows = [{"instruction": f"{n} plus {n}? " * 8, "input": "", "output": str(2 * n)} for n in range(64)]
    (folder / "data.json").write_text(json.dumps(rows))


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def one(folder: Path, way: str, activations: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train in this process; the peak above what the process held before."""
    import torch

    from graft.bases import load_base, memory_report
    from graft.config import load_run
    from graft.distributed.sharded import streamed
    from graft.training import train

    torch.set_num_threads(args.threads)
    config = load_run(
        {
            "base": {"model": str(folder / "base"), **({"offload": "host"} if way == "streams" else {})},
            "adapter": {"kind": "lora", "rank": 8, "sites": "linear"},
            "data": {"train": str(folder / "data.json"), "template": "plain"},
            "train": {"steps": args.steps, "batch_size": 4, "activations": activations},
        }
    )
    on_gpu, before, peak, over = torch.cuda.is_available(), anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            peak[0] = max(peak[0], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    train(config, folder / f"{way}-{activations}", quiet=True)
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    lines = [json.loads(line) for line in (folder / f"{way}-{activations}" / "metrics.jsonl").read_text().splitlines()]
    base = load_base(config.base)
    predicted, blocks = memory_report(base.model).num_bytes, streamed(base.model)
    if blocks is not None:
        predicted += blocks.at_once - (blocks.held if on_gpu else 0)
    return {
        "peak": torch.cuda.max_memory_allocated() if on_gpu else peak[0],
        "predicted_base": predicted,
        "held_on_host": None if blocks is None else blocks.held,
        "run_seconds": seconds,
        "step_seconds": statistics.median(line["seconds"] for line in lines[1:]) if "seconds" in lines[0] else None,
        "losses": [line["loss"] for line in lines if "loss" in line],
    }


def main() -> None:
    args = options()
    if args.one:
        folder, way, activations = args.one
        print(json.dumps(one(Path(folder), way, activations, args)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        write_inputs(Path(place), args)
        for activations in ACTIVATIONS:
            for way in WAYS:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", place, way, activations]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[f"{way}-{activations}"] = json.loads(done.stdout.splitlines()[-1])
    for activations in ACTIVATIONS:
        stays, streams = (found[f"{way}-{activations}"] for way in WAYS)
        saved = stays["peak"] - streams["peak"]
        predicted = stays["predicted_base"] - streams["predicted_base"]
        found[activations] = {
            "saved": saved,
            "predicted": predicted,
            "same_losses": stays["losses"] == streams["losses"],
        }
        print(f"{activations}: saved {saved / 1e6:,.0f} MB, predicted {predicted / 1e6:,.0f} MB; {found[activations]}")
    if not args.tiny:
        keep(
            {
                "machine": machine(args.threads),
                "options": {name: getattr(args, name) for name in ("hidden", "layers", "steps")},
                **found,
            },
            args.out,
        )


if __name__ == "__main__":
    main()
