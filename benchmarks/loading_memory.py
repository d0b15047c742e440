"""Host memory while a base of many shards is loaded and quantised: never more than the model plus one shard.

    python benchmarks/loading_memory.py [--tiny]

Each way of loading is a process of its own on the same files, or two processes that each keep a part of the base (fsdp2). It first loads a
tiny base in the same way, since libraries take memory when they are first used. Reported is the peak of its own memory while it loads the
large one, above what it had before (`RssAnon`: pages of the files, which the system can drop at any time, do not count), and the bytes of
what it then holds; of two processes, those of the one with more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from turns import free_port, keep, machine

BITS = ("int8", "nf4")
SAVED = "saved_"
"""A base that comes quantised: it was quantised and saved before."""
WAYS = ("plain", *BITS, *(f"{SAVED}{bits}" for bits in BITS))
PARTS = "_in_parts"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1024,6,2816,16", help="hidden size, layers, intermediate size, heads")
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


def loaded(args: argparse.Namespace, group: Any) -> dict[str, Any]:
    """Load the base in one way, and watch."""
    from graft.bases import load_model
    from graft.bases.memory import memory_report
    from graft.bases.parts import load_in_parts
    from graft.config.base import BaseConfig
    from graft.utils.bits import bitsandbytes

    way = args.worker.removesuffix(PARTS)
    quantise = way if way in BITS else None
    if way != "plain":
        bitsandbytes()

    def load(base: str) -> Any:
        settings = {"model": base, "dtype": args.dtype, "quantize": quantise, "device": "cpu"}
        config = BaseConfig.model_validate(settings)
        return load_in_parts(config, "causal", group.size).model if group.size > 1 else load_model(config)

    load(f"{args.base}/tiny")
    group.wait()
    before, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_memory())
            time.sleep(0.003)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    model = load(args.base)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {"model_bytes": memory_report(model).num_bytes, "peak_bytes": peak - before, "seconds": seconds}


def turn(args: argparse.Namespace, way: str, folder: str) -> dict[str, Any]:
    """What the process of a way, or the one of two with more memory, reports."""
    base = f"{folder}/{way.removesuffix(PARTS)}" if way.startswith(SAVED) else folder
    line = [sys.executable, __file__, "--worker", way, "--base", base, "--dtype", args.dtype]
    size, port = 2 if way.endswith(PARTS) else 1, free_port()
    meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            line, env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{way} failed")
    return max((json.loads(each.splitlines()[-1]) for each in said), key=lambda each: each["peak_bytes"])


def main() -> None:
    args = options()
    if args.worker:
        from graft.distributed.group import together

        with together() as group:
            print(json.dumps(loaded(args, group)), flush=True)
        return
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import graft.seedling
    from graft.bases import load_model
    from graft.config.base import BaseConfig

    hidden, layers, inner, heads = map(int, args.shape.split(","))
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=8192, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads
        )  # fmt: skip
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size=args.shard)
        small = LlamaConfig(
            vocab_size=8192, hidden_size=64, num_hidden_layers=1, intermediate_size=128, num_attention_heads=2
        )  # fmt: skip
        LlamaForCausalLM(small).bfloat16().save_pretrained(f"{folder}/tiny")
        shards = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
        tokenizer = AutoTokenizer.from_pretrained(str(graft.seedling.path()))
        for each in ("", "/tiny"):
            tokenizer.save_pretrained(f"{folder}{each}")
            for bits in BITS:
                settings = {"model": f"{folder}{each}", "quantize": bits, "dtype": args.dtype, "device": "cpu"}
                saved = f"{folder}/{SAVED}{bits}{each}"
                load_model(BaseConfig.model_validate(settings)).save_pretrained(saved, max_shard_size=args.shard)
                tokenizer.save_pretrained(saved)
        found = {way: turn(args, way, folder) for way in (*WAYS, *(f"{way}{PARTS}" for way in WAYS))}
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
            f"{way:15} model {each['model_bytes'] / 1e6:7.1f} MB   peak {each['peak_bytes'] / 1e6:7.1f} MB   "
            f"model and one shard {room / 1e6:7.1f} MB   {each['seconds']:.1f} s"
        )


if __name__ == "__main__":
    main()
