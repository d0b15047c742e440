"""Who the clients are and which rows each has: a file each, or the rows of one data set dealt by a Dirichlet distribution.

Dirichlet (Hsu et al. 2019, arXiv 1909.06335): for each value of a label, the clients' shares of its rows are drawn from Dir(alpha). A
client that has its part of all rows already gets no more, so that no client gets nearly everything.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from graft.data.datasets import TokenDataset
from graft.data.file_readers import read_rows
from graft.data.folders import local_files
from graft.data.reading import text_format
from graft.data.splits import train_sources
from graft.errors import GraftError, counted, did_you_mean, listed
from graft.federation.definition import Federation

TRIES = 1000
"""Draws until every client has enough rows."""
_DOMAIN = 0x4445414C
"""Keeps these draws apart from others that come from the same seed."""


def clients_of(federation: Federation, rows: TokenDataset) -> dict[str, TokenDataset]:
    """Return each client's rows by its name. rows: all training rows. Raises `GraftError` for clients without rows."""
    split = _by_file if federation.config.clients.split == "files" else _dealt
    return {
        name: TokenDataset.of([rows[int(at)] for at in chosen], rows.weights[chosen].tolist())
        for name, chosen in split(federation, rows).items()
    }


def _by_file(federation: Federation, rows: TokenDataset) -> dict[str, list[int]]:
    files = [str(file) for source in train_sources(federation.config.data) for file in local_files(source) or ()]
    if not files:
        raise GraftError("clients.split is files, but data.train names no files: name some, or a folder of them")
    names = [Path(file).name.split(".")[0] for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise GraftError(f"two files of data.train are named '{twice}', and so would two clients be: rename one")
    found: dict[str, list[int]] = {file: [] for file in files}
    for at in range(len(rows)):
        found[rows.sources[rows.source[at]]].append(at)
    empty = [Path(file).name for file, own in found.items() if not own]
    if empty:
        raise GraftError(
            f"{listed(empty)}: no row is left to train on for {counted(len(empty), 'client')} (of what is in the file, rows may be held "
            "out for validation or be too long): give every client rows, or take its file out"
        )
    return {name: found[file] for name, file in zip(names, files, strict=True)}


def _dealt(federation: Federation, rows: TokenDataset) -> dict[str, list[int]]:
    clients, seed = federation.config.clients, federation.config.seed
    count, least, alpha = clients.count or 1, clients.least or 2, clients.alpha or 0.5
    if len(rows) < count * least:
        raise GraftError(
            f"clients.count is {count}, each with at least {counted(least, 'row')} (clients.least), but data.train has only {len(rows)}"
        )
    labels = np.array(_labels(federation, rows))
    random = np.random.default_rng((_DOMAIN, seed))
    for _ in range(TRIES):
        dealt = _draw(labels, count, alpha, random)
        if min(map(len, dealt)) >= least:
            width = len(str(count - 1))
            return {f"client-{number:0{width}}": sorted(own) for number, own in enumerate(dealt)}
    raise GraftError(
        f"none of {TRIES} deals of {len(rows)} rows to {counted(count, 'client')} gave each {counted(least, 'row')}: raise clients.alpha "
        f"({alpha:g}), or lower clients.count or clients.least"
    )


def _draw(labels: np.ndarray, count: int, alpha: float, random: np.random.Generator) -> list[list[int]]:
    """Deal the rows of each label. E.g. shares .5, .2 and .3 of 10 rows are the rows 0-4, 5-6 and 7-9 of their random order."""
    dealt: list[list[int]] = [[] for _ in range(count)]
    for label in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == label))
        shares = random.dirichlet([alpha] * count) * [len(each) < len(labels) / count for each in dealt]
        total = shares.sum()
        shares = shares / total if total > 0 else np.full(count, 1 / count)
        cuts = (np.cumsum(shares)[:-1] * len(own)).astype(int)
        for each, part in zip(dealt, np.split(own, cuts), strict=True):
            each.extend(part.tolist())
    return dealt


def _labels(federation: Federation, rows: TokenDataset) -> list[str]:
    """The label of each row, read from the files again."""
    column = federation.config.clients.label
    assert column is not None
    found: dict[str, list[str]] = {}
    for source in train_sources(federation.config.data):
        files = local_files(source)
        if files is None:
            raise GraftError(
                f"clients.label is read from files, and {source.path} is none: save the data set as a file"
            )
        for file in files:
            read = read_rows(file, text_format(source))
            columns = list(dict.fromkeys(key for row in read for key in row))
            if column not in columns:
                raise GraftError(
                    f"clients.label: {file} has no column '{column}'.{did_you_mean(column, columns)} It has {', '.join(columns)}"
                )
            found[str(file)] = [str(row.get(column)) for row in read]
    return [found[rows.sources[source]][row - 1] for source, row in zip(rows.source, rows.rows, strict=True)]
