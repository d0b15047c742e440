"""Run the contract on adapter kinds: every config on every family, against every promise."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graft.adapters.base import AdapterConfig
from graft.adapters.parsing import parse
from graft.adapters.presets import Preset
from graft.adapters.registry import entries, kind_class, register
from graft.errors import GraftError, did_you_mean
from graft.testing.bases import DEFAULT_FAMILIES, FAMILIES, QUANTISED
from graft.testing.case import Case, DoesNotApply
from graft.testing.checks import CHECKS, Check
from graft.testing.fresh_process import FreshProcess
from graft.testing.kind_files import example_of

Outcome = Literal["passed", "failed", "does not apply"]


@dataclass(frozen=True)
class Row:
    """The outcome of one check on one case."""

    check: str
    family: str
    variant: str
    outcome: Outcome
    message: str
    """What was promised and what was found, or why the check does not apply; empty where it passed."""
    seconds: float


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks. `str()` is a table per config, followed by what is broken."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether no promise is broken."""
        return not self.failures

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows of broken promises."""
        return tuple(row for row in self.rows if row.outcome == "failed")

    @property
    def variants(self) -> tuple[str, ...]:
        """The configs in the order in which they ran."""
        return tuple(dict.fromkeys(row.variant for row in self.rows))

    def table(self, variant: str) -> tuple[list[str], list[list[str]]]:
        """Return the columns and lines of one config: a line per check, a column per family."""
        rows = [row for row in self.rows if row.variant == variant]
        families = list(dict.fromkeys(row.family for row in rows))
        cells = {(row.check, row.family): "-" if row.outcome == "does not apply" else row.outcome for row in rows}
        checks = list(dict.fromkeys(row.check for row in rows))
        lines = [
            [check.replace("_", " "), *(cells.get((check, family), "-") for family in families)] for check in checks
        ]
        return ["check", *families], lines

    def notes(self, variant: str) -> list[str]:
        """Return a line per broken promise and one per reason for which a check does not apply."""
        rows = [row for row in self.rows if row.variant == variant]
        broken = [f"failed: {_words(row)} on {row.family}: {row.message}" for row in rows if row.outcome == "failed"]
        reasons: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # reason -> (checks, families), in order
        for row in rows:
            if row.outcome == "does not apply":
                checks, families = reasons.setdefault(row.message, ({}, {}))
                checks[_words(row)] = families[row.family] = None
        return broken + [
            f"does not apply (-): {'; '.join(checks)} on {', '.join(families)}: {reason}"
            for reason, (checks, families) in reasons.items()
        ]

    def counts(self, variant: str) -> str:
        """Return how many checks of a config passed, failed and do not apply, and how long they took."""
        rows = [row for row in self.rows if row.variant == variant]
        number = Counter(row.outcome for row in rows)
        seconds = sum(row.seconds for row in rows)
        return f"{number['passed']} passed, {number['failed']} failed, {number['does not apply']} do not apply, in {seconds:.1f} s"

    def __str__(self) -> str:
        blocks = []
        for variant in self.variants:
            columns, lines = self.table(variant)
            widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]
            table = [
                "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in (columns, *lines)
            ]
            blocks.append("\n".join([f"{variant}: {self.counts(variant)}", *table, *self.notes(variant)]))
        return "\n\n".join(blocks)


class Contract:
    """The cases of one run, with what they share: one fresh process, and the knowledge of where each config attaches."""

    def __init__(self, kinds: Any, families: Iterable[str] = DEFAULT_FAMILIES) -> None:
        """Raises `GraftError` for an unknown family or kind, and for what is neither a kind nor a config."""
        families = list(families)
        for family in families:
            if family not in (known := (*FAMILIES, *QUANTISED)):
                raise GraftError(
                    f"there is no tiny base '{family}'.{did_you_mean(family, known)} There are: {', '.join(known)}"
                )
        process, self._refusals = FreshProcess(), {}
        configs = _configs(kinds)
        names = _labels(configs)
        self.cases = [
            process.add(Case(family, name, config))
            for name, config in zip(names, configs, strict=True)
            for family in families
        ]

    def refusal(self, case: Case) -> str | None:
        """Return why a config does not attach to a family, or None where it does."""
        if case.id not in self._refusals:
            try:
                CHECKS["attaches"](case)
                self._refusals[case.id] = None
            except DoesNotApply as reason:
                self._refusals[case.id] = str(reason)
        return self._refusals[case.id]

    def run(self, check: Check, case: Case) -> None:
        """Run one check. Raises AssertionError for a broken promise and `DoesNotApply`. A config has to attach to one family at least."""
        refused = self.refusal(case)
        if refused is None:
            if check.name != "attaches":
                check(case)
            return
        others = [other for other in self.cases if other.variant == case.variant]
        if check.name == "attaches" and all(self.refusal(other) is not None for other in others):
            raise AssertionError(
                f"the adapter attaches to none of {', '.join(each.family for each in others)}: {refused}"
            )
        raise DoesNotApply(refused)


def run_contract(
    kinds: Any,
    families: Iterable[str] = DEFAULT_FAMILIES,
    *,
    checks: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Run the contract and return the report.

    kinds: a config class, a config, a kind's name, or several of these. A class is registered and tested with its `example()`.
    families: tiny bases of `graft.testing.FAMILIES`. checks: names of checks; None: all. progress: called with a line per check.
    Raises `GraftError` for an unknown kind, family or check; what the kinds themselves do wrong is in the report.
    """
    chosen = _checks(checks)
    contract, rows = Contract(kinds, families), []
    for case in contract.cases:
        for check in chosen:
            if progress is not None:
                progress(f"{case.variant} on {case.family}: {check.name.replace('_', ' ')}")
            start = time.perf_counter()
            outcome, message = _outcome(contract, check, case)
            rows.append(Row(check.name, case.family, case.variant, outcome, message, time.perf_counter() - start))
            if check.name == "attaches" and outcome != "passed":
                break  # the other checks would repeat the same reason
    return Report(tuple(rows))


