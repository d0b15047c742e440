"""Results as they lie in folders: eval/<task>.<protocol hash>/{result.json, answers.jsonl}, read and compared.

Files are the truth: nothing is loaded or asked again. Only answers to the same questions under the same protocol hash are
compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.config.document import read_document
from graft.errors import GraftError, did_you_mean
from graft.evaluation.comparison import paired, pooled
from graft.jsonl import JsonLines, read_json

Question = tuple[str, int]
"""Its text, and which of equal ones it is."""


@dataclass(frozen=True)
class Answered:
    """What one contestant answered in one evaluation."""

    folder: Path
    task: str
    protocol: str
    protocol_hash: str
    contestant: str
    right: dict[Question, bool]
    settings: dict[str, Any]
    """Of the run and of the evaluation, by dotted names."""


def compare(first: str, second: str) -> dict[str, Any]:
    """Compare two sides, each "FOLDER", "FOLDER:CONTESTANT", or several seeds of one thing with commas between.

    Returns the differences (second minus first) per task and protocol, the settings that differ, and what could not be
    compared with the reason. Raises `GraftError` for folders without results, for different protocols, for different
    questions, and for sides of unequally many seeds.
    """
    sides = [[answered(text.strip()) for text in side.split(",")] for side in (first, second)]
    if len(sides[0]) != len(sides[1]):
        raise GraftError(
            f"{first} names {len(sides[0])} seeds, and {second} {len(sides[1])}: give equally many of both"
        )
    keys = [set.intersection(*({(one.task, one.protocol_hash) for one in seed} for seed in side)) for side in sides]
    shared = sorted(keys[0] & keys[1])
    skipped = _only_one(keys, (first, second))
    if not shared:
        _refuse(sides, first, second)
    chosen = [[[_at(seed, key) for seed in side] for side in sides] for key in shared]
    return {
        "first": first,
        "second": second,
        "tasks": [_compared(*pair) for pair in chosen],
        "settings": differing(*([one for pair in chosen for one in pair[side]] for side in (0, 1))),
        "skipped": skipped,
    }


def answered(text: str) -> list[Answered]:
    """All evaluations of a run folder, a folder of results, or one result, of the contestant named or the only adapter."""
    folder, name = Path(text), None
    if not folder.exists() and ":" in text:
        path, _, name = text.rpartition(":")
        folder = Path(path)
    if not folder.is_dir():
        raise GraftError(f"there is no folder {folder}")
    places = [folder] if (folder / "result.json").is_file() else sorted(
        path.parent for inner in ("eval", ".") for path in (folder / inner).glob("*/result.json")
    )  # fmt: skip
    if not places:
        raise GraftError(
            f"{folder} holds no results (eval/<task>.<hash>/result.json); make some with graft eval {folder}"
        )
    return [_read(place, name) for place in places]


def _read(folder: Path, wanted: str | None) -> Answered:
    result = read_json(folder / "result.json")
    described = {each["name"]: each for each in result["results"]}
    name = _contestant(folder, list(described), wanted)
    right: dict[Question, bool] = {}
    seen: Counter[str] = Counter()
    # Lines stand in the order in which answers came; equal questions are told apart by their order in the data.
    for line in sorted(JsonLines(folder / "answers.jsonl").read(), key=lambda line: line["row"]):
        if line["contestant"] == name and "outcome" in line:
            question = (line["question"], seen[line["question"]])
            right[question] = line["outcome"] == "correct"
            seen[line["question"]] += 1
    return Answered(
        folder, result["task"], result["protocol"]["name"], result["protocol_hash"], name, right,
        {**_run_settings(folder), **_evaluation_settings(result, described[name])},
    )  # fmt: skip


def _contestant(folder: Path, names: list[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in names:
            raise GraftError(f"{folder} has no '{wanted}'.{did_you_mean(wanted, names)} It has: {', '.join(names)}")
        return wanted
    adapters = [name for name in names if name != "base"] or names
    if len(adapters) > 1:
        raise GraftError(f"{folder} has {', '.join(names)}: say whose answers are meant, as in FOLDER:{adapters[0]}")
    return adapters[0]


def _run_settings(folder: Path) -> dict[str, Any]:
    """The configuration of the run that an evaluation lies in, if it lies in one."""
    config = folder.resolve().parent.parent / "config.yaml"
    return _flat(read_document(config).data) if config.is_file() else {}


def _evaluation_settings(result: dict[str, Any], contestant: dict[str, Any]) -> dict[str, Any]:
    base, template = result.get("base") or {}, contestant.get("template") or {}
    return {
        "evaluated.base": base.get("model") if isinstance(base, dict) else base,
        "evaluated.base_weights": base.get("digest") if isinstance(base, dict) else None,
        "evaluated.dtype": result.get("dtype"),
        "evaluated.template": template.get("digest"),
    }


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    inner = [_flat(each, f"{name}.{key}" if name else str(key)) for key, each in value.items()]
    return {key: each for part in inner for key, each in part.items()}


def differing(first: Sequence[Answered], second: Sequence[Answered]) -> dict[str, list[Any]]:
    """Settings that the sides do not share, with the values of each. Seeds that both sides went through are no difference."""
    found = {}
    for name in dict.fromkeys(name for one in (*first, *second) for name in one.settings):
        values = [
            list({repr(one.settings.get(name)): one.settings.get(name) for one in side}.values())
            for side in (first, second)
        ]
        if sorted(map(repr, values[0])) != sorted(map(repr, values[1])):
            found[name] = [each[0] if len(each) == 1 else each for each in values]
    return found


def _compared(first: Sequence[Answered], second: Sequence[Answered]) -> dict[str, Any]:
    """One task under one protocol."""
    one = first[0]
    questions = list(one.right)
    for other in (*first, *second):
        if set(other.right) != set(questions):
            raise GraftError(
                f"{one.folder} and {other.folder} answered different questions ({len(questions)} and {len(other.right)}, "
                f"{len(set(questions) & set(other.right))} of them the same): evaluate both on the same rows"
            )
    if not questions:
        raise GraftError(f"{one.folder} holds no answers that are right or wrong")
    rights = [[[answers.right[question] for question in questions] for answers in side] for side in (first, second)]
    accuracies = [[sum(right) / len(right) for right in side] for side in rights]
    if len(first) == 1:
        found = asdict(paired(rights[0][0], rights[1][0]))
    else:
        differences = [[float(b) - float(a) for a, b in zip(*pair, strict=True)] for pair in zip(*rights, strict=True)]
        found = {"total": len(questions), "seeds": len(first), **asdict(pooled(differences))}
        found["difference"] = found.pop("mean")
    return {
        "task": one.task,
        "protocol": one.protocol,
        "protocol_hash": one.protocol_hash,
        "first": sum(accuracies[0]) / len(first),
        "second": sum(accuracies[1]) / len(second),
        **found,
    }


def _at(seed: Sequence[Answered], key: tuple[str, str]) -> Answered:
    return next(one for one in seed if (one.task, one.protocol_hash) == key)


def _only_one(keys: Sequence[set[tuple[str, str]]], names: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {"task": task, "protocol_hash": protocol, "reason": f"only {name} has it"}
        for mine, other, name in ((keys[0], keys[1], names[0]), (keys[1], keys[0], names[1]))
        for task, protocol in sorted(mine - other)
    ]


def _refuse(sides: Sequence[Sequence[Sequence[Answered]]], first: str, second: str) -> None:
    """Nothing in common: say whether it is the tasks or the protocols."""
    known = [{one.task: one for seed in side for one in seed} for side in sides]
    for task in sorted(known[0].keys() & known[1].keys()):
        a, b = known[0][task], known[1][task]
        raise GraftError(
            f"'{task}' was answered under different protocols, whose scores are not comparable: {a.protocol} {a.protocol_hash} "
            f"in {first}, {b.protocol} {b.protocol_hash} in {second}"
        )
    raise GraftError(
        f"{first} and {second} have no task in common: {', '.join(sorted(known[0]))}; {', '.join(sorted(known[1]))}"
    )
