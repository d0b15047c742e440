"""FedKSeed (Qin et al. 2024, arXiv 2312.06353): the model is its start and K numbers, one for each seed of a pool that all know.

    w = w0 - lr sum_j a_j z(s_j)                     rebuilt from the accumulators a, z(s) standard normal noise of seed s
    g = (L(w + e z_j) - L(w - e z_j)) / 2e           a local step draws j, and moves w by -lr g z_j
    a_j = a_j + sum_c weight_c sum_t g_ct            the server, over the steps t of clients c in which they drew j

A client gets the K accumulators and sends a pair (j, g) for each step. FedKSeed-Pro draws seeds by the mean size q_j of their slopes, the
initial one of zero counted, with p = softmax((q - min q) / (max q - min q)); the server draws, so that no probabilities travel.

Legend: K seeds, T local steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graft.config.federation import KSeedMethod
from graft.errors import GraftError
from graft.federation.messages import Tensors
from graft.federation.methods.base import Update
from graft.federation.publishing import publish
from graft.federation.workplace import Workplace
from graft.training.updates.noise import add_noise_

_POOL = 0x4B534544
"""Keeps the pool apart from other random numbers of the same seed."""
LIMIT = 1000.0
"""Slopes above it count as this in the history of FedKSeed-Pro."""


class KSeed:
    """On all parameters of the base, on parts of it, or on an adapter of any kind."""

    exchanges: ClassVar[bool] = True

    def __init__(self, place: Workplace, method: KSeedMethod) -> None:
        self.place, self.method, federation = place, method, place.federation
        self.part = place.part(federation.adapter_of(0), federation.config.seed)
        self.steps, self.pro = federation.config.local.steps, method.kind == "fedkseed-pro"
        words = np.random.SeedSequence((_POOL, federation.config.seed)).generate_state(method.seeds, np.uint64)
        self.pool = [int(word) for word in words]
        groups = self.part.job.optimizer.param_groups
        self.params: list[nn.Parameter] = [each for group in groups for each in group["params"]]
        self.rates = [float(group["lr"]) for group in groups for _ in group["params"]]
        self.origin = [each.detach().clone() for each in self.params]
        self.start, self.at = self.origin, torch.zeros(method.seeds)
        """The parameters at the accumulators `at`, from which every client of a round starts."""

    def begin(self) -> Tensors:
        """Accumulators of zero; for pro also the sums and counts of sizes of slopes."""
        zeros = torch.zeros(self.method.seeds)
        history = {"sizes": zeros.clone(), "counts": torch.ones(self.method.seeds)} if self.pro else {}
        return {"accumulators": zeros, **history}

    def down(self, state: Tensors, number: int, client: str) -> Tensors:
        """The accumulators [K]; for pro also the seeds to draw [T]."""
        found = {"accumulators": state["accumulators"]}
        if self.pro:
            found["draws"] = _numbers(self._draw(number, client, probabilities(state["sizes"] / state["counts"])))
        return found

    def _draw(self, number: int, client: str, p: np.ndarray | None = None) -> np.ndarray:
        random = np.random.default_rng(self.place.seed_of(number, client))
        return random.choice(self.method.seeds, self.steps, p=p)

    def work(self, got: Tensors, number: int, client: str) -> tuple[Tensors, str]:
        """Rebuild the model, take the local steps, and go back to where they began; pairs of (seed, slope)."""
        draws = got["draws"].numpy().astype(int) if self.pro else self._draw(number, client)
        self.put(got["accumulators"])
        rows = self.place.clients[client]
        try:
            found = self.place.train(
                self.part, rows, self.place.seed_of(number, client), lambda seed, step, way: self.pool[draws[step]]
            )
        finally:
            _copy(self.params, self.start)
        slopes = [next(iter(each.slopes.values())) for each in found]
        return {"seeds": _numbers(draws), "slopes": torch.tensor(slopes, dtype=torch.float32)}, ""

    def put(self, accumulators: Tensor) -> None:
        """Put the model at these accumulators, by one rebuild however many clients start there."""
        if not torch.equal(accumulators, self.at):
            self.start = rebuilt(self.origin, self.rates, self.pool, accumulators)
            self.at = accumulators.clone()
        _copy(self.params, self.start)

    def check(self, update: Update, state: Tensors) -> None:
        seeds, slopes = update.tensors.get("seeds"), update.tensors.get("slopes")
        for name, each in (("seeds", seeds), ("slopes", slopes)):
            if each is None or tuple(each.shape) != (self.steps,):
                given = "nothing" if each is None else f"shape {tuple(each.shape)}"
                raise GraftError(
                    f"its {name} should have shape ({self.steps},), one for each local step; it sent {given}"
                )
        assert seeds is not None and slopes is not None
        if seeds.dtype not in (torch.uint16, torch.int64) or int(seeds.long().max()) >= self.method.seeds:
            raise GraftError(f"its seeds should be numbers below {self.method.seeds}, as whole numbers")
        if not slopes.is_floating_point() or not bool(slopes.isfinite().all()):
            raise GraftError("its slopes hold numbers that are NaN or infinite")

    def aggregate(self, state: Tensors, updates: Sequence[Update]) -> tuple[Tensors, dict[str, float]]:
        """Add the weighted slopes to their seeds, in float64 and in the order of the clients' names."""
        new = {name: each.double() for name, each in state.items()}
        for update in updates:
            seeds, slopes = update.tensors["seeds"].long(), update.tensors["slopes"].double()
            new["accumulators"].index_add_(0, seeds, slopes, alpha=update.weight)
            if self.pro:
                new["sizes"].index_add_(0, seeds, slopes.clamp(-LIMIT, LIMIT).abs())
                new["counts"].index_add_(0, seeds, torch.ones_like(slopes))
        used = float((new["accumulators"] != 0).sum())
        return {name: each.float() for name, each in new.items()}, {"seeds used": used}

    def scores(self, state: Tensors) -> dict[str, float]:
        self.put(state["accumulators"])
        job = self.part.job
        return self.place.scores(job.trainable.adapter, job.stop_ids)

    def publish(self, state: Tensors, folder: Path) -> Path:
        self.put(state["accumulators"])
        return publish(self.place, folder, self.part.job.trainable.adapter)


