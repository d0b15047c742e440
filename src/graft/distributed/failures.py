"""What goes wrong among several processes: one is lost, or has an error that all of them have to end with."""

from __future__ import annotations

import re

from graft.errors import GraftError


class RankLost(GraftError):
    """Another rank died or hangs. It is never the fault of a job: the run ends, and goes on from its last checkpoint."""

    code = 3


class Elsewhere(GraftError):
    """An error of another rank, which reports it. mistake: whether it is one that the user can fix."""

    def __init__(self, said: str, mistake: bool) -> None:
        super().__init__(said)
        self.mistake, self.quiet, self.code = mistake, True, 2 if mistake else 1


def reason_of(error: Exception) -> str:
    """The first sentence of an error of the exchange, without the place in gloo's source."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\] ", "", line).split(". ")[0].rstrip(".")


def described(error: Exception) -> tuple[str, bool]:
    """What an error says, and whether it is a mistake of the user."""
    return str(error) or type(error).__name__, mistaken(error)


def mistaken(error: Exception) -> bool:
    """Whether an error is a mistake of the user, on whichever rank."""
    return error.mistake if isinstance(error, Elsewhere) else isinstance(error, GraftError)
