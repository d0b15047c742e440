"""How much of an adapter survives when it is merged into 4 or 8 bits, for every kind that folds?

    python benchmarks/merge_into_bits.py [--bits nf4,int8] [--first 100] [--steps 100] [--kinds lora,dora] [--add]
        [--work FOLDER] [--tiny]

The embedded base first learns word problems and is merged, so that it knows the task in part. Its weights are then quantised to nf4, and
adapters of all kinds train on further problems, each at the learning rate of its kind: what they add to a weight is small beside the steps
between the levels. Each is merged into few bits; losses are those of held-out problems. Reported are the share of the adapter's gain that
survives, rounded to the nearest and as `graft merge --quantize` writes it, and the divergence of answers from the adapter's. With more
steps at first (--first 250) the adapter's gain is a few thousandths, and chance moves its share by several hundredths.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from turns import graft_command, keep, machine

from graft.adapters.learning_rates import LEARNING_RATES
from graft.cli import main as main_of_graft
from graft.quickstart.problems import generate

KINDS: dict[str, dict[str, Any]] = {
    **{kind: {"rank": 8} for kind in ("lora", "dora", "pissa", "loha", "lokr", "miss", "hira", "shira")},
    "adalora": {"init_rank": 8, "target_rank": None}, "vera": {}, "oft": {"block_size": 8}, "ia3": {}, "full": {"sites": "mlp.down"},
    "loretta-rep": {},
}  # fmt: skip


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="nf4,int8")
    parser.add_argument("--first", type=int, default=100, help="steps in which the base learns the task")
    parser.add_argument("--steps", type=int, default=100, help="steps of each adapter")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--add", action="store_true", help="keep what the results file says of other bits and kinds")
    parser.add_argument(
        "--work", help="folder that keeps the base and the runs: what is there already is not trained again"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "merge_into_bits.json"))
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(first=2, steps=2, kinds="lora,ia3", bits="int8")
    return args


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    kept = Path(args.out)
    before: dict[str, Any] = json.loads(kept.read_text()) if args.add and kept.exists() else {}
    found: dict[str, dict[str, Any]] = before.pop("bits", {})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(args.work or place).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run = trained(folder, args)
        for bits in args.bits.split(","):
            found.setdefault(bits, {})
            for kind in args.kinds.split(","):
                target = Path(place) / f"{kind}-{bits}"
                words = ("--use", kind, "--to", str(target), "--quantize", bits, "--json")
                found[bits][kind] = one = shares(answered("merge", str(run), *words)["few_bits"])
                print(
                    f"{bits:<6}{kind:<14}gain {one['gain']:.5f}   nearest {one['nearest']:7.1%}   kept {one['kept']:7.1%}   "
                    f"divergence {one['divergences']['merged'] / one['divergences']['base']:6.1%} of the base's   {one['rounding']}",
                    flush=True,
                )
                if not args.tiny:  # a merge takes minutes, so what is there is kept
                    keep({**before, "options": vars(args), "machine": machine(args.threads), "bits": found}, args.out)


def answered(*words: str) -> Any:
    """What a command prints with --json. It runs in this process: a process of its own would begin each merge by importing torch."""
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        main_of_graft(words)
    return json.loads(said.getvalue())


def shares(report: dict[str, Any]) -> dict[str, Any]:
    """The gain of an adapter, the shares of it that each way of rounding keeps, and the divergences."""
    losses = report["losses"]
    gain = losses["base"] - losses["adapter"]
    kept = {name: (losses["base"] - losses[name]) / gain for name in ("nearest", "merged")}
    return {
        "gain": gain,
        "nearest": kept["nearest"],
        "kept": kept["merged"],
        "rounding": report["rounding"],
        "losses": losses,
        "divergences": report["divergences"],
    }


def trained(folder: Path, args: argparse.Namespace) -> Path:
    """Train the base on the task, merge, and train all kinds on it in 4 bits; the folder of their run."""
    rows = generate("train", 6000, seed=7)
    for name, some in (("first", rows[:2000]), ("further", rows[2000:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    begin = {
        "base": {"model": "seedling", "dtype": "float32"}, "data": {"train": "first.jsonl"},
        "adapter": {"kind": "lora", "rank": 16, "sites": "linear"},
        "train": {"steps": args.first, "batch_size": 32, "lr": 2e-3, "warmup": 0.05 if args.first > 20 else 0},
    }  # fmt: skip
    further = {
        "base": {"model": "base", "dtype": "float32", "quantize": "nf4"}, "data": {"train": "further.jsonl", "validation": 256},
        "train": {"steps": args.steps, "batch_size": 16, "warmup": 0.05 if args.steps > 20 else 0},
        "jobs": {
            kind: {"adapter": {"kind": kind, **KINDS[kind]}, "train": {"lr": LEARNING_RATES.get(kind, 1e-3)}}
            for kind in args.kinds.split(",")
        },
    }  # fmt: skip
    for name, settings in (("begin", begin), ("kinds", further)):
        (folder / f"{name}.json").write_text(json.dumps(settings))  # YAML reads JSON
    if not (folder / "base").exists():
        graft_command(folder, args.threads, "train", "begin.json", "--out", "runs/begin")
        graft_command(folder, args.threads, "merge", "runs/begin", "--to", "base")
    run = folder / "runs" / args.kinds.replace(",", "-")
    if run.exists():  # it may have been interrupted
        graft_command(folder, args.threads, "resume", str(run))
    else:
        graft_command(folder, args.threads, "train", "kinds.json", "--out", str(run))
    return run


if __name__ == "__main__":
    main()
