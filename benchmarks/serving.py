"""`graft serve` with many adapters against PEFT and transformers, which answer one request after another.

    python benchmarks/serving.py [--streams 1 8 64] [--adapters 16] [--tokens 32] [--rounds 2] [--repeats 2] [--threads 2] [--before SRC]
        [--tiny]

Both serve the same LoRAs (rank 8 on every linear layer, random) on the embedded base in float32 and answer the same prompts greedily
with the same number of new tokens. With S streams, S clients ask at the same time, each its next question when it has the answer to the
one before. Graft's server is a process of its own, asked over HTTP with streams by another process. PEFT runs in the process that asks,
without HTTP: `set_adapter` and `generate` for one request at a time, the others wait their turn. The tools take turns. With `--before`,
the server of another state of Graft's sources (a folder that holds the package `graft`) is a third tool.

Reported, for each number of streams: generated tokens per second, the median time to the first token, p50 and p99 of the time to the
whole answer, and the ratios of each turn.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turns import keep, machine

PROMPTS = ("What is 17 plus 25?", "Tom has 3 apples and buys 12 more. How many has he now?", "Name a number above 40.")
Answer = tuple[float, float, int]
"""Seconds to the first token, seconds to the last, tokens."""


def make_adapters(folder: Path, count: int) -> None:
    """Write the base and random LoRAs, as Graft's folders and as PEFT's."""
    import torch

    import graft
    from graft.bases import load_base
    from graft.config import BaseConfig

    base = load_base(BaseConfig(model="seedling", dtype="float32"))
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    for number in range(count):
        name = f"a{number}"
        graft.attach(base.model, {name: {"kind": "lora", "rank": 8, "sites": "linear"}})
        torch.manual_seed(number)
        with torch.no_grad():
            for _, parameter in graft.parameters(base.model, name):
                parameter.normal_(std=0.05)
        graft.save(base.model, name, folder / "graft" / name)
        graft.export(base.model, name, folder / "peft" / name, format="peft")
        graft.detach(base.model, name)


def ask_all(streams: int, rounds: int, adapters: int, ask: Callable[[str, str], Answer]) -> dict[str, Any]:
    """Let clients ask `rounds` questions each, one after another, and report times and tokens."""
    found: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def client(number: int) -> None:
        for each in range(rounds):
            found.put(ask(f"a{(number + each) % adapters}", PROMPTS[(number + each) % len(PROMPTS)]))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(streams)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    answers = [found.get() for _ in range(streams * rounds)]
    whole = sorted(last for _, last, _ in answers)
    return {
        "tokens_per_second": round(sum(tokens for _, _, tokens in answers) / seconds, 1),
        "first_token": round(statistics.median(first for first, _, _ in answers), 4),
        "p50": round(whole[len(whole) // 2], 4),
        "p99": round(whole[min(len(whole) - 1, int(len(whole) * 0.99))], 4),
    }


def by_http(url: str, tokens: int) -> Callable[[str, str], Answer]:
    """Ask a server, which streams."""
    import http.client
    from urllib.parse import urlsplit

    address = urlsplit(url)

    def ask(adapter: str, prompt: str) -> Answer:
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=600)
        body = {"model": adapter, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}}  # fmt: skip
        start, first, count = time.perf_counter(), 0.0, 0
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - start
                usage = json.loads(line[6:]).get("usage")
                count = usage["completion_tokens"] if usage else count
        connection.close()
        return first, time.perf_counter() - start, count

    return ask


def by_peft(folder: Path, tokens: int, adapters: int) -> Callable[[str, str], Answer]:
    """Ask PEFT's model, one request at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "peft" / "a0", adapter_name="a0")
    for number in range(1, adapters):
        model.load_adapter(folder / "peft" / f"a{number}", adapter_name=f"a{number}")
    model.eval()
    turn = threading.Lock()

    class First(BaseStreamer):
        """Notes when the first new token comes; the first value put is the prompt."""

        def __init__(self) -> None:
            self.values, self.at = 0, 0.0

        def put(self, value: Any) -> None:
            self.values += 1
            if self.values == 2:
                self.at = time.perf_counter()

        def end(self) -> None:
            pass

    def ask(adapter: str, prompt: str) -> Answer:
        start, first = time.perf_counter(), First()
        with turn, torch.no_grad():
            model.set_adapter(adapter)
            ids = torch.tensor([tokenizer.encode(prompt)])
            mask, pad = torch.ones_like(ids), tokenizer.eos_token_id
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=pad,
                streamer=first,
            )
        return first.at - start, time.perf_counter() - start, out.shape[1] - ids.shape[1]

    return ask


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one tool for every number of streams."""
    folder = Path(args.work)
    server = None
    if args.worker == "peft":
        import torch

        torch.set_num_threads(args.threads)
        ask = by_peft(folder, args.tokens, args.adapters)
    else:
        words = [
            "-m",
            "graft",
            "serve",
            str(folder / "base"),
            "--adapters",
            str(folder / "graft"),
            "--port",
            "0",
            "--dtype",
            "float32",
        ]
        sources = {"PYTHONPATH": str(Path(args.before).resolve())} if args.worker == "before" else {}
        server = subprocess.Popen(
            [sys.executable, *words], stderr=subprocess.PIPE, text=True, env={**os.environ, **sources}
        )
        assert server.stderr is not None
        line = next(line for line in server.stderr if " at http://" in line)
        ask = by_http(line.split(" at ")[1].strip(), args.tokens)
    ask("a0", PROMPTS[0])  # the first request of a process is not like the others
    found = {str(streams): ask_all(streams, args.rounds, args.adapters, ask) for streams in args.streams}
    if server is not None:
        server.terminate()
        server.wait(60)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of an answer")
    parser.add_argument("--rounds", type=int, default=2, help="questions of each stream")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each tool")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--before", help="sources of another Graft, whose server is measured too")
    parser.add_argument("--tiny", action="store_true", help="two streams and few tokens, to try the script")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "serving.json"))
    parser.add_argument("--worker", choices=("graft", "peft", "before"))
    parser.add_argument("--work")
    args = parser.parse_args()
    if args.tiny:
        args.streams, args.adapters, args.tokens, args.rounds, args.repeats = [1, 2], 2, 4, 1, 1
    if args.worker:
        print(json.dumps(worker(args)))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        make_adapters(Path(scratch), args.adapters)
        tools = ("graft", "peft", *(["before"] if args.before else []))
        runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
        for repeat in range(args.repeats):
            for tool in tools if repeat % 2 == 0 else tools[::-1]:
                line = [sys.executable, __file__, *sys.argv[1:], "--worker", tool, "--work", scratch]
                answer = subprocess.run(line, capture_output=True, text=True)
                if answer.returncode:
                    raise SystemExit(answer.stderr)
                runs[tool].append(json.loads(answer.stdout.splitlines()[-1]))
                print(tool, json.dumps(runs[tool][-1]), flush=True)
    ratios = {f"graft_to_{other}": ratios_of(runs["graft"], runs[other]) for other in tools[1:]}
    print(json.dumps(ratios, indent=2))
    settings = {name: getattr(args, name) for name in ("streams", "adapters", "tokens", "rounds", "repeats")}
    keep({"machine": machine(args.threads), "settings": settings, "runs": runs, **ratios}, args.out)


def ratios_of(own: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the ratios of each turn, by number of streams and by what was measured."""
    return {
        streams: {
            name: [round(one[streams][name] / other[streams][name], 3) for one, other in zip(own, others, strict=True)]
            for name in measured
        }
        for streams, measured in own[0].items()
    }


if __name__ == "__main__":
    main()
