"""The protocols: how a benchmark is asked and judged. The registry below is the only list of them.

- llm-adapters: the prompt, decoding and extraction of LLM-Adapters, for comparison with published tables.
- strict: the answer that the model states, or that its output ends with.
- math-verify: mathematical equality.
- rank: the likelihood of the choices.
- bleu: free text.
"""

from __future__ import annotations

from graft.errors import GraftError, did_you_mean
from graft.evaluation.protocols import bleu, llm_adapters, math_verify, rank, strict
from graft.evaluation.protocols.base import Judgement, OutputProtocol, Protocol
from graft.evaluation.protocols.rank import RankProtocol
from graft.evaluation.tasks.base import Task

PROTOCOLS: dict[str, OutputProtocol | RankProtocol] = {
    protocol.name: protocol
    for protocol in (llm_adapters.PROTOCOL, strict.PROTOCOL, math_verify.PROTOCOL, rank.PROTOCOL, bleu.PROTOCOL)
}

__all__ = ["PROTOCOLS", "Judgement", "OutputProtocol", "Protocol", "RankProtocol", "defined_for", "get"]


def defined_for(task: Task) -> list[str]:
    """Return the names of the protocols that are defined for a task."""
    return [name for name, protocol in PROTOCOLS.items() if protocol.defines(task)]


def get(name: str, task: Task) -> OutputProtocol | RankProtocol:
    """Return a protocol by name. Raises `GraftError` for an unknown name, and if the protocol is not defined for the task."""
    if name not in PROTOCOLS:
        raise GraftError(
            f"unknown protocol '{name}'.{did_you_mean(name, PROTOCOLS)} The protocols are: {', '.join(PROTOCOLS)}"
        )
    if not PROTOCOLS[name].defines(task):
        raise GraftError(
            f"'{task.name}' is not defined under protocol '{name}'; it is under {', '.join(defined_for(task))}"
        )
    return PROTOCOLS[name]
