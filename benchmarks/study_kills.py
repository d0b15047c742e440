"""A study of many tiny trials, some of which fail, killed at random instants: no trial is lost or run twice, and the ranking is the same.

    python benchmarks/study_kills.py [--trials 200] [--kills 20] [--work FOLDER] [--tiny]

The base is a random LLaMA of two layers. Some trials name data that do not exist, some have learning rates that end in NaN. The study runs
once undisturbed, and once in processes that are killed (SIGKILL) and started again with --resume: each kill falls at a random moment after
its share of the trials is over, so that they are spread over the study. Compared are states, errors, losses and ranking.

With --work, an undisturbed study that the folder already holds is not run again, and kills that it counts are not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from turns import keep, machine


def make(folder: Path, trials: int, together: int) -> Path:
    """Write a base, data and the study."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: at for at, letter in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder / "base"
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(vocab_size=258, bos_token_id=0, eos_token_id=1, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(5) for b in range(5)]
    for name, part in (("train", rows[:20]), ("validation", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    variants: list[dict[str, Any]] = []
    for at in range(trials):
        variant: dict[str, Any] = {"train.lr": round(1e-4 * (1 + at), 6)}
        if at % 40 == 7:
            variant["data.train"] = str(folder / "nowhere.jsonl")
        if at % 40 == 23:
            variant |= {"train.lr": 1e30 + at * 1e24, "train.clip": None}
        variants.append(variant)
    study = {
        "run": {
            "base": {"model": str(folder / "base"), "device": "cpu", "dtype": "float32"},
            "adapter": {"kind": "lora", "rank": 2, "sites": "attn.q"},
            "data": {
                "train": str(folder / "train.jsonl"),
                "validation": str(folder / "validation.jsonl"),
                "template": "plain",
            },
            "train": {"steps": 3, "batch_size": 4, "save_every": 1},
        },
        "list": variants,
        "together": together,
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(study))
    return path


def command(study: Path, out: Path, resume: bool) -> list[str]:
    return [sys.executable, "-m", "graft", "study", str(study), "--out", str(out), *(["--resume"] if resume else [])]


def over(out: Path) -> int:
    """How many trials have ended."""
    if not (out / "study.sqlite").exists():
        return 0
    with closing(sqlite3.connect(out / "study.sqlite", timeout=60)) as store:
        there = store.execute("select count(*) from sqlite_master where name = 'trials'").fetchone()[0]
        ended = "select count(*) from trials where state in ('done', 'failed')"
        return store.execute(ended).fetchone()[0] if there else 0


def kill_again_and_again(folder: Path, out: Path, args: argparse.Namespace, seconds: float) -> list[int]:
    """Run the study in processes that are killed, and then to its end. How many trials were over at each kill, which a file keeps."""
    study, kept = folder / "study.yaml", folder / "kills.json"
    kills: list[int] = json.loads(kept.read_text()) if kept.exists() else []
    for kill in range(len(kills), args.kills):
        process = subprocess.Popen(
            command(study, out, (out / "study.sqlite").exists()), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        share = int(0.85 * args.trials * kill / args.kills)
        while over(out) < share and process.poll() is None:
            time.sleep(0.05)
        time.sleep(random.Random(kill).uniform(0.1, seconds / args.kills))
        if process.poll() is not None:
            raise SystemExit(f"the study ended before kill {kill + 1}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills.append(over(out))
        kept.write_text(json.dumps(kills))
        print(f"kill {kill + 1}: {kills[-1]} trials over", flush=True)
    subprocess.run(command(study, out, (out / "study.sqlite").exists()), check=True, capture_output=True)
    return kills


def outcome(out: Path) -> list[Any]:
    """Each trial's settings, state, and losses."""
    rows = sqlite3.connect(out / "study.sqlite").execute(
        "select p.settings, t.seed, t.state, t.result, t.error from trials t join points p on p.id = t.point order by t.id"
    )
    keys = ("loss", "validation_loss", "curve", "validations")
    return [
        [settings, seed, state, None if result is None else [json.loads(result)[key] for key in keys], bool(error)]
        for settings, seed, state, result, error in rows
    ]


def ranking(out: Path) -> list[str]:
    return [row["setting"] for row in json.loads((out / "report.json").read_text())["ranking"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--together", type=int, default=20)
    parser.add_argument("--work", help="folder that keeps both studies")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "study_kills.json"))
    args = parser.parse_args()
    if args.tiny:
        args.trials, args.kills, args.together = 24, 4, 6
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.work or scratch)
        whole, killed = folder / "whole", folder / "killed"
        if not (whole / "report.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            study = make(folder, args.trials, args.together)
            subprocess.run(command(study, whole, False), check=True, capture_output=True)
        seconds = (whole / "report.json").stat().st_mtime - (whole / "study.json").stat().st_mtime
        kills = kill_again_and_again(folder, killed, args, seconds)
        first, second = outcome(whole), outcome(killed)
        result = {
            "machine": machine(1),
            "trials": args.trials,
            "kills": len(kills),
            "trials_over_at_each_kill": kills,
            "states": {
                state: sum(each[2] == state for each in second) for state in sorted({each[2] for each in second})
            },
            "same_outcomes": first == second,
            "same_ranking": ranking(whole) == ranking(killed),
            "seconds_undisturbed": seconds,
        }
    print(json.dumps(result, indent=2))
    keep(result, args.out)
    if not (result["same_outcomes"] and result["same_ranking"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
