"""Does AdaMix write better than its plain LoRA? E2E NLG on a small causal base, by BLEU, as jobs of joint runs.

    python benchmarks/e2e_generation.py --data e2e_nlg/ --base stories-260k/ [--rows 2000] [--steps 150] [--work FOLDER] [--tiny]

The base and the test file are whatever the options say; the base learns to turn facts about a restaurant into a sentence. In a first joint
run each way has one seed at each learning rate. In a second one each trains at its best rate, by the loss on rows of devset.csv, with every
seed, and writes a sentence for each of the first meanings of testset_w_refs.csv under the protocol `bleu` (sacrebleu, grouped references,
10 beams). `adamix-100` has eight experts of the same LoRA with B shared, and the consistency loss of the paper with its weight of 100; the
others have smaller weights. What they save is as large as `lora`. Seeds draw the initial weights, the experts and the order of the rows.

With --work, runs that were interrupted go on.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from turns import keep, machine

from graft.config import EvalConfig, load_run
from graft.data.file_readers import read_rows
from graft.evaluation.evaluating import evaluate_tasks
from graft.generation.loaded import load_candidates
from graft.runs.contents import is_run
from graft.runs.folder import RunFolder
from graft.training import resume, train

LORA: dict[str, Any] = {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.1, "sites": "linear"}
EXPERTS: dict[str, Any] = {"kind": "mixture", "of": LORA, "experts": 8, "share": "up"}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": LORA},
    **{
        f"adamix-{weight}": {"adapter": EXPERTS, "objective": {"kind": "consistency", "weight": float(weight)}}
        for weight in (100, 10, 1)
    },
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of E2E NLG: trainset.csv, devset.csv, testset_w_refs.csv"
    )
    parser.add_argument("--base", required=True, help="a causal model")
    parser.add_argument("--rows", type=int, default=2000, help="training rows")
    parser.add_argument("--validation", type=int, default=64)
    parser.add_argument("--meanings", type=int, default=60, help="of the test set")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", help="folder that keeps both runs")
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "e2e_generation.json"))
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(rows=16, validation=4, meanings=2, steps=3, batch=2, seeds=2)
    return args


def trained(folder: Path, args: argparse.Namespace, jobs: dict[str, dict[str, Any]], steps: int) -> RunFolder:
    """Train all jobs together, or go on where they were."""
    if is_run(folder):
        return finished(resume(RunFolder(folder), quiet=True))
    config = {
        "base": {"model": args.base, "device": "cpu", "dtype": "float32"},
        "data": {
            "train": str(folder.parent / "train.jsonl"), "validation": str(folder.parent / "validation.jsonl"), "template": "plain",
            "max_length": 256, "overlong": "drop", "cache": False,
        },
        "train": {
            "steps": steps, "batch_size": args.batch, "schedule": "linear", "warmup": 0.05, "validate_every": steps, "save_every": 100,
        },
        "jobs": jobs,
    }  # fmt: skip
    return finished(train(load_run(config), folder, quiet=True))


def finished(run: RunFolder) -> RunFolder:
    if run.read_status().get("state") == "stopped":
        raise SystemExit("stopped: start again with the same --work to go on")
    return run


def job(way: str, rate: float, seed: int) -> dict[str, Any]:
    objective = {"objective": WAYS[way]["objective"]} if "objective" in WAYS[way] else {}
    return {"adapter": WAYS[way]["adapter"], "train": {"lr": rate, "seed": seed, **objective}}


def losses(run: RunFolder) -> dict[str, float]:
    """The last validation loss of each job."""
    return {line["job"]: line["validation_loss"] for line in run.metrics.read() if "validation_loss" in line}


def written(run: RunFolder, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """BLEU of each job."""
    loaded = load_candidates(run)
    settings = EvalConfig(limit=args.meanings)
    (task,) = evaluate_tasks(
        loaded, "e2e", "bleu", args.data / "testset_w_refs.csv", run.path / "eval", settings=settings
    )["tasks"]
    return {each["name"]: each for each in task["results"]}


def main() -> None:
    args = options()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.work or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name, source, count in (
            ("train", "trainset.csv", args.rows),
            ("validation", "devset.csv", args.validation),
        ):
            rows = [{"prompt": row["mr"], "completion": row["ref"]} for row in read_rows(args.data / source)]
            chosen = random.Random(0).sample(rows, count)
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        tried = {f"{way}-{number}": job(way, rate, 100) for way in WAYS for number, rate in enumerate(RATES)}
        tuned = losses(trained(folder / "tuned", args, tried, args.steps))
        by_rate = {way: {rate: tuned[f"{way}-{number}"] for number, rate in enumerate(RATES)} for way in WAYS}
        best = {way: min(of, key=of.__getitem__) for way, of in by_rate.items()}
        jobs = {f"{way}-{seed}": job(way, best[way], seed) for way in WAYS for seed in range(args.seeds)}
        run = trained(folder / "judged", args, jobs, args.steps)
        loss, scores = losses(run), written(run, args)
    found = {}
    for way in WAYS:
        names = [f"{way}-{seed}" for seed in range(args.seeds)]
        bleu = [scores[name]["bleu"] for name in names]
        found[way] = {
            "lr": best[way], "bleu": fmean(bleu), "deviation": stdev(bleu), "by_seed": bleu,
            "validation_loss": fmean(loss[name] for name in names), "tried": {str(rate): value for rate, value in by_rate[way].items()},
        }  # fmt: skip
    base = {"base": scores["base"]["bleu"]} if "base" in scores else {}
    shown = ("rows", "validation", "meanings", "steps", "batch", "seeds")
    settings = {key: getattr(args, key) for key in shown}
    keep({"machine": machine(0), "model": Path(args.base).name, "settings": settings, **base, "ways": found}, args.out)
    for way, each in found.items():
        print(
            f"{way:<11} lr {each['lr']:g}  BLEU {each['bleu']:.1f} ± {each['deviation']:.1f}  loss {each['validation_loss']:.3f}"
        )


if __name__ == "__main__":
    main()
