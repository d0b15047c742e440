"""Activation memory and time of a training step by depth: full fine-tuning, LoRA, LoRA with recomputation, and MEFT.

    python benchmarks/reversible_memory.py [--layers 4,8,12,24,48] [--hidden 256] [--rows 4] [--length 128] [--tiny]

The base is a LLaMA with random weights in float32, and the loss is a sum over its last hidden states, so that the head (which is the same
for all) does not count. Counted are the bytes of all tensors that are alive, without the base, the adapters and the gradients of
parameters: `held` at the end of the forward pass, `peak` at any time of the step. A block's own activations, which the backward pass of
MEFT makes again, are a part of the peak. Time is the median processor time of whole steps without counting.

Legend: B rows, L length, D hidden size.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from turns import keep, machine

import graft
from graft.training.forward.activations import holding
from graft.training.forward.modes import set_training

TINY = {"layers": "2,4", "hidden": 32, "length": 8, "repeats": 1}
LORA = {"kind": "lora", "rank": 8, "sites": "linear"}
ANCHORS = {"": 3, "_anchors_12": 12, "_no_anchors": None}
"""What the name of a method ends with -> `anchor_every`."""
METHODS = (
    "full", "lora", "lora_recomputed", "meft1", "meft2", "meft3", "meft1_anchors_12", "meft1_no_anchors", "lora_on_meft1",
)  # fmt: skip


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,8,12,24,48", help="depths")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "reversible_memory.json"))
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    return args


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, until their storage is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.gradients = 0
        """The bytes of gradients of parameters, which do not count."""
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self._note(each)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now - self.gradients)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor that is there already."""
        self._known.add(tensor.untyped_storage()._cdata)


@dataclass
class Setting:
    """A model to train with one method, and what a step needs."""

    model: Any
    parameters: list[Tensor]
    recomputes: bool = False


def setting(method: str, args: argparse.Namespace, layers: int) -> Setting:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": args.hidden * 11 // 4, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=1000, num_attention_heads=4, num_key_value_heads=4, **sizes)
    model: Any = LlamaModel(config).eval()
    if method == "full":
        return Setting(model, list(model.parameters()))
    ending = next(each for each in reversed(ANCHORS) if method.endswith(each))
    variant: Any = method.removeprefix("lora_on_").removesuffix(ending)
    if variant.startswith("meft"):
        graft.make_reversible(model, variant, anchor_every=ANCHORS[ending])
    graft.attach(model, {"a": LORA if method.startswith("lora") else f"papers/{variant}"})
    set_training(model, ["a"])
    return Setting(model, [each for _, each in graft.parameters(model, "a")], method == "lora_recomputed")


@contextmanager
def ready(given: Setting) -> Iterator[None]:
    """The model as it trains."""
    if not given.recomputes:
        yield
        return
    with holding(given.model, "recompute"):
        set_training(given.model, ["a"])
        yield


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).last_hidden_state.square().sum()  # [B, L, D] -> []


def memory(given: Setting, ids: Tensor) -> dict[str, int]:
    """The bytes held for the backward pass, and the peak of the step."""
    alive = Alive()
    for each in (*given.model.parameters(), *given.model.buffers(), ids):
        alive.leave_out(each)
    seen: set[Tensor] = set()

    def gradient(parameter: Tensor) -> None:
        if parameter not in seen and parameter.grad is not None:
            seen.add(parameter)
            alive.gradients += parameter.grad.untyped_storage().nbytes()

    hooks = [each.register_post_accumulate_grad_hook(gradient) for each in given.parameters]
    with alive:
        loss = loss_of(given.model, ids)
        held = alive.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    for each in given.parameters:
        each.grad = None
    return {"held": held, "peak": alive.peak}


def seconds(given: Setting, ids: Tensor, repeats: int) -> float:
    """The median processor time of a forward and backward pass: wall time changes with what else the machine does."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        loss_of(given.model, ids).backward()
        times.append(time.process_time() - start)
        for each in given.parameters:
            each.grad = None
    return statistics.median(times[1:])


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for layers in map(int, args.layers.split(",")):
        found[layers] = {}
        for method in METHODS:
            given = setting(method, args, layers)
            ids = torch.randint(0, 1000, (args.rows, args.length), generator=torch.Generator().manual_seed(1))
            with ready(given):
                own: dict[str, Any] = {**memory(given, ids), "seconds": seconds(given, ids, args.repeats)}
            full = found[layers].get("full", own)
            own |= {f"{name}_of_full": own[name] / full[name] for name in ("held", "peak", "seconds")}
            found[layers][method] = own
            print(
                f"{layers:3d} layers  {method:17s} held {own['held'] / 2**20:8.2f} MiB ({own['held_of_full']:6.1%} of full)  "
                f"peak {own['peak'] / 2**20:8.2f} MiB ({own['peak_of_full']:6.1%})  {own['seconds']:.3f} s ({own['seconds_of_full']:.2f})",
                flush=True,
            )
    shape = {name: getattr(args, name) for name in ("hidden", "rows", "length", "repeats")}
    keep({"machine": machine(args.threads), "shape": shape, "anchor_every": 3, "by_layers": found}, args.out)


if __name__ == "__main__":
    main()
