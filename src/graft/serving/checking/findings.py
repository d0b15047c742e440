"""What a check of a server finds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Verdict:
    """What was found."""

    faults: list[tuple[str, str]] = field(default_factory=list)
    """(short name of the fault, what it means)"""
    notes: list[str] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)
    """Mean differences of log-probabilities in nats: of the base, of the adapter, and between the two (signal)."""

    def add(self, fault: str, said: str) -> None:
        self.faults.append((fault, said))
