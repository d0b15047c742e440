"""The samples that a run trains on, and those that it holds out for validation."""

from __future__ import annotations

import hashlib
import json

from graft.config.data import DataConfig, SourceConfig
from graft.data.folders import check_trainable
from graft.data.reading import read
from graft.data.report import conversation_key
from graft.data.samples import Sample
from graft.errors import GraftError


def samples_of(
    config: DataConfig, unread: dict[str, list[str]] | None = None
) -> tuple[list[list[Sample]], list[Sample]]:
    """Return the training samples of each source, and the validation samples, before tokenisation.

    unread: gets the columns of each training source that nothing reads.
    """
    sources = train_sources(config)
    for source in sources:
        check_trainable(source)
    return _split(config, [read(source, task=config.task, unread=unread) for source in sources])


def train_sources(config: DataConfig) -> list[SourceConfig]:
    """Return the sources of the training data as a list."""
    listed = config.train if isinstance(config.train, list) else [config.train]
    return [SourceConfig(path=source) if isinstance(source, str) else source for source in listed]


def validation_source(config: DataConfig) -> SourceConfig | None:
    """Return the source of the validation data if they are a data set of their own, else None."""
    value = config.validation
    return SourceConfig(path=value) if isinstance(value, str) else value if isinstance(value, SourceConfig) else None


def _split(config: DataConfig, samples: list[list[Sample]]) -> tuple[list[list[Sample]], list[Sample]]:
    """Split off the validation samples. Return the training samples of each source, and the validation samples.

    The samples with the smallest hashes of (seed, conversation) are held out. So the split does not depend on the order of rows. Samples
    that repeat each other have one hash and fall on the same side: where they are more than are still to be held out, they stay.
    """
    source = validation_source(config)
    if source is not None:
        return samples, read(source, task=config.task)
    share = config.validation
    if not share:
        return samples, []
    total = sum(map(len, samples))
    wanted = max(1, round(share * total)) if isinstance(share, float) else share
    if not isinstance(wanted, int) or wanted >= total:
        raise GraftError(f"data.validation is {share}, but there are only {total} samples to hold out from")
    alike: dict[str, list[tuple[int, int]]] = {}
    for source_index, some in enumerate(samples):
        for index, sample in enumerate(some):
            alike.setdefault(_rank(config.seed, sample), []).append((source_index, index))
    chosen: set[tuple[int, int]] = set()
    for rank in sorted(alike):
        if len(chosen) + len(alike[rank]) <= wanted:
            chosen |= set(alike[rank])
    if not chosen:
        raise GraftError(
            f"data.validation is {share}, but every sample is there more than {wanted} times: repeats are held out together or not at all"
        )
    kept = [
        [sample for index, sample in enumerate(some) if (source_index, index) not in chosen]
        for source_index, some in enumerate(samples)
    ]
    return kept, [samples[source_index][index] for source_index, index in sorted(chosen)]


def _rank(seed: int, sample: Sample) -> str:
    """Return the hash that orders samples for the split."""
    return hashlib.sha256(f"{seed} {json.dumps(conversation_key(sample))}".encode()).hexdigest()
