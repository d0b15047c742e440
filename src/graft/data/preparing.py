"""Prepare the data of a run: read, split and tokenise what its settings name, and report on it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graft.config.data import DataConfig, SourceConfig
from graft.data import cache
from graft.data.datasets import TokenDataset
from graft.data.encoding import facts_of
from graft.data.folders import content_hash
from graft.data.labelling import LABELLED, Labelling
from graft.data.left_out import check_counts, check_lengths
from graft.data.long_texts import shortened
from graft.data.marked import tokenize_marked, with_mismatched
from graft.data.pairs import tokenize_pair
from graft.data.reading import read
from graft.data.report import DataReport, conversation_key, count_duplicates, count_outcomes
from graft.data.rollouts import rollout_example
from graft.data.samples import Example, Rejected, Sample
from graft.data.seq2seq import EncoderTemplate, encoder_template, tokenize_seq2seq
from graft.data.splits import samples_of, train_sources, validation_source
from graft.data.template import Template
from graft.data.template_notes import template_notes
from graft.data.templates import template_of
from graft.data.tokenizing import tokenize, tokenize_document
from graft.data.unknown import refuse_unknown_targets
from graft.data.warnings import data_warnings
from graft.errors import GraftError

Outcome = Example | Rejected
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """Data that are ready for training."""

    train: TokenDataset
    validation: TokenDataset | None
    template: Template | Labelling
    """Save it beside the adapter: evaluation and chat render conversations with it, or take the classes from it."""
    report: DataReport
    cached: bool = False
    """Whether the tokens come from the cache."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in the order of their numbers; empty if the task has no classes."""
        return self.template.names if isinstance(self.template, Labelling) else ()


def prepare(
    config: DataConfig,
    tokenizer: Any,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    classes: Sequence[str] | None = None,
    room: Callable[[], int | None] = lambda: None,
) -> Prepared:
    """Read, split, render and tokenise the data of a run.

    With a `cache_dir` (and `config.cache`) the tokens are cached there. `progress(done, rows)` is called every 100 rows.
    classes: the class names in the order of the base's own head; the data's classes take this order if their names are the same.
    room: returns how many tokens the base holds, for the message about samples that are too long.
    Raises `GraftError` for data that cannot be read or rendered, for samples longer than `max_length` if `overlong` is error,
    and if nothing is left to train on.
    """
    _check_task(config, tokenizer)
    template = _template(config, tokenizer)
    folder = cache_dir if config.cache else None
    key, warning = "", None
    if folder is not None:
        key = _key(config, tokenizer, template, classes)
        stored, warning = cache.fetch(folder, key)
        if stored is not None:
            known = template or _labelling_of(config, stored[2])
            return Prepared(stored[0], stored[1], known, stored[2], cached=True)
    prepared = _prepare_anew(config, tokenizer, template, progress, classes, room)
    if folder is not None:
        cache.store(folder, key, (prepared.train, prepared.validation, prepared.report))
    if warning:
        prepared = replace(prepared, report=replace(prepared.report, notes=(*prepared.report.notes, warning)))
    return prepared


def _check_task(config: DataConfig, tokenizer: Any) -> None:
    """Refuse an unsuitable tokenizer, and settings that have no effect with this task, before any data are read."""
    if config.task not in LABELLED:
        facts_of(tokenizer)
    elif not getattr(tokenizer, "is_fast", False):
        raise GraftError(f"data.task {config.task} needs a fast (Rust) tokenizer")
    answers = (*LABELLED, "seq2seq", "preference")
    plain = DataConfig(train=config.train)
    for name, tasks in (
        ("template", LABELLED),
        ("template_args", LABELLED),
        ("system", LABELLED),
        ("train_on", answers),
        ("special_tokens", (*LABELLED, "seq2seq")),
    ):
        if config.task in tasks and getattr(config, name) != getattr(plain, name):
            raise GraftError(f"data.{name} has no effect if data.task is {config.task}: remove it")
    if config.overlong == "split" and config.task != "causal":
        raise GraftError(
            f"data.overlong split cuts rows of plain text; with data.task {config.task}, use drop or truncate_prompt"
        )
    if config.labels is not None and config.task not in LABELLED:
        raise GraftError(
            f"data.labels has no effect if data.task is {config.task}: set data.task: classification, or remove it"
        )


