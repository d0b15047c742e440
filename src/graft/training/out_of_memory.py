"""A step that does not fit into memory: an error that says which settings would have fitted, by Graft's own count.

    need = held now + optimiser state to come + tokens of the batch x what a token keeps for backward (`saved.py`)

Each remedy changes one of these: fewer tokens (`train.token_budget`), less per token (`train.activations`), smaller weights
(`base.quantize`), a smaller state or gradient (`train.optimizer`, `train.method`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.architectures.blocks import blocks_of
from graft.architectures.layers import holds_numbers, is_linear
from graft.architectures.two_streams import two_streams_of
from graft.architectures.walk import base_modules
from graft.bases.skeleton import load_skeleton
from graft.config.activations import Activations, Way
from graft.config.base import BaseConfig
from graft.config.methods import FullMethod, QFTMethod
from graft.config.optimizers import AdamWConfig, LionConfig, OptimizerConfig
from graft.config.train import TrainConfig
from graft.distributed.sharded import AT_ONCE, streamed
from graft.errors import GraftError
from graft.training.batching import Batcher, num_tokens
from graft.training.forward.causal import Forward
from graft.training.job import Job
from graft.training.rows import Row, units
from graft.training.saved import Saved, saved
from graft.training.scheduling.memory import held_bytes, room
from graft.training.updates.optimizers import update_bytes, weight_bytes
from graft.training.updates.rules import rule_of

BITS = {"nf4": 4.127, "int8": 8.0}
"""Bits per parameter of a large linear layer, scales included (`nf4` with double quantisation); of `int8`, without 4 bytes per row."""


PLAIN = "set train.activations: recompute, base.quantize: nf4, or lower data.max_length"


class OutOfMemory(GraftError):
    """A step does not fit into memory."""


@dataclass(frozen=True)
class Remedy:
    """A setting, and the bytes that the step would then need."""

    setting: str
    need: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory: torch's on a GPU, Python's, or torch's on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in said or "can't allocate memory" in said)


@contextmanager
def named() -> Iterator[None]:
    """Turn an error of too little memory into one of the user's, where nothing more is known than that."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"there is not enough memory, even for short samples: lower train.token_budget, {PLAIN}"
        ) from error


@contextmanager
def loading(config: BaseConfig, task: str) -> Iterator[None]:
    """Say what would hold the base, where it does not fit into memory while it is loaded."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        model = load_skeleton(config, task)
        linear = sum(each.numel() for each in floating_weights(model))
        others = sum(each.numel() for each in model.parameters()) - linear
        sizes = {"bfloat16": 16.0, **BITS}
        listed = ", ".join(f"{name} {_gb(int(linear * bits / 8 + others * 2))}" for name, bits in sizes.items())
        raise OutOfMemory(
            f"the base {config.model} does not fit into memory. Its weights take, without anything else: {listed}. Set base.dtype or "
            "base.quantize, or take a smaller base"
        ) from error


def explained(
    error: Exception, forward: Forward, job: Job, batcher: Batcher, activations: Activations, rows: Sequence[Row] = ()
) -> Exception:
    """Return the error of a step of this job as one that says what would have fitted, where memory was the reason; else itself.

    rows: the micro-batch; by default the fullest of the job. The frames of the error are dropped first: they hold what filled the memory.
    """
    if not is_out_of_memory(error):
        return error
    error = error.with_traceback(None)
    error.__context__ = error.__cause__ = None
    job.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if forward.device.type == "cuda":
        torch.cuda.empty_cache()
    found = OutOfMemory(advice(forward, job, rows or batcher.longest(job), batcher, activations))
    found.__cause__ = error
    return found


def advice(
    forward: Forward, job: Job, rows: Sequence[Row], batcher: Batcher, activations: Activations
) -> str:  # fmt: skip
    """Say that a batch does not fit, how much it needs, and what would have fitted."""
    what = f"the longest batch ({num_tokens(rows):,} tokens) does not fit into the memory of {forward.device}"
    plain = f"lower train.token_budget (now {batcher.budget}), {PLAIN}"
    if not rule_of(job).backward:
        return (
            f"{what}: lower train.token_budget (now {batcher.budget}), set base.quantize: nf4, or lower data.max_length"
        )
    try:
        kept = saved(forward, _smallest(rows), batcher)
    except Exception as again:  # not even one sample fits
        if not is_out_of_memory(again):
            raise
        return f"{what}, nor does a single sample: {plain}"
    need = Need(forward, job, num_tokens(rows), max(row.tokens for row in rows), kept, activations)
    there, found = room(forward.device), sorted(need.remedies(), key=lambda each: -each.need)
    if there is None:
        return f"{what}: {plain}. By Graft's count it needs {_gb(need.now)}; {_listed(found)}"
    fitting = [each for each in found if each.need <= there]
    said = f"{what}: by Graft's count it needs {_gb(need.now)}, and there are {_gb(there)}. "
    if fitting:
        return f"{said}What would fit, one change each: {_listed(fitting)}. data.max_length can be lowered too"
    least = need.all_together()
    return (
        f"{said}No single setting would do: {_listed(found)}. Together they need {_gb(least)}"
        + (", which fits" if least <= there else ", which does not fit either: take a smaller base, or lower data.max_length")
    )  # fmt: skip


def _smallest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the sample with the fewest tokens."""
    return min(units(rows), key=num_tokens)


