"""Carrying out the orders of a run between its steps: jobs are submitted, cancelled, ranked.

A job that cannot join is noted as failed, with the reason; the others do not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from graft.attaching.attach import detach
from graft.attaching.parameters import names
from graft.config.jobs import REFERENCE
from graft.errors import GraftError
from graft.runs.commands import Order, Orders
from graft.training.forward.layout import decide
from graft.training.forward.tasks import forward_of
from graft.training.job import FAILED, Job
from graft.training.job_pool import Roster
from graft.training.records.recorder import Ledger

Recruit = Callable[[str, Mapping[str, Any]], Job]
"""Makes a job of its name and what it says, its adapter attached."""


class Desk:
    """Takes the orders of one run and changes its roster."""

    def __init__(
        self, model: nn.Module, orders: Orders, roster: Roster, ledger: Ledger, recruit: Recruit | None, layout: str, pad_id: int
    ) -> None:  # fmt: skip
        self.model, self.orders, self.roster, self.ledger = model, orders, roster, ledger
        self.recruit, self.layout, self.pad_id = recruit, layout, pad_id

    def obey(self, step: int) -> None:
        """Carry out what is due after this many steps."""
        for order in self.orders.take(step):
            job = self.roster.find(order["job"])
            if order["do"] == "unknown":
                self._ignore(order, order["reason"])
            elif order["do"] == "submit":
                self._enlist(order, step)
            elif job is None or job.ended is not None:
                self._ignore(order, f"there is no job '{order['job']}' that still trains")
            elif order["do"] == "cancel":
                job.ended = "cancelled"
                self.ledger.event("cancelled", job=job.name, step=step)
                self.ledger.say(f"step {step}  {job.name} is cancelled")
            else:
                job.priority = order["priority"]
                self.ledger.event("priority", job=job.name, step=step, priority=job.priority)
                self.ledger.say(f"step {step}  {job.name} has priority {job.priority}")

    def _ignore(self, order: Order, reason: str) -> None:
        self.ledger.event("ignored", order=order, reason=reason)
        self.ledger.say(f"'{order['do']} {order['job']}' is ignored: {reason}")

    def _enlist(self, order: Order, step: int) -> None:
        name, recruit = order["job"], self.recruit
        if name in self.roster or recruit is None:
            self._ignore(order, f"there is a job '{name}' already" if recruit else "this run takes no new jobs")
            return
        try:
            job = recruit(name, order["config"])
            decide(
                forward_of(self.model), [job], self.layout, self.pad_id
            )  # a layout that is demanded has to hold for it
        except Exception as error:
            for each in {name, f"{name}{REFERENCE}"} & set(names(self.model)):
                detach(self.model, each)
            said = self.ledger.lost(step, name, error)
            self.roster.gone[name] = {
                "state": FAILED, "step": 0, "steps": 0, "loss": None, "best": None, "ended": FAILED,
                "priority": int(order["config"].get("priority", 0)), "error": said, "mistake": isinstance(error, GraftError),
            }  # fmt: skip
            return
        self.roster.add(job)
        self.ledger.reporter.total += job.steps
        self.ledger.event("submitted", job=name, step=step, steps=job.steps)
        self.ledger.say(f"step {step}  {name} joins with {job.steps:,} steps")
