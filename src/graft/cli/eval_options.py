"""Options of graft eval that would have no effect together with others are errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.generation.loaded import LoadedModel


def refuse_settings(given: Mapping[str, Any]) -> None:
    """Raise `GraftError` for options that a benchmark's protocol fixes, so that they would have no effect."""
    from graft.errors import GraftError

    for name in ("metric", "max_new_tokens", "beams"):
        if given.get(name) is not None:
            raise GraftError(
                f"--{name.replace('_', '-')} is for data files only, because the protocol of a benchmark fixes it: leave it out"
            )


def refuse_for_vllm(benchmarks: bool, protocol: str, cache: str, device: str | None) -> None:
    """Raise `GraftError` for what vLLM cannot do and for options that would have no effect with it."""
    from graft.errors import GraftError, require

    require("vllm", "vllm")
    if not benchmarks or protocol == "rank":
        raise GraftError(
            "--engine vllm generates answers to benchmarks only: name them with --tasks, under a protocol other than rank "
            "(Graft itself computes likelihoods and losses)"
        )
    if cache != "dynamic" or device is not None:
        raise GraftError(
            "--cache and --device have no effect with --engine vllm, which chooses its own cache and GPU: leave them out"
        )


def refuse_template(template: str | None, protocol: str) -> None:
    """Raise `GraftError` for a template if the protocol has its own prompts, so that the template would have no effect."""
    from graft.errors import GraftError
    from graft.evaluation.protocols import PROTOCOLS, OutputProtocol

    rules = PROTOCOLS.get(protocol)
    asks_by_template = isinstance(rules, OutputProtocol) and rules.prompt is None
    if template is not None and not asks_by_template and (rules is not None or protocol == "lm-eval"):
        raise GraftError(f"--template has no effect, because {protocol} has its own prompts: leave it out")


def refuse_several(harness: bool, engine: str) -> None:
    """Raise `GraftError` for what does not deal its questions to several processes."""
    from graft.errors import GraftError

    if harness or engine == "vllm":
        what = "--harness, whose questions lm-eval asks itself" if harness else "--engine vllm, which starts its own"
        raise GraftError(f"several processes do not go with {what}: start one")


def refuse_for_labels(loaded: LoadedModel, protocol: str | None) -> None:
    """Raise `GraftError` for a protocol that is named for adapters that label texts, because it would have no effect."""
    from graft.data.labelling import LABELLED
    from graft.errors import GraftError

    if loaded.base.task in LABELLED and protocol is not None:
        raise GraftError(
            f"--protocol has no effect on adapters for {loaded.base.task}, which predict labels and write no text: leave it out"
        )
