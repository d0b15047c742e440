"""From a run's data settings to tokenised training and validation data, with a report."""

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
from graft.data.labelling import LABELLED, Labelling
from graft.data.pairs import tokenize_pair
from graft.data.reading import content_hash, read
from graft.data.report import DataReport, conversation_key, count_duplicates, count_outcomes
from graft.data.samples import Example, Rejected, Sample
from graft.data.seq2seq import EncoderTemplate, encoder_template, tokenize_seq2seq
from graft.data.template import Template
from graft.data.templates import template_of
from graft.data.tokenizing import tokenize
from graft.data.warnings import data_warnings
from graft.errors import GraftError

Outcome = Example | Rejected
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """Data ready for training."""

    train: TokenDataset
    validation: TokenDataset | None
    template: Template | Labelling
    """Save it beside the adapter: evaluation and chat write conversations out with it, or know the classes by it."""
    report: DataReport
    cached: bool = False
    """The tokens come from the cache."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in their order; none where there are none."""
        return self.template.names if isinstance(self.template, Labelling) else ()


def prepare(
    config: DataConfig,
    tokenizer: Any,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    classes: Sequence[str] | None = None,
) -> Prepared:
    """Read, split, write out and tokenise the data of a run.

    With a `cache_dir` (and `config.cache`) tokens are kept there. `progress(done, rows)` is called now and then.
    classes: names of the classes in the order that the base's own head has them, followed where they are those of the data.
    Raises `GraftError` for data that cannot be read or written out, for samples longer than `max_length` where
    `overlong` is error, and where nothing is left to train on.
    """
    _check_task(config, tokenizer)
    template = _template(config, tokenizer)
    folder = cache_dir if config.cache else None
    key, note = "", None
    if folder is not None:
        key = _key(config, tokenizer, template, classes)
        stored, note = cache.fetch(folder, key)
        if stored is not None:
            known = template or _labelling_of(config, stored[2])
            return Prepared(stored[0], stored[1], known, stored[2], cached=True)
    prepared = _prepared(config, tokenizer, template, progress, classes)
    if folder is not None:
        cache.store(folder, key, (prepared.train, prepared.validation, prepared.report))
    if note:
        prepared = replace(prepared, report=replace(prepared.report, notes=(*prepared.report.notes, note)))
    return prepared


def _check_task(config: DataConfig, tokenizer: Any) -> None:
    """An unfit tokenizer, and a setting without effect, are errors before anything is read."""
    if config.task not in LABELLED:
        facts_of(tokenizer)
    elif not getattr(tokenizer, "is_fast", False):
        raise GraftError(f"data.task {config.task} needs a fast (Rust) tokenizer")
    answers = (*LABELLED, "seq2seq", "preference")
    for name, tasks in (("template", LABELLED), ("system", LABELLED), ("train_on", answers)):
        if config.task in tasks and getattr(config, name) != DataConfig.model_fields[name].default:
            raise GraftError(f"data.{name} has no effect where data.task is {config.task}: remove it")
    if config.labels is not None and config.task not in LABELLED:
        raise GraftError(
            f"data.labels has no effect where data.task is {config.task}: set data.task: classification, or remove it"
        )


def _template(config: DataConfig, tokenizer: Any) -> Template | None:
    """How conversations are written out; None where there are labels instead."""
    if config.task in LABELLED:
        return None
    if config.task == "seq2seq":
        return encoder_template(config.template, tokenizer, config.system)
    return template_of(config.template, tokenizer).with_system(config.system)


def _labelling_of(config: DataConfig, report: DataReport) -> Labelling:
    """The labelling of data that come from the cache."""
    return Labelling(
        config.task, tuple(label for label, _, _ in report.labels), tuple(name for _, name, _ in report.labels)
    )


def _prepared(
    config: DataConfig,
    tokenizer: Any,
    template: Template | None,
    progress: Progress | None,
    classes: Sequence[str] | None,
) -> Prepared:
    sources = train_sources(config)
    rows, held_out = samples_of(config)
    known = template or Labelling.of(config, (sample for some in rows for sample in some), classes)
    done, total = 0, sum(map(len, rows)) + len(held_out)

    def outcomes(samples: Sequence[Sample]) -> list[Outcome]:
        nonlocal done
        found: list[Outcome] = []
        for sample in samples:
            found.append(_tokenized(sample, config, tokenizer, known))
            done += 1
            if progress is not None and (done % 100 == 0 or done == total):
                progress(done, total)
        return found

    by_source = [outcomes(samples) for samples in rows]
    validation = outcomes(held_out)
    _check_lengths(config, [*zip(rows, by_source, strict=True), (held_out, validation)])
    examples = [[one for one in found if isinstance(one, Example)] for found in by_source]
    weights = [source.weight for source, kept in zip(sources, examples, strict=True) for _ in kept]
    everything = [one for found in by_source for one in found]
    report = DataReport(
        train=count_outcomes("train", everything, config.max_length),
        sources=tuple(
            count_outcomes(source.path, found, config.max_length)
            for source, found in zip(sources, by_source, strict=True)
        ),
        validation=count_outcomes("validation", validation, config.max_length) if held_out else None,
        duplicates=count_duplicates(sample for samples in rows for sample in samples),
        shared=_shared(rows, held_out),
        max_length=config.max_length,
        labels=_classes(known, rows),
        pairs=config.task == "preference",
    )
    _check_counts(report, sources, examples)
    kept = [one for one in validation if isinstance(one, Example)]
    train = TokenDataset.of([example for some in examples for example in some], weights)
    report = replace(report, notes=tuple(data_warnings(report, known, tokenizer)))
    return Prepared(train, TokenDataset.of(kept) if held_out else None, known, report)


