"""The one base of a process, with the data and what trains on it. Server and clients of one process share it.

It is put into the state of a round by a method (`methods/`), trains one client at a time, and answers what the evaluation asks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from graft.attaching.active import set_trainable
from graft.attaching.attach import detach
from graft.bases import load_base, load_tokenizer, pad_id
from graft.data.datasets import TokenDataset
from graft.data.preparing import Prepared, prepare
from graft.errors import GraftError
from graft.evaluation.free_text import rouge_scores
from graft.federation.clients import clients_of
from graft.federation.definition import Federation, said
from graft.generation.loss import sample_losses
from graft.training.answering import answers
from graft.training.assembly import JobParts, part_of
from graft.training.batching import Batcher
from graft.training.ends import prompt_of
from graft.training.forward.layout import decide
from graft.training.forward.modes import set_training
from graft.training.forward.tasks import forward_of
from graft.training.job import Job
from graft.training.reading import cache_folder, room_of
from graft.training.step import Gradient
from graft.training.updates.rules import rule_of

NAME = "federated"
"""The name of what trains."""
_ROUND = 0x524F554E
"""Keeps seeds of rounds apart from others that come from the same seed."""


@dataclass
class Workplace:
    """Base, data and clients of a process."""

    federation: Federation

    def __post_init__(self) -> None:
        config, tokenizer = self.federation.config, load_tokenizer(self.federation.config.base)
        self.data = _data_of(self.federation, tokenizer)
        self.clients = clients_of(self.federation, self.data.train)
        self.base = load_base(config.base, config.data.base_task, self.data.classes)
        if self.base.fresh or self.base.added:
            raise GraftError(
                "a federation trains on a base as it is: a base with a fresh head or new tokens starts from other random numbers at every "
                "client. Save it once with them, and name that folder as base.model"
            )
        digest = self.base.identity["digest"]
        if digest is None:
            raise GraftError(
                "the weights of the base cannot be read, so clients could not tell whether theirs are the same"
            )
        self.digest = hashlib.sha256(digest.encode()).hexdigest()[:16]
        self.batcher = Batcher(config.local.token_budget, "padded", pad_id(tokenizer, self.base.model))
        self._part: tuple[str, JobParts] | None = None

    def seed_of(self, number: int, client: str = "") -> int:
        """A seed of 63 bits for a round, or for a client in a round."""
        words = list(hashlib.sha256(client.encode()).digest()[:8])
        key = np.random.SeedSequence((_ROUND, self.federation.config.seed, number, *words))
        return int(key.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def part(self, adapter: Any, seed: int) -> JobParts:
        """What trains: the base itself, or this adapter, freshly attached with the initial values of this seed."""
        known = json.dumps([said(adapter), seed], sort_keys=True)
        if self._part is None or self._part[0] != known:
            self.clear()
            run = self.federation.run_of(adapter, seed)
            self._part = known, part_of(self.base, NAME, run, self.data)
            self.forward = forward_of(self.base.model)
            decide(self.forward, [self._part[1].job], "padded", self.batcher)
        return self._part[1]

    def clear(self) -> None:
        """Detach the adapter."""
        if self._part is not None and self._part[1].job.trainable.adapter is not None:
            detach(self.base.model, NAME)
        self._part = None

    def train(
        self, part: JobParts, rows: TokenDataset, seed: int, key: Callable[[int, int, int], int] | None = None
    ) -> list[Gradient]:
        """Take the local steps on a client's rows, from the parameters as they are; what each step's gradient was.

        key: names the noise of (seed, step, direction), where steps go along noise. Raises `NonFinite` where a loss is not finite.
        """
        config = part.config.train.model_copy(update={"seed": seed})
        job = Job.make(self.base.model, NAME, config, rows, None)
        if key is not None:
            job.optimizer.key = key  # pyright: ignore[reportAttributeAccessIssue]
        rule, found = rule_of(job), list[Gradient]()
        with self._training(job):
            while not job.ended:
                found.append(rule.prepare(self.forward, [job], self.batcher)[job.name])
                rule.update(job, found[-1])
        return found

    @contextmanager
    def _training(self, job: Job) -> Iterator[None]:
        names = [job.trainable.adapter] if job.trainable.adapter is not None else []
        set_trainable(self.base.model, names)
        set_training(self.base.model, names)
        try:
            yield
        finally:
            job.optimizer.zero_grad(set_to_none=True)
            self.base.model.eval()

    def scores(self, adapter: str | None, stop_ids: frozenset[int]) -> dict[str, float]:
        """Evaluate the model as it is, under an adapter or bare: the loss per target and ROUGE-L, as far as they are asked for."""
        held, settings = self.data.validation, self.federation.config.eval
        if held is None:
            return {}
        losses = sample_losses(self.base.model, list(held), [adapter] * len(held), token_budget=self.batcher.budget)
        found = {"loss": math.fsum(losses) / int(held.targets.sum())}
        if settings.answers is not None and math.isfinite(found["loss"]):
            asked = [example for example in held if prompt_of(example)][: settings.answers]
            pairs = answers(self.base, asked, adapter, stop_ids, settings.max_new_tokens, 2 * self.batcher.budget)
            found["rougeL"] = rouge_scores([mine for _, mine in pairs], [right for right, _ in pairs])["rougeL"]
        return found


def clients_here(federation: Federation) -> dict[str, TokenDataset]:
    """Return the clients whose data are here, without loading the base."""
    return clients_of(federation, _data_of(federation, load_tokenizer(federation.config.base)).train)


def _data_of(federation: Federation, tokenizer: Any) -> Prepared:
    run = federation.run_of(federation.adapter_of(0), federation.config.seed)
    return prepare(federation.config.data, tokenizer, cache_folder(), room=lambda: room_of(run))


def mean_scores(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over several models."""
    return {name: sum(each[name] for each in scores) / len(scores) for name in (scores[0] if scores else ())}
