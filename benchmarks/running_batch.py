"""Greedy answers of unlike lengths: rows that join as others leave, against batches that each run to their end.

    python benchmarks/running_batch.py [--prompts 96] [--tokens 128] [--budget 4096] [--repeats 3] [--threads 1] [--before SRC] [--tiny]

A random GPT-2 in float32 with two LoRAs answers prompts of 8 to 80 tokens, as `graft eval` and `graft predict` ask it. One of 48
tokens ends an answer, or none does (`--ends 0`): all are of one length. The ways take turns, each in a process of its
own. With `--before`, `generate` of another state of Graft's sources (a folder that holds the package `graft`) is a third way.

Reported: seconds and processor seconds of each turn, ratios to the batches that run to their end, and how many answers are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from turns import keep, machine

WAYS = ("joining", "to the end")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a batch")
    parser.add_argument("--ends", type=int, default=48, help="one of so many tokens ends an answer; 0: none does")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--before", help="sources of another Graft, which is measured too")
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "running_batch.json"))
    parser.add_argument("--way")
    args = parser.parse_args()
    if args.tiny:
        args.prompts, args.tokens, args.repeats = 6, 6, 1
    return args


def answered(args: argparse.Namespace) -> dict[str, Any]:
    """Answer all prompts in one way."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import graft
    from graft.generation.generate import generate
    from graft.generation.requests import Decoding, Request

    if args.way == "to the end":
        from graft.generation import running

        running.joinable = lambda root: False
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = (64, 2) if args.tiny else (384, 6)
    config = GPT2Config(
        n_embd=size[0], n_layer=size[1], n_head=4, n_positions=512, vocab_size=2048, initializer_range=0.2
    )
    model = GPT2LMHeadModel(config).eval()
    lora = {"kind": "lora", "rank": 8, "sites": "linear"}
    graft.attach(model, {"a": lora, "b": lora})
    with torch.no_grad():
        for name in ("a", "b"):
            for _, parameter in graft.parameters(model, name):
                parameter.normal_(std=0.05)
    draw = torch.Generator().manual_seed(1)
    stop = frozenset(range(0, 2048, args.ends)) if args.ends else frozenset()
    lengths = torch.randint(8, 81, (args.prompts,), generator=draw).tolist()
    requests = [
        Request(tuple(torch.randint(0, 2048, (length,), generator=draw).tolist()), (None, "a", "b")[number % 3], stop)
        for number, length in enumerate(lengths)
    ]
    list(generate(model, requests[:2], Decoding(4)))  # the first pass of a process is not like the others
    wall, processor = time.perf_counter(), time.process_time()
    found = dict(generate(model, requests, Decoding(args.tokens), token_budget=args.budget))
    measured = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
    return {**measured, "answers": [found[number].ids for number in range(len(requests))]}


def main() -> None:
    args = options()
    if args.way:
        print(json.dumps(answered(args)))
        return
    ways = (*WAYS, *(["before"] if args.before else []))
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for repeat in range(args.repeats):
        for way in ways if repeat % 2 == 0 else ways[::-1]:
            sources = {"PYTHONPATH": str(Path(args.before).resolve())} if way == "before" else {}
            line = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **sources})
            if done.returncode:
                raise SystemExit(done.stderr)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, {name: round(runs[way][-1][name], 2) for name in ("seconds", "processor_seconds")}, flush=True)
    answers = {way: [run.pop("answers") for run in runs[way]][0] for way in ways}
    ratios = {
        way: {
            name: [round(one[name] / other[name], 3) for one, other in zip(runs[way], runs["to the end"], strict=True)]
            for name in ("seconds", "processor_seconds")
        }
        for way in ways
    }
    same = {
        way: sum(one == other for one, other in zip(answers[way], answers["to the end"], strict=True)) for way in ways
    }
    made = sum(map(len, answers["to the end"]))
    settings = {name: getattr(args, name) for name in ("prompts", "tokens", "budget", "ends", "repeats")}
    about = {"machine": machine(args.threads), "settings": settings, "new_tokens": made, "same_answers": same}
    keep({**about, "runs": runs, "ratios_to_the_end": ratios}, args.out)
    print(json.dumps({"new_tokens": made, "same_answers": same, **ratios}, indent=1))


if __name__ == "__main__":
    main()
