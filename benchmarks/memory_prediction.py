"""How near does `graft check` come to the memory that `graft train` then uses? Five configurations on a random LLaMA of 50M parameters.

    python benchmarks/memory_prediction.py [--shape 640,10,1728,10] [--steps 8] [--batch 16] [--configurations "lora;qlora"] [--tiny]

Each configuration is checked and trained in processes of its own, on a GPU where there is one, else on the CPU. There, memory is the peak
of the whole process, and how much of what torch has freed stays in the process depends on glibc's heap. So on a CPU all is measured twice:
with glibc's own setting, and with MALLOC_MMAP_THRESHOLD_=262144, with which freed tensors go back to the system at once.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from random_base import write_base
from turns import graft_command, keep, machine

FULL = {"method": "full", "lr": 1e-5}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, recomputed": {"train": {"activations": "recompute"}},
    "qlora": {"base": {"quantize": "nf4"}},
    "full, adamw": {"train": FULL},
    "qft": {"train": {**FULL, "method": "qft"}},
}
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
ALLOCATORS = {"glibc's own": {}, "freed at once": {THRESHOLD: "262144"}}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="640,10,1728,10", help="hidden size, layers, intermediate size, heads")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--configurations", default=";".join(CONFIGURATIONS), help="separated by semicolons")
    parser.add_argument("--allocators", default=";".join(ALLOCATORS), help="separated by semicolons")
    parser.add_argument("--add", action="store_true", help="keep what the results file says of other configurations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "memory_prediction.json"))
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(shape="32,2,48,4", steps=2, batch=2, configurations="lora")
    return args


def main() -> None:
    args = options()
    kept = Path(args.out)
    found: dict[str, dict[str, Any]] = (
        json.loads(kept.read_text())["by_allocator"] if args.add and kept.exists() else {}
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parameters = write_base(folder, args.shape, rows=4 * args.steps * args.batch)
        for allocator in args.allocators.split(";"):
            variables = ALLOCATORS[allocator]
            found.setdefault(allocator, {})
            for name in args.configurations.split(";"):
                found[allocator][name] = one = measured(folder, args, name, variables)
                print(
                    f"{allocator:<16}{name:<18}predicted {one['predicted'] / 2**20:7.0f} MiB   used {one['used'] / 2**20:7.0f} MiB   "
                    f"{one['difference']:+6.1%}   {one['parts']}",
                    flush=True,
                )
    if not args.tiny:
        shape = {name: getattr(args, name) for name in ("shape", "steps", "batch")}
        keep({"machine": machine(args.threads), "parameters": parameters, **shape, "by_allocator": found}, args.out)


def measured(folder: Path, args: argparse.Namespace, name: str, variables: dict[str, str]) -> dict[str, Any]:
    """What `graft check` says of a configuration, and what `graft train` uses."""
    wanted = CONFIGURATIONS[name]
    run: dict[str, Any] = {
        "base": {"model": "base", "dtype": "float32", **wanted.get("base", {})}, "data": {"train": "rows.jsonl"},
        "train": {"steps": args.steps, "batch_size": args.batch, **wanted.get("train", {})},
    }  # fmt: skip
    if "method" not in run["train"]:
        run["adapter"] = {"kind": "lora", "rank": 8, "sites": "linear"}
    (folder / "run.json").write_text(json.dumps(run))  # YAML reads JSON
    trial = json.loads(graft(folder, args, variables, "check", "run.json", "--json"))["trial"]
    graft(folder, args, variables, "train", "run.json", "--out", "out", "--overwrite")
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    used = [line["memory_bytes"] for line in lines if "memory_bytes" in line][-1]
    predicted = trial["peak_bytes"]
    return {
        "predicted": predicted, "used": used, "difference": predicted / used - 1, "parts": trial["memory"],
        "tokens": trial["tokens"], "seconds": [line["seconds"] for line in lines if "seconds" in line],
    }  # fmt: skip


def graft(folder: Path, args: argparse.Namespace, variables: dict[str, str], *words: str) -> str:
    """Run the command line with one of the allocators."""
    own = {**{name: value for name, value in os.environ.items() if name != THRESHOLD}, **variables}
    return graft_command(folder, args.threads, *words, variables=own)


if __name__ == "__main__":
    main()