def _template(config: DataConfig, tokenizer: Any) -> Template | None:
    """Return the template that renders conversations; None if the task has labels instead."""
    if config.task in LABELLED:
        return None
    if config.task == "seq2seq":
        return encoder_template(config.template, tokenizer, config.system, config.template_args)
    template = template_of(config.template, tokenizer, config.template_args).with_system(config.system)
    return replace(template, reads_tokens=True) if config.special_tokens == "tokens" else template


def _labelling_of(config: DataConfig, report: DataReport) -> Labelling:
    """Rebuild the labelling of cached data from their report."""
    return Labelling(
        config.task, tuple(label for label, _, _ in report.labels), tuple(name for _, name, _ in report.labels)
    )


def _prepare_anew(
    config: DataConfig,
    tokenizer: Any,
    template: Template | None,
    progress: Progress | None,
    classes: Sequence[str] | None,
    room: Callable[[], int | None],
) -> Prepared:
    """Prepare data that are not in the cache."""
    sources = train_sources(config)
    unread: dict[str, list[str]] = {}
    samples, held_out = samples_of(config, unread)
    known = template or Labelling.of(config, (sample for some in samples for sample in some), classes)

    outcomes = _tokenize_all([*samples, held_out], config, tokenizer, known, progress)
    by_source, validation = outcomes[:-1], outcomes[-1]
    check_lengths(config, [*zip(samples, by_source, strict=True), (held_out, validation)], room)
    examples = [_examples(found) for found in by_source]

    report = DataReport(
        train=count_outcomes("train", [one for found in by_source for one in found], config.max_length),
        sources=tuple(
            count_outcomes(source.path, found, config.max_length)
            for source, found in zip(sources, by_source, strict=True)
        ),
        validation=count_outcomes("validation", validation, config.max_length) if held_out else None,
        duplicates=count_duplicates(sample for some in samples for sample in some),
        shared=_count_shared(samples, held_out),
        max_length=config.max_length,
        labels=_classes(known, samples),
        pairs=any(sample.rejected for some in samples for sample in some),
        marked=_marks(examples),
        unread=tuple((source, tuple(columns)) for source, columns in unread.items()),
    )
    check_counts(report, sources, examples)
    notes = data_warnings(report, known)
    if template is not None:
        notes += template_notes([sample for some in samples for sample in some], config, template, tokenizer)
    report = replace(report, notes=tuple(notes))

    weights = [source.weight for source, kept in zip(sources, examples, strict=True) for _ in kept]
    trained, checked = [example for some in examples for example in some], _examples(validation)
    if report.marked:
        trained = with_mismatched(trained, config.max_length)
        checked = with_mismatched(checked, config.max_length) if held_out else []
    train = TokenDataset.of(trained, weights)
    refuse_unknown_targets(train, [sample for some in samples for sample in some], tokenizer)
    return Prepared(train, TokenDataset.of(checked) if held_out else None, known, report)


def _marks(examples: Sequence[Sequence[Example]]) -> tuple[int, int] | None:
    """Count the answers that are marked good, and those that are marked bad; None if they are not marked."""
    marks = Counter(example.desirable for some in examples for example in some if example.desirable is not None)
    return (marks[True], marks[False]) if marks else None


