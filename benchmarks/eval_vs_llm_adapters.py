"""64 GSM8K questions under one adapter: the way of LLM-Adapters' evaluate.py against Graft, on the same base and prompts.

    python benchmarks/eval_vs_llm_adapters.py --base stories-260k/ --data gsm8k/test.json [--threads 2] [--new-tokens 256]

evaluate.py asks one question at a time, searches four beams, keeps no cache (so every new token costs the whole sequence) and
keeps the scores of all steps. Graft searches the same beams with a cache and in batches. Between them stands one question at a
time with a cache, which says what the cache gives and what batches give. All three take the same prompts (the protocol's own),
of which those are chosen that leave room for the answer, and must give the same answers. Reported are seconds, processor time,
new tokens per second, how many tokens went through the base, and how much of the time was spent in it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from turns import machine

import graft
from graft.bases import load_base
from graft.config.base import BaseConfig
from graft.evaluation import protocols, tasks
from graft.evaluation.protocols.llm_adapters import PROMPT
from graft.generation.generate import generate
from graft.generation.requests import Decoding, Request

BEAMS = 4
ADAPTER = {"kind": "series", "bottleneck": 16, "sites": "mlp.down"}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder or hub name of the model")
    parser.add_argument("--data", required=True, help="GSM8K: a file, or the folder of LLM-Adapters' sets")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256, help="256 is what evaluate.py has")
    parser.add_argument("--budget", type=int, default=32768, help="tokens per batch of Graft, beams counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "eval_vs_llm_adapters.json"))
    return parser.parse_args()


class Watch:
    """Counts what goes through the base: forward passes, tokens, seconds."""

    def __init__(self, model: nn.Module) -> None:
        self.calls, self.tokens, self.seconds, self.began = 0, 0, 0.0, 0.0
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after)

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self.tokens += kwargs["input_ids"].numel()
        self.began = time.perf_counter()

    def _after(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.began

    def measure(self, work: Callable[[], list[tuple[int, ...]]]) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
        self.calls, self.tokens, self.seconds = 0, 0, 0.0
        before, start = os.times(), time.perf_counter()
        answers = work()
        seconds, after = time.perf_counter() - start, os.times()
        made = sum(map(len, answers))
        return answers, {
            "seconds": seconds,
            "processor_seconds": after.user + after.system - before.user - before.system,
            "new_tokens": made,
            "new_tokens_per_second": made / seconds,
            "forward_passes": self.calls,
            "tokens_through_the_base": self.tokens,
            "share_of_time_in_the_base": self.seconds / seconds,
        }


def one_at_a_time(model: Any, requests: list[Request], new_tokens: int, *, cache: bool) -> list[tuple[int, ...]]:
    """As evaluate.py does (cache=False): its temperature, top-p and top-k have no effect, since sampling is off."""
    found = []
    stop = sorted(requests[0].stop_ids)
    config = GenerationConfig(
        num_beams=BEAMS, do_sample=False, max_new_tokens=new_tokens, eos_token_id=stop, pad_token_id=stop[0], use_cache=cache,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for request in requests:
        ids = torch.tensor([request.ids])
        with torch.no_grad(), graft.use(model, request.adapter):
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        row = out.sequences[0, len(request.ids) :].tolist()
        end = next((at for at, token in enumerate(row) if token in request.stop_ids), len(row))
        found.append(tuple(row[:end]))
    return found


def batched(model: Any, requests: list[Request], new_tokens: int, budget: int) -> list[tuple[int, ...]]:
    answers = dict(generate(model, requests, Decoding(new_tokens, BEAMS), token_budget=budget))
    return [answers[number].ids for number in range(len(requests))]


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    base = load_base(BaseConfig(model=args.base, device="cpu", dtype="float32"))
    model: Any = base.model
    graft.attach(model, {"math": ADAPTER})
    torch.manual_seed(0)
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "math"):
            parameter.normal_(std=0.1)
    model.eval()
    task = tasks.get("gsm8k")
    protocol = protocols.get("llm-adapters", task)
    stop = frozenset(PROMPT.stop_ids(base.tokenizer))
    records = task.load(args.data)
    prompts = [tuple(PROMPT.prompt_ids(protocol.messages(record), base.tokenizer)) for record in records]  # pyright: ignore
    room = getattr(model.config, "max_position_embeddings", 10**9) - args.new_tokens
    requests = [Request(ids, "math", stop) for ids in prompts if len(ids) <= room][: args.prompts]
    watch = Watch(model)
    batched(model, requests[:2], 4, args.budget)  # the first pass of a process is slow whoever makes it
    ways = {
        "graft": lambda: batched(model, requests, args.new_tokens, args.budget),
        "one at a time, cached": lambda: one_at_a_time(model, requests, args.new_tokens, cache=True),
        "one at a time, no cache (evaluate.py)": lambda: one_at_a_time(model, requests, args.new_tokens, cache=False),
    }
    answers, measured = {}, {}
    for name, way in ways.items():
        answers[name], measured[name] = watch.measure(way)
        print(f"{name}: {measured[name]['seconds']:.1f} s, {measured[name]['new_tokens_per_second']:.1f} new tokens/s")
    ours, theirs = answers["graft"], answers["one at a time, no cache (evaluate.py)"]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    original = measured["one at a time, no cache (evaluate.py)"]
    result = {
        "machine": machine(args.threads),
        "base": Path(args.base).name,
        "adapter": ADAPTER,
        "prompts": len(requests),
        "prompt_tokens": [min(len(r.ids) for r in requests), max(len(r.ids) for r in requests)],
        "new_tokens": args.new_tokens,
        "beams": BEAMS,
        "same_answers": same,
        "ratio": original["seconds"] / measured["graft"]["seconds"],
        "processor_ratio": original["processor_seconds"] / measured["graft"]["processor_seconds"],
        "ways": measured,
    }
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    print(f"{same} of {len(requests)} answers are the same; Graft is {result['ratio']:.1f} times as fast")


if __name__ == "__main__":
    main()
