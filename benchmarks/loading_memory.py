"""Host memory while a base of many shards is loaded and quantised: never more than the model plus one shard.

    python benchmarks/loading_memory.py [--tiny]

Each way of loading is a process of its own on the same files. It first loads a tiny base in the same way, since libraries take memory when
they are first used. Reported is the peak of its own memory while it loads the large one, above what it had before (`RssAnon`: pages of the
files, which the system can drop at any time, do not count), and the bytes of the loaded model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from turns import keep, machine

WAYS = (None, "int8", "nf4")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1024,16,2816,16", help="hidden size, layers, intermediate size, heads")
    parser.add_argument("--shard", default="40MB", help="size of a file")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tiny", action="store_true", help="a base that only proves that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "loading_memory.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.shard = "64,2,128,4", "100KB"
    return args


def own_memory() -> int:
    """Bytes of this process that belong to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell a process's own memory (RssAnon in /proc/self/status)")


def loaded(args: argparse.Namespace) -> dict[str, Any]:
    """Load the base in one way, and watch."""
    from graft.bases import load_model
    from graft.bases.memory import memory_report
    from graft.config.base import BaseConfig
    from graft.utils.bits import bitsandbytes

    quantize = None if args.worker == "plain" else args.worker
    if quantize is not None:
        bitsandbytes()
    settings = {"model": args.base, "dtype": args.dtype, "quantize": quantize, "device": "cpu"}
    load_model(BaseConfig.model_validate({**settings, "model": f"{args.base}/tiny"}))
    before, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_memory())
            time.sleep(0.003)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    model = load_model(BaseConfig.model_validate(settings))
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {"model_bytes": memory_report(model).num_bytes, "peak_bytes": peak - before, "seconds": seconds}


def main() -> None:
    args = options()
    if args.worker:
        print(json.dumps(loaded(args)))
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, inner, heads = map(int, args.shape.split(","))
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=4096, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads
        )  # fmt: skip
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size=args.shard)
        small = LlamaConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=1, intermediate_size=128, num_attention_heads=2
        )  # fmt: skip
        LlamaForCausalLM(small).bfloat16().save_pretrained(f"{folder}/tiny")
        shards = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
        found = {}
        for way in WAYS:
            line = [sys.executable, __file__, "--worker", way or "plain", "--base", folder, "--dtype", args.dtype]
            said = subprocess.run(line, check=True, capture_output=True, text=True).stdout
            found[way or "plain"] = json.loads(said.splitlines()[-1])
    result = {
        "shards": len(shards),
        "file_bytes": sum(shards),
        "largest_shard": max(shards),
        "ways": found,
        "machine": machine(0),
    }
    keep(result, args.out)
    for way, each in found.items():
        room = each["model_bytes"] + max(shards)
        print(
            f"{way:6} model {each['model_bytes'] / 1e6:7.1f} MB   peak {each['peak_bytes'] / 1e6:7.1f} MB   "
            f"model and one shard {room / 1e6:7.1f} MB   {each['seconds']:.1f} s"
        )


if __name__ == "__main__":
    main()