def _numbers(draws: np.ndarray) -> Tensor:
    return torch.from_numpy(draws.astype(np.uint16))


@torch.no_grad()
def _copy(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(params, values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def rebuilt(
    origin: Sequence[Tensor], rates: Sequence[float], pool: Sequence[int], accumulators: Tensor,
    noise: Callable[[Tensor, float, int, int], object] = add_noise_,
) -> list[Tensor]:  # fmt: skip
    """Return w0 - rate * sum_j a_j z(s_j) for each tensor, in one pass over it: the sum is taken in float32 and rounded once.

    origin: w0, in the order in which noise numbers tensors. rates: the learning rate of each. Seeds whose accumulator is zero are not
    drawn. noise: adds a multiple of the noise of (key, number of the tensor) in place.
    """
    used = [(pool[at], float(accumulators[at])) for at in accumulators.nonzero().flatten().tolist()]
    found = []
    for index, (start, rate) in enumerate(zip(origin, rates, strict=True)):
        total = torch.zeros(start.shape, dtype=torch.float32, device=start.device)
        for key, amount in used:
            noise(total, amount, key, index)
        found.append((start.float() - rate * total).to(start.dtype))
    return found


def probabilities(sizes: Tensor) -> np.ndarray:
    """Return FedKSeed-Pro's probabilities [K] of seeds with these mean sizes of slopes [K]; the largest is at most e times the least."""
    q = sizes.double().numpy()
    weights = np.exp((q - q.min()) / (q.max() - q.min() + 1e-10))
    return weights / weights.sum()
