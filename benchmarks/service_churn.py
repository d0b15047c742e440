"""Many small jobs through a few slots of a training service: whether memory and waiting times stay where they are.

    python benchmarks/service_churn.py [--jobs 10000] [--slots 8] [--parts 10] [--tiny]

A client of each slot makes a model, takes two steps, and ends its session, again and again: LoRAs of ranks 1 to 8, with the head, and
(IA)3 on a small random GPT-2. There is no HTTP, so what is measured is the service: promises on the disk, groups, passes, snapshots,
attaching and detaching. What is over is forgotten after a second, in place of an hour. Reported for each tenth of the jobs: resident
memory at its end, and the median and the 99th percentile of the time from a request to its result.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from turns import keep, machine

from graft.serving.tinker import sessions
from graft.serving.tinker.bodies import SessionBody
from graft.serving.tinker.effects import Effects
from graft.serving.tinker.messages import ForwardBackwardRequest
from graft.serving.tinker.places import Places, model_id
from graft.serving.tinker.service import Service
from graft.serving.tinker.sessions import Sessions
from graft.training.session import Session
from graft.utils.allocator import give_back_free

TINY = {"jobs": 24, "slots": 3, "parts": 3}
STEPS = 2


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--parts", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "service_churn.json"))
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    return args


class NoSamplers:
    """Nobody samples here."""

    def drop(self, owner: str) -> None:
        pass


def small_base() -> Any:
    torch.manual_seed(0)
    sizes = {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def body_of(model: str, seq: int, draw: np.random.Generator) -> bytes:
    """A forward_backward request of two short samples."""
    found = ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn="cross_entropy")
    for length in draw.integers(8, 24, 2):
        ids = draw.integers(0, 512, length)
        datum = found.data.add()
        datum.model_input.add().encoded_text.tokens = ids.astype("<i4").tobytes()
        tensor = datum.loss_fn_inputs["target_tokens"]
        tensor.dense, tensor.dtype = np.roll(ids, -1).astype("<i8").tobytes(), 2
        tensor.shape.extend([int(length)])
    return found.SerializeToString()


class Churn:
    """The jobs, the slots that do them, and how long each request took."""

    def __init__(self, service: Service, sessions_: Sessions, jobs: int) -> None:
        self.service, self.sessions, self.jobs = service, sessions_, iter(range(jobs))
        self.seconds: list[float] = []
        self.done = 0

    async def ask(self, kind: str, model: str, seq: int, content: bytes) -> None:
        begun = time.perf_counter()
        promise, _ = await self.service.promise(kind, ("model", model, seq), model, seq, content, content)
        result = await self.service.result(promise.id, 600)
        assert result is not None and b'"error"' not in result.body, result
        self.seconds.append(time.perf_counter() - begun)

    async def slot(self) -> None:
        for job in self.jobs:
            draw = np.random.default_rng(job)
            session = await self.sessions.begin(SessionBody(sdk_version="0"))
            model = model_id(session, 0)
            lora = {"rank": 1 + job % 8, "seed": job}
            labels = {"graft.adapter": {"kind": "ia3"}} if job % 4 == 3 else None
            made = {"session_id": session, "model_seq_id": 0, "base_model": "base", "lora_config": lora}
            await self.ask("create_model", model, 0, json.dumps({**made, "user_metadata": labels}).encode())
            for step in range(STEPS):
                await self.ask("forward_backward", model, 2 * step + 1, body_of(model, 2 * step + 1, draw))
                asked = {"model_id": model, "seq_id": 2 * step + 2}
                await self.ask("optim_step", model, 2 * step + 2, json.dumps(asked).encode())
            await self.sessions.finish(session)
            self.done += 1


def resident() -> int:
    """Resident memory of this process in bytes, after what is free was given back."""
    gc.collect()
    give_back_free()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def run(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    sessions.KEPT, sessions.LOOK = 1.0, 0.5
    engine = ThreadPoolExecutor(1)

    async def call(function: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(engine, function)

    places = Places(folder)
    service = Service(Effects(Session(small_base()), places, ["base"]), call, places, {"base": "small"})
    await service.start()
    looking = Sessions(service, NoSamplers())  # pyright: ignore[reportArgumentType]
    await looking.start()
    churn = Churn(service, looking, args.jobs)
    slots = [asyncio.create_task(churn.slot()) for _ in range(args.slots)]
    parts, begun = [], time.perf_counter()
    for part in range(args.parts):
        while churn.done < args.jobs * (part + 1) // args.parts:
            await asyncio.sleep(0.05)
            for slot in slots:
                if slot.done():
                    slot.result()
        milliseconds = np.array(churn.seconds) * 1000
        churn.seconds = []
        parts.append(
            {
                "jobs": churn.done,
                "resident_mb": resident() / 2**20,
                "p50_ms": float(np.percentile(milliseconds, 50)),
                "p99_ms": float(np.percentile(milliseconds, 99)),
                "seconds": time.perf_counter() - begun,
                "records": len(service.books.session) + len(service.books.model),
            }
        )
        print({key: round(value, 1) for key, value in parts[-1].items()}, flush=True)
    await asyncio.gather(*slots)
    looking.stop()
    await service.stop()
    return parts


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        parts = asyncio.run(run(args, Path(folder)))
    first, last = parts[min(1, len(parts) - 1)], parts[-1]  # the first part warms up
    result = {
        "machine": machine(1),
        "options": {name: value for name, value in vars(args).items() if name != "out"},
        "parts": parts,
        "memory_last_to_second": last["resident_mb"] / first["resident_mb"],
        "p99_last_to_second": last["p99_ms"] / first["p99_ms"],
    }
    keep(result, args.out)


if __name__ == "__main__":
    main()
