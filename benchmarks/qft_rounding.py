"""QFT on a toy: how rounding decides whether 8-bit weights learn. Lion in float32 beside QFT with stochastic and with nearest rounding.

A random LLaMA of two layers learns a Markov chain. The step of a weight's grid is about 4e-4, so at a learning rate of 2e-5 an update is a
twentieth of a step. Each method sees the same batches from the same initial weights.

    python benchmarks/qft_rounding.py --out benchmarks/results/qft_rounding.json
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from graft.config import load_run
from graft.runs.folder import RunFolder
from graft.training import train

VOCABULARY, WIDTH, LAYERS, LENGTH = 64, 192, 2, 48
METHODS: dict[str, Any] = {
    "lion, float32": {"method": "full", "optimizer": "lion"},
    "qft, stochastic": {"method": "qft"},
    "qft, nearest": {"method": {"kind": "qft", "rounding": "nearest"}},
    "qft, stochastic, no outliers": {"method": {"kind": "qft", "outliers": 0.0}},
}


def toy(folder: Path) -> None:
    """Write a random base, its tokenizer of numbers, and samples of a Markov chain with four likely successors per token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w3"
    ).save_pretrained(folder / "base")
    random = np.random.default_rng(0)
    likely = random.integers(4, VOCABULARY, (VOCABULARY, 4))
    rows = []
    for _ in range(2048):
        token, written = int(random.integers(4, VOCABULARY)), []
        for _ in range(LENGTH):
            written.append(f"w{token}")
            token = int(likely[token, random.choice(4, p=[0.7, 0.15, 0.1, 0.05])])
        rows.append({"text": " ".join(written)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(folder: Path, name: str, lr: float, steps: int) -> dict[str, Any]:
    """Train with one method; its loss at the start, and the mean over the last tenth of the steps."""
    run = {
        "base": {"model": str(folder / "base"), "device": "cpu", "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "template": "plain", "cache": False},
        "train": {**METHODS[name], "lr": lr, "steps": steps, "batch_size": 16, "schedule": "constant", "save_every": 10 * steps, "seed": 0},
    }  # fmt: skip
    out = folder / f"{name}-{lr}".replace(" ", "")
    started = time.perf_counter()
    train(load_run(run), out, quiet=True)
    losses = [line["loss"] for line in RunFolder(out).metrics.read() if "loss" in line]
    seconds = time.perf_counter() - started
    last = losses[-max(1, steps // 10) :]
    return {"start": losses[0], "end": sum(last) / len(last), "seconds": round(seconds, 1)}


def main() -> None:
    """Run all methods at all rates, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 1e-4])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        toy(Path(scratch))
        for lr in args.rates:
            found[f"{lr:g}"] = {name: measure(Path(scratch), name, lr, args.steps) for name in METHODS}
            for name, each in found[f"{lr:g}"].items():
                print(f"lr {lr:g}  {name:30s} {each['start']:.3f} -> {each['end']:.3f}  ({each['seconds']} s)")
    if args.out is not None:
        about = {"steps": args.steps, "torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({"about": about, "rates": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
