"""The price of an answer: 64 trials (kind, rank, learning rate) by a study, against PEFT with transformers.Trainer, one after another.

    python benchmarks/study_vs_peft.py [--steps 12] [--batch 4] [--work FOLDER] [--only WAY] [--tiny]

Both train LoRA and DoRA on word problems on the embedded base, and rank the trials by the loss on the same validation rows. Each way is a
process of its own, so that loading is counted; seconds and processor seconds are of whole processes. The ways take apart where the
time goes:

    peft         PEFT and the Trainer: the base is loaded for each trial
    one by one   Graft, each trial a run of its own: what the Trainer costs beside Graft's step
    padded       Graft, joint runs, padded batches: the joint pass, and loading once per joint run
    joint        the same with flat batches
    study        the same with successive halving

With --work and --only, one way is measured at a time, and the result is written once all are there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from turns import keep, machine

WAYS = ("peft", "one by one", "padded", "joint", "study")
KINDS, RANKS = ("lora", "dora"), (2, 4, 8, 16)
RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def points(args: argparse.Namespace) -> list[tuple[str, int, float]]:
    kinds, ranks, rates = (KINDS[:1], RANKS[:2], RATES[1::4]) if args.tiny else (KINDS, RANKS, RATES)
    return [(kind, rank, rate) for kind in kinds for rank in ranks for rate in rates]


def write_data(work: Path, args: argparse.Namespace) -> None:
    from graft.quickstart.problems import generate

    for name, count in (("train", 50 * args.batch), ("heldout", args.validation)):
        rows = [{"instruction": row["instruction"], "output": row["output"]} for row in generate(name, count)]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def study(work: Path, args: argparse.Namespace, way: str) -> list[float]:
    """The validation loss of each trial. One that was ended early has the loss of its rung, plus one per rung that it missed."""
    from graft.study.folder import begin
    from graft.study.points import points_of

    train = {
        "steps": args.steps,
        "batch_size": args.batch,
        "schedule": "cosine",
        "layout": "padded" if way == "padded" else "auto",
    }
    rungs = sorted({max(1, args.steps // 6), max(2, args.steps // 3), max(3, 2 * args.steps // 3)} - {args.steps})
    given = {
        "run": {
            "base": {"model": "seedling", "dtype": "float32", "device": "cpu"},
            "adapter": {"kind": "lora"},
            "data": {
                "train": str(work / "train.jsonl"), "validation": str(work / "heldout.jsonl"), "template": "chat",
                "max_length": 128,
            },
            "train": {**train, "validate_every": args.steps},
        },
        "list": [
            {"adapter": {"kind": kind, "rank": rank, "alpha": 2 * rank, "sites": "attn.q attn.v"}, "train.lr": rate}
            for kind, rank, rate in points(args)
        ],
        "together": 1 if way == "one by one" else 64,
        **({"pruner": {"kind": "halving", "rungs": rungs, "keep": 0.34}} if way == "study" else {}),
    }  # fmt: skip
    out = work / way.replace(" ", "-")
    runner = begin(given, (), out, resume=False, say=lambda text: None)
    runner.run()
    known = {json.dumps(each.settings, sort_keys=True): each.result or {} for each in runner.store.trials("done")}
    results = [known[json.dumps(each, sort_keys=True)] for each in points_of(runner.study)]
    missed = [sum(rung > each["steps"] for rung in (*rungs, args.steps)) if way == "study" else 0 for each in results]
    return [each["validation_loss"] + late for each, late in zip(results, missed, strict=True)]


def peft(work: Path, args: argparse.Namespace) -> list[float]:
    """The validation loss of each trial by PEFT and the Trainer, on the tokens that Graft trains on."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    import graft.seedling
    from graft.bases import load_tokenizer
    from graft.config import BaseConfig, DataConfig
    from graft.data.preparing import prepare

    data = DataConfig(
        train=str(work / "train.jsonl"), validation=str(work / "heldout.jsonl"), template="chat", max_length=128
    )
    made = prepare(data, load_tokenizer(BaseConfig(model="seedling")), work / "cache")

    def rows(part: Any) -> list[dict[str, Any]]:
        return [{"ids": example.input_ids.tolist(), "learnt": example.supervised.tolist()} for example in part]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(each["ids"]) for each in batch)
        ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
        mask = torch.zeros_like(ids)
        for at, each in enumerate(batch):
            own, size = torch.tensor(each["ids"]), len(each["ids"])
            ids[at, :size], mask[at, :size] = own, 1
            labels[at, :size] = torch.where(torch.tensor(each["learnt"]), own, -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    losses = []
    for kind, rank, rate in points(args):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(graft.seedling.path(), dtype=torch.float32)
        settings = {
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": ["q_proj", "v_proj"],
            "use_dora": kind == "dora",
        }
        wrapped: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        arguments = TrainingArguments(
            str(work / "trainer"), per_device_train_batch_size=args.batch, per_device_eval_batch_size=32, max_steps=args.steps,
            learning_rate=rate, lr_scheduler_type="cosine", weight_decay=0.0, max_grad_norm=1.0, use_cpu=True, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, seed=0,
        )  # fmt: skip
        trainer = Trainer(wrapped, arguments, collate, rows(made.train), rows(made.validation))
        trainer.train()
        losses.append(float(trainer.evaluate()["eval_loss"]))
    return losses


def worker(work: Path, args: argparse.Namespace, way: str) -> None:
    import torch

    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    losses = peft(work, args) if way == "peft" else study(work, args, way)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = {
        "losses": losses,
        "seconds": time.perf_counter() - started,
        "processor_seconds": sum(each.ru_utime + each.ru_stime for each in used),
        "peak_bytes": used[0].ru_maxrss * 1024,
    }
    (work / f"{way}.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--validation", type=int, default=24, help="validation rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", help="folder that keeps what was measured")
    parser.add_argument("--only", choices=WAYS, help="measure one way, and stop")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "study_vs_peft.json"))
    args = parser.parse_args()
    if args.tiny:
        args.steps = 8
    if args.worker:
        worker(Path(args.work), args, args.worker)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch)
        work.mkdir(parents=True, exist_ok=True)
        write_data(work, args)
        for way in [args.only] if args.only else WAYS:
            given = [word for word in sys.argv[1:] if word not in ("--only", way)]
            started = time.perf_counter()
            subprocess.run([sys.executable, __file__, *given, "--worker", way, "--work", str(work)], check=True)
            print(f"{way}: {time.perf_counter() - started:.0f} s", flush=True)
        if all((work / f"{way}.json").exists() for way in WAYS):
            finish(work, args)