def _classes(known: Template | Labelling, rows: Sequence[Sequence[Sample]]) -> tuple[tuple[str, str, int], ...]:
    """Each class with the number of training samples of it."""
    if not isinstance(known, Labelling):
        return ()
    found = Counter(known.number(sample) for some in rows for sample in some)
    return tuple((*pair, found[number]) for number, pair in enumerate(zip(known.labels, known.names, strict=True)))


def samples_of(config: DataConfig) -> tuple[list[list[Sample]], list[Sample]]:
    """The training conversations by source, and the validation conversations, as they are before tokenising."""
    return _split(config, [read(source, task=config.task) for source in train_sources(config)])


def train_sources(config: DataConfig) -> list[SourceConfig]:
    """The training data as a list of sources."""
    listed = config.train if isinstance(config.train, list) else [config.train]
    return [SourceConfig(path=source) if isinstance(source, str) else source for source in listed]


def validation_source(config: DataConfig) -> SourceConfig | None:
    """The source of the validation data, where they are a data set of their own."""
    value = config.validation
    return SourceConfig(path=value) if isinstance(value, str) else value if isinstance(value, SourceConfig) else None


def _split(config: DataConfig, rows: list[list[Sample]]) -> tuple[list[list[Sample]], list[Sample]]:
    """Training rows by source, and validation rows.

    Held out are the rows with the smallest hashes of (seed, conversation): the same rows whatever their order, and
    repetitions of a row on the same side.
    """
    source = validation_source(config)
    if source is not None:
        return rows, read(source, task=config.task)
    share = config.validation
    if not share:
        return rows, []
    total = sum(map(len, rows))
    wanted = max(1, round(share * total)) if isinstance(share, float) else share
    if not isinstance(wanted, int) or wanted >= total:
        raise GraftError(f"data.validation is {share}, but there are only {total} samples to take it from")
    ranked = sorted(
        (_rank(config.seed, sample), at, row) for at, some in enumerate(rows) for row, sample in enumerate(some)
    )
    chosen = {(at, row) for _, at, row in ranked[:wanted]}
    kept = [[one for row, one in enumerate(some) if (at, row) not in chosen] for at, some in enumerate(rows)]
    return kept, [rows[at][row] for at, row in sorted(chosen)]


def _rank(seed: int, sample: Sample) -> str:
    return hashlib.sha256(f"{seed} {json.dumps(conversation_key(sample))}".encode()).hexdigest()


def _tokenized(sample: Sample, config: DataConfig, tokenizer: Any, template: Template | Labelling) -> Outcome:
    if isinstance(template, Labelling):
        return template.example(sample, tokenizer, config.max_length, config.overlong)
    if isinstance(template, EncoderTemplate):
        return tokenize_seq2seq(sample, tokenizer, template, config.max_length, config.overlong)
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


def _check_lengths(config: DataConfig, parts: Sequence[tuple[Sequence[Sample], Sequence[Outcome]]]) -> None:
    """Stop at overlong samples where that is what the user wants."""
    if config.overlong != "error":
        return
    pairs = [pair for samples, found in parts for pair in zip(samples, found, strict=True)]
    long = [(one.length, sample) for sample, one in pairs if isinstance(one, Rejected) and one.reason == "overlong"]
    if not long:
        return
    longest, sample = max(long, key=lambda pair: pair[0])
    raise GraftError(
        f"{len(long):,} of {len(pairs):,} samples are longer than data.max_length={config.max_length} tokens; the longest "
        f"has {longest:,} ({sample.where}). Choose one:\n"
        f"  data.max_length={-(-longest // 8) * 8:<13} keeps every sample whole\n"
        "  data.overlong=drop            leaves these samples out\n"
        "  data.overlong=truncate_prompt shortens their questions, never an answer"
    )


def _check_counts(report: DataReport, sources: Sequence[SourceConfig], examples: Sequence[Sequence[Example]]) -> None:
    """Nothing left to train on, or to validate on, is an error."""
    for counts in (report.train, *([report.validation] if report.validation else [])):
        if not counts.targets:
            raise GraftError(
                f"{counts.name}: no token is left to train on. Of {counts.rows:,} rows, {counts.dropped:,} are longer than "
                f"data.max_length={report.max_length}, {counts.empty:,} have an empty answer, {counts.unanswered:,} none"
                + (f", {counts.same:,} prefer an answer to itself" if report.pairs else "")
            )
    for source, kept in zip(sources, examples, strict=True):
        if kept and round(source.weight * len(kept)) < 1:
            raise GraftError(f"{source.path}: weight {source.weight} of {len(kept)} samples is less than one per epoch")


def _shared(rows: Sequence[Sequence[Sample]], held_out: Sequence[Sample]) -> int:
    trained = {conversation_key(sample) for samples in rows for sample in samples} if held_out else set()
    return sum(conversation_key(sample) in trained for sample in held_out)


def _key(config: DataConfig, tokenizer: Any, template: Template | None, classes: Sequence[str] | None) -> str:
    """Everything that the tokens depend on."""
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