def _tokenize_all(
    groups: Sequence[Sequence[Sample]],
    config: DataConfig,
    tokenizer: Any,
    template: Template | Labelling,
    progress: Progress | None,
) -> list[list[Outcome]]:
    """Tokenise groups of samples, and call `progress` every 100 samples and at the end."""
    done, total = 0, sum(map(len, groups))
    outcomes: list[list[Outcome]] = []
    for samples in groups:
        outcomes.append([])
        for sample in samples:
            outcomes[-1] += _tokenized(sample, config, tokenizer, template)
            done += 1
            if progress is not None and (done % 100 == 0 or done == total):
                progress(done, total)
    return outcomes


def _examples(outcomes: Sequence[Outcome]) -> list[Example]:
    return [one for one in outcomes if isinstance(one, Example)]


def _classes(known: Template | Labelling, samples: Sequence[Sequence[Sample]]) -> tuple[tuple[str, str, int], ...]:
    """Return each class as the data write it, its name, and its number of training samples."""
    if not isinstance(known, Labelling):
        return ()
    found = Counter(known.number(sample) for some in samples for sample in some)
    return tuple((*pair, found[number]) for number, pair in enumerate(zip(known.labels, known.names, strict=True)))


def _tokenized(sample: Sample, config: DataConfig, tokenizer: Any, template: Template | Labelling) -> list[Outcome]:
    """Tokenise a sample the way its task needs; a document that is split gives several examples."""
    if sample.rollout is not None:
        return [_whole(sample, config, tokenizer, template)]
    keep_start = isinstance(template, Labelling | EncoderTemplate)
    short = shortened(sample, tokenizer, config.max_length, config.overlong, keep_start=keep_start)
    if isinstance(short, Rejected):
        return [short]
    sample, gone = short
    if config.overlong == "split":
        return tokenize_document(sample, tokenizer, template, config.max_length, config.train_on)  # type: ignore[arg-type]
    found = _whole(sample, config, tokenizer, template)
    return [replace(found, cut=found.cut + gone) if gone and isinstance(found, Example) else found]


def _whole(sample: Sample, config: DataConfig, tokenizer: Any, template: Template | Labelling) -> Outcome:
    if isinstance(template, Labelling):
        return template.example(sample, tokenizer, config.max_length, config.overlong)
    if isinstance(template, EncoderTemplate):
        return tokenize_seq2seq(sample, tokenizer, template, config.max_length, config.overlong)
    if sample.rollout is not None:
        return rollout_example(sample, config.max_length, config.overlong)
    if sample.desirable is not None:
        return tokenize_marked(sample, tokenizer, template, max_length=config.max_length, overlong=config.overlong)
    if config.task == "preference":
        return tokenize_pair(sample, tokenizer, template, max_length=config.max_length, overlong=config.overlong)
    return tokenize(
        sample,
        tokenizer,
        template,
        max_length=config.max_length,
        overlong=config.overlong,
        train_on=config.train_on,
    )


def _count_shared(samples: Sequence[Sequence[Sample]], held_out: Sequence[Sample]) -> int:
    """Count the validation samples that the training data hold too."""
    trained = {conversation_key(sample) for some in samples for sample in some} if held_out else set()
    return sum(conversation_key(sample) in trained for sample in held_out)


def _key(config: DataConfig, tokenizer: Any, template: Template | None, classes: Sequence[str] | None) -> str:
    """Return the cache key: a hash of everything that the tokens depend on."""
    own = validation_source(config)
    sources = [*train_sources(config), *([own] if own else [])]
    return cache.cache_key(
        {
            "sources": [
                [source.model_dump(), content_hash(source) or _rows_hash(source, config.task)] for source in sources
            ],
            "tokenizer": cache.tokenizer_hash(tokenizer),
            "template": None if template is None else template.digest,
            "classes": None if classes is None else list(classes),
            "settings": config.model_dump(
                mode="json", include={"task", "labels", "validation", "max_length", "overlong", "train_on", "seed"}
            ),
        }
    )


def _rows_hash(source: SourceConfig, task: str) -> str:
    rows = [conversation_key(sample) for sample in read(source, task=task)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
