"""The processes ("ranks") of a run, and what they say to one another. A run of one process is a group of one.

    with together() as group:              under torchrun all ranks meet here
        with group.agreed():               an error of any rank is raised on all
            ...
        group.sum_(tensor)                 in place, alike on all ranks
        config = group.tell(config)        what rank 0 has

torchrun starts the processes and names the meeting point (MASTER_ADDR, RANK, WORLD_SIZE). Tensors on the CPU go through gloo, those on
GPUs through NCCL. A rank that dies or hangs shows at the next exchange, as `RankLost`, which names it and the step.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch

# On its first import its functions take the group of all ranks as a default. After the ranks have met they would hold it to the end of the
# process (see cli/frame.py for what that does).
import torch.distributed.nn  # noqa: F401
from torch import Tensor
from torch import distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from graft.distributed.failures import Elsewhere, RankLost, described, reason_of
from graft.errors import GraftError, listed
from graft.utils import launched

T = TypeVar("T")
TIMEOUT = 600.0
"""Seconds that a rank waits for the others, unless the configuration says otherwise."""
GRACE = 3.0
"""Seconds in which ranks that are alive say so, after an exchange has failed."""


class Group:
    """The ranks of a run. One process is a group of one, in which every exchange is nothing.

    For messages, `step` is the run's step; what trains nothing has a `remedy` instead, which says how it goes on when a rank is lost.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self.step = 0
        self.remedy: str | None = None
        self.waited = 0.0
        """Seconds of waiting in exchanges, since the beginning."""
        self._store, self._group, self._turns = store, dist.group.WORLD if size > 1 else None, 0
        self._seconds = TIMEOUT

    @property
    def leads(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def wait_at_most(self, seconds: float) -> None:
        """Set how long a rank waits for the others from now on."""
        if self.size > 1:
            self._seconds = seconds
            self._group = self.channel()

    def channel(self) -> dist.ProcessGroup:
        """A channel for messages from rank to rank, which arrive in the order in which they were sent. All ranks ask for it."""
        made = dist.new_group(timeout=timedelta(seconds=self._seconds))
        assert isinstance(made, dist.ProcessGroup)
        return made

    def sum_(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.size > 1:
            self.exchange(lambda: dist.all_reduce(values, group=self._group))
        return values

    def most(self, number: float) -> float:
        """The largest of the ranks' numbers."""
        return max(self.gather(number))

    def any(self, *flags: bool) -> list[bool]:
        """Which of these flags any rank has set."""
        if self.size == 1:
            return list(flags)
        return (self.sum_(torch.tensor(flags, dtype=torch.int32)) > 0).tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order. They are plain JSON, so that nothing is unpickled."""
        if self.size == 1:
            return [value]
        said = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(said)
        ends = [0, *itertools.accumulate(self.sum_(lengths).tolist())]
        all_said = torch.zeros(ends[-1], dtype=torch.uint8)
        all_said[ends[self.rank] : ends[self.rank + 1]] = said
        text = bytes(self.sum_(all_said).tolist())
        return [json.loads(text[start:end]) for start, end in itertools.pairwise(ends)]

    def tell(self, value: T, source: int = 0) -> T:
        """The value that one rank has, which is plain JSON."""
        return value if self.size == 1 else self.gather(value if self.rank == source else None)[source]  # type: ignore[return-value]

    def spread(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Give all ranks the values that one rank has in these tensors."""
        if self.size > 1:
            for each in tensors:
                self.exchange(lambda each=each: dist.broadcast(each.data, src=source, group=self._group))

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    def tally(self, name: str, more: int) -> int:
        """Add to a number of this name that several ranks share, at any time; return the new number."""
        try:
            return self._store.add(f"tally/{name}", more)
        except RuntimeError as error:
            raise self._lost(error) from error

    def turns(self, units: Sequence[T]) -> Iterator[T]:
        """Units of work that the ranks share: each rank takes the next one when it is free, so that none waits for another.

        All ranks have the same units. When one of them gives up, the others take no more.
        """
        if self.size == 1:
            yield from units
            return
        self._turns += 1
        name = f"turns/{self._turns}"
        try:
            while (at := self.tally(name, 1) - 1) < len(units):
                yield units[at]
        finally:
            with suppress(RankLost):
                self.tally(name, len(units))

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Run a block on all ranks; where it fails on any, raise on all: `Elsewhere` but on the first rank that failed.

        The block holds no exchange.
        """
        error: Exception | None = None
        try:
            yield
        except RankLost:
            raise
        except Exception as caught:
            error = caught
        self.settle(error)

    def settle(self, error: Exception | None) -> None:
        """Raise if any rank has an error, as `agreed` does."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        if not self.any(error is not None)[0]:
            return
        said = self.gather(None if error is None else described(error))
        first = next(rank for rank, each in enumerate(said) if each is not None)
        if error is not None and first == self.rank:
            raise error
        raise Elsewhere(*said[first]) from error  # type: ignore[misc]

    def same(self, facts: dict[str, Any]) -> None:
        """Raise `GraftError`, on all ranks, if any of these facts differs between ranks."""
        each = self.gather(facts)
        for name in facts:
            others = [rank for rank, own in enumerate(each) if own[name] != each[0][name]]
            if others:
                error = GraftError(
                    f"the ranks of this run differ in {name}: rank 0 has {each[0][name]}, rank {others[0]} has {each[others[0]][name]}"
                )
                error.quiet = not self.leads
                raise error

    def exchange(self, call: Callable[[], Any]) -> Any:
        """Make a call of torch.distributed, and raise `RankLost` where it fails."""
        began = time.perf_counter()
        try:
            return call()
        except RuntimeError as error:
            raise self._lost(error) from error
        finally:
            self.waited += time.perf_counter() - began

    def _lost(self, error: Exception) -> RankLost:
        """Name the ranks that do not answer: all that are alive come here, and say so in the store."""
        missing = (
            [0] if self.rank else []
        )  # without a launcher, the first rank holds the store, which is then gone with it
        with suppress(Exception):
            self._store.set(f"alive/{self.rank}", str(self.step))
            keys, until = [f"alive/{rank}" for rank in range(self.size)], time.monotonic() + GRACE
            while time.monotonic() < until and not self._store.check(keys):
                time.sleep(0.1)
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        who = f"rank {listed([str(rank) for rank in missing])} does" if missing else "the other ranks do"
        at = f" in step {self.step + 1}" if self.remedy is None else ""
        remedy = self.remedy or "The run goes on from its last checkpoint with graft resume"
        lost = RankLost(f"{who} not answer{at} ({reason_of(error)}). {remedy}")
        alive = [rank for rank in range(self.size) if rank not in missing]
        lost.quiet = bool(missing) and self.rank != alive[0]
        return lost

    def leave(self) -> None:
        """Wait until all ranks are through their last exchange: where one closes its connections earlier, another may still read."""
        with suppress(RuntimeError):
            there, until = self._store.add("left", 1), time.monotonic() + GRACE
            while there < self.size and time.monotonic() < until:
                time.sleep(0.01)
                there = self._store.add("left", 0)

    def say_once(self, error: GraftError) -> None:
        """Let one rank report a mistake that all ranks make alike, in code that no `agreed` holds."""
        if self.leads:
            with suppress(RuntimeError):
                self._store.set("mistake", str(error))
        elif not error.quiet:
            with suppress(RuntimeError):
                self._store.wait(["mistake"], timedelta(seconds=GRACE))
                error.quiet = self._store.get("mistake").decode() == str(error)


ALONE = Group()
"""A run of one process."""
_present: list[Group] = []


@contextmanager
def together() -> Iterator[Group]:
    """Meet the other ranks for a block of code; inside another such block, the group is the same.

    Raises `GraftError` if they cannot meet.
    """
    if _present or launched.size() == 1:
        yield _present[-1] if _present else ALONE
        return
    group = _meet()
    _present.append(group)
    try:
        yield group
        group.wait()
        group.leave()
    except GraftError as error:
        group.say_once(error)
        raise
    finally:
        _present.remove(group)
        dist.destroy_process_group()


def _meet() -> Group:
    with_gpu = torch.cuda.is_available() and launched.local_rank() < torch.cuda.device_count()
    if with_gpu:
        torch.cuda.set_device(launched.local_rank())
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=TIMEOUT))))
        # A launcher that starts lost processes again keeps its store, with the addresses of those that are gone.
        store = PrefixStore(f"graft/{launched.restarts()}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if with_gpu else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT),
        )
    except (RuntimeError, ValueError) as error:
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GraftError(f"the processes of this run cannot meet at {at}: {said}") from error
    return Group(rank, size, PrefixStore("alive", store))