class Need:
    """What a step needs, and what it would need otherwise."""

    def __init__(
        self, forward: Forward, job: Job, tokens: int, longest: int, kept: Saved, activations: Activations
    ) -> None:
        self.root, self.job, self.tokens, self.longest, self.kept = forward.root, job, tokens, longest, kept
        self.free = activations == "keep" and two_streams_of(forward.root) is None and bool(kept.blocks)
        """Whether blocks can be told to do something else with their activations."""
        self.on_gpu = forward.device.type == "cuda"
        self.parameters = list(job.params.values())
        state = sum(each.nbytes for each in job.tensors().values())
        self.fixed = held_bytes(forward.device) + job.own_bytes - job.own_weights - state
        self.per_token = kept.under("keep")
        """What is measured: under another way than keep, what that way keeps."""

    @property
    def now(self) -> int:
        """With the settings as they are."""
        return self._total()

    def _total(self, fixed: int = 0, tokens: int | None = None, per_token: float | None = None) -> int:
        """The bytes of a step; fixed: what would be added to what it holds in any case."""
        count, each = self.tokens if tokens is None else tokens, self.per_token if per_token is None else per_token
        return int(self.fixed + fixed + count * each)

    def remedies(self) -> Iterator[Remedy]:
        """Yield the settings that would lower the need, each by itself."""
        tokens = self.tokens
        while tokens // 2 >= self.longest:
            tokens //= 2
            yield Remedy(f"train.token_budget: {tokens}", self._total(tokens=tokens))
        for way in self._ways():
            yield Remedy(f"train.activations: {way}", self._total(per_token=self.kept.under(way)))
        for bits, gain in self._quantised():
            yield Remedy(f"base.quantize: {bits}", self._total(-gain))
        if (gain := self._streamed()) > 0:
            yield Remedy("base.offload: host", self._total(-gain))
        for setting, gain in self._updates():
            if gain > 0.01 * self.now:
                yield Remedy(setting, self._total(-gain))

    def all_together(self) -> int:
        """The least that the settings give together."""
        ways = [self.per_token, *(self.kept.under(way) for way in self._ways())]
        gains = [max((gain for _, gain in each), default=0) for each in (self._quantised(), self._updates())]
        return self._total(-sum(max(0, gain) for gain in gains), min(self.tokens, self.longest), min(ways))

    def _ways(self) -> tuple[Way, ...]:
        return () if not self.free else ("recompute", "offload") if self.on_gpu else ("recompute",)

    def _quantised(self) -> Iterator[tuple[str, int]]:
        """What the base's linear layers would save in few bits."""
        if self.job.config.method.parts is not None:
            return
        weights = list(floating_weights(self.root))
        size = sum(each.nbytes for each in weights)
        for bits, per in BITS.items():
            scales = 4 * sum(len(each) for each in weights) if bits == "int8" else 0
            gain = size - int(sum(each.numel() for each in weights) * per / 8) - scales
            if gain > 0:
                yield bits, gain

    def _streamed(self) -> int:
        """What the device would no longer hold if blocks came to it from host memory (`graft.distributed.sharded`)."""
        if not self.on_gpu or self.job.config.method.parts is not None or streamed(self.root) is not None:
            return 0
        sizes = [sum(each.nbytes for each in block.module.parameters()) for block in blocks_of(self.root)]
        return sum(sizes) - AT_ONCE * max(sizes, default=0)

    def _updates(self) -> Iterator[tuple[str, int]]:
        """What another optimiser, or QFT in place of full training, would save."""
        config, own = self.job.config, self._own(self.job.config)
        if isinstance(config.method, QFTMethod):
            return
        others: tuple[OptimizerConfig, ...] = (
            AdamWConfig(kind="adamw-8bit"),
            LionConfig(kind="lion"),
            LionConfig(kind="lion-8bit"),
        )
        chosen = config.optimizer or config.usual_optimizer
        for other in (each for each in others if each.kind != chosen.kind):
            yield f"train.optimizer: {other.kind}", own - self._own(config.model_copy(update={"optimizer": other}))
        if isinstance(config.method, FullMethod):
            changes = {"method": QFTMethod(parts=config.method.parts), "optimizer": LionConfig(), "accumulate_in": None}
            yield "train.method: qft", own - self._own(config.model_copy(update=changes))

    def _own(self, config: TrainConfig) -> int:
        """What trains, its gradients and the optimiser's state."""
        return weight_bytes(self.parameters, config) + update_bytes(self.parameters, config)


def floating_weights(root: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of the blocks' linear layers that are floating-point numbers."""
    for block in blocks_of(root):
        for _, module in base_modules(block.module):
            weight = module._parameters.get("weight")
            if is_linear(module) and weight is not None and holds_numbers(weight):
                yield weight


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _listed(remedies: Sequence[Remedy]) -> str:
    return "; ".join(f"{each.setting} ({_gb(each.need)})" for each in remedies)
