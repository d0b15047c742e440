"""Settings that a run can have, but that are seldom meant: `graft check` asks about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graft.adapters.base import AdapterConfig
from graft.attaching.parameters import parameters
from graft.attaching.summary import summary
from graft.injection.state import Installed, state_of
from graft.training.assembly import RunParts
from graft.training.job import Job
from graft.training.trained_base import rounding_note

WIDTHS = ("rank", "bottleneck")
"""The fields of adapters that are a width of their own."""
LARGE_SHARE = 0.5
"""An adapter with a larger share of the base's parameters is asked about."""


def questions(parts: RunParts) -> list[str]:
    """Return a sentence for each setting of a run of one job that deserves a second look."""
    (part,) = parts.members
    job, train = part.job, part.config.train
    if job.trainable.adapter is None:
        return [*_of_steps(train.lr, train.batch_size, len(job.train)), *_of_rounding(parts, job)]
    return [
        *_of_steps(train.lr, train.batch_size, len(job.train)),
        *_of_widths(state_of(parts.base.model).adapter(job.name).installs),
        *_of_twins(state_of(parts.base.model).adapter(job.name).config.parts()),
        *_of_size(parts, job.name),
    ]


def _of_steps(lr: float, batch_size: int, samples: int) -> Iterator[str]:
    if lr > 1:
        yield f"train.lr is {lr:g}: usual values are 1e-5 to 1e-2. AdamW moves every parameter by up to this much in each step."
    if batch_size > samples:
        there = "there is only 1 training sample" if samples == 1 else f"there are only {samples:,} training samples"
        yield f"train.batch_size is {batch_size:,}, but {there}: each step takes all of them."


def _of_rounding(parts: RunParts, job: Job) -> Iterator[str]:
    if (note := rounding_note(parts.base, job)) is not None:
        yield note + "."


def _of_widths(installs: list[Installed]) -> Iterator[str]:
    for field in WIDTHS:
        wide = [
            each for each in installs if _own_width(each, field) > min(each.site.in_features, each.site.out_features)
        ]
        if wide:
            site = wide[0].site
            yield (
                f"{field} {_own_width(wide[0], field):,} is above the width of {site.module} ({site.in_features:,} to "
                f"{site.out_features:,} features): a larger one than {min(site.in_features, site.out_features):,} adds nothing."
            )


def _own_width(each: Installed, field: str) -> int:
    return getattr(each.config, field, None) or 0


def _of_twins(configs: Sequence[AdapterConfig]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, config in enumerate(configs, start=1):
        first = seen.setdefault(repr(config), number)
        if first != number:
            yield f"adapters {first} and {number} of the stack are the same ({config.kind}): is one of them meant otherwise?"


def _of_size(parts: RunParts, name: str) -> Iterator[str]:
    base = summary(parts.base.model).base_parameters
    own = sum(parameter.numel() for _, parameter in parameters(parts.base.model, name))
    if own > LARGE_SHARE * base:
        yield f"the adapter has {own:,} parameters, {own / base:.0%} of the base's {base:,}: is it meant to be that large?"