def finish(work: Path, args: argparse.Namespace) -> None:
    from scipy.stats import spearmanr

    runs = {way: json.loads((work / f"{way}.json").read_text()) for way in WAYS}
    names = ["{} {} {:g}".format(*each) for each in points(args)]
    theirs = runs["peft"]["losses"]
    winners = {way: names[min(range(len(names)), key=lambda at, way=way: runs[way]["losses"][at])] for way in WAYS}
    cost = {way: runs[way]["processor_seconds"] for way in WAYS}
    result = {
        "machine": machine(args.threads),
        "trials": len(names),
        "steps": args.steps,
        "batch": args.batch,
        "winners": winners,
        "same_winner": winners["study"] == winners["peft"],
        "spearman_with_peft": {way: float(spearmanr(theirs, runs[way]["losses"]).statistic) for way in WAYS[1:]},
        "time": {way: runs[way]["seconds"] for way in WAYS},
        "processor_seconds": cost,
        "share_of_peft": {way: cost[way] / cost["peft"] for way in WAYS},
        "factors": {
            "step and Trainer": cost["peft"] / cost["one by one"],
            "joint pass and loading once": cost["one by one"] / cost["padded"],
            "flat batches": cost["padded"] / cost["joint"],
            "halving": cost["joint"] / cost["study"],
        },
        "peak_bytes": {way: runs[way]["peak_bytes"] for way in WAYS},
        "losses": {name: {way: runs[way]["losses"][at] for way in WAYS} for at, name in enumerate(names)},
    }
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=2))
    keep(result, args.out)


if __name__ == "__main__":
    main()