def _outcome(contract: Contract, check: Check, case: Case) -> tuple[Outcome, str]:
    try:
        contract.run(check, case)
    except DoesNotApply as reason:
        return "does not apply", str(reason)
    except AssertionError as broken:
        return "failed", str(broken) or _place(broken)
    except Exception as error:  # a stranger's kind may fail in any way
        return "failed", f"{check.promise} It raised {type(error).__name__}: {error} {_place(error)}"
    return "passed", ""


def _place(error: BaseException) -> str:
    """Return where an error was raised, as "(file.py, line 7)"."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"({last.filename}, line {last.lineno})"


def _words(row: Row) -> str:
    return row.check.replace("_", " ")


def _checks(names: Iterable[str] | None) -> list[Check]:
    if names is None:
        return list(CHECKS.values())
    names = list(names)
    for name in names:
        if name not in CHECKS:
            raise GraftError(f"there is no check '{name}'.{did_you_mean(name, CHECKS)} There are: {', '.join(CHECKS)}")
    return [CHECKS[name] for name in CHECKS if name in names or name == "attaches"]


def _configs(kinds: Any) -> list[AdapterConfig | Preset]:
    if isinstance(kinds, Sequence) and not isinstance(kinds, str):
        return [config for each in kinds for config in _configs(each)]
    if isinstance(kinds, str) and kinds in entries():
        return [example_of(kind_class(kinds))]
    if isinstance(kinds, type) and issubclass(kinds, AdapterConfig):
        register(kinds)
        return [example_of(kinds)]
    if isinstance(kinds, AdapterConfig):
        for part in kinds.parts():
            if part.kind not in entries():
                register(type(part))
    return [parse(kinds)]


def _labels(configs: Sequence[AdapterConfig | Preset]) -> list[str]:
    """Name each config by its kind and what differs from the defaults; a number keeps two names apart."""
    seen, found = Counter(), []
    for config in configs:
        label = label_of(config)
        seen[label] += 1
        found.append(label if seen[label] == 1 else f"{label} #{seen[label]}")
    return found


def label_of(config: AdapterConfig | Preset) -> str:
    """Return a config's kind and its settings that are not the defaults, such as "lora(rank=4)"."""
    if isinstance(config, Preset):
        return config.preset
    changed = config.model_dump(exclude_defaults=True, exclude={"kind"})
    default = type(config).model_validate(type(config).example()).model_dump(exclude={"kind"})
    shown = ", ".join(f"{name}={value}" for name, value in changed.items() if default.get(name) != value)
    return f"{config.kind}({shown})" if shown else config.kind
