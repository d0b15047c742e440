"""Read results from folders, eval/<task>.<protocol hash>/{result.json, answers.jsonl}, without loading a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.config.document import read_document
from graft.errors import GraftError, did_you_mean
from graft.evaluation.journal import ANSWERS, RESULT, read_result
from graft.utils.jsonl import JsonLines

Question = tuple[str, int]
"""(text of the question, its number among questions with the same text)."""
NO_ADAPTER = "none"
"""The kind of adapter that the bare base has in comparisons."""


@dataclass(frozen=True)
class CandidateAnswers:
    """The answers and scores of one candidate in one evaluation."""

    folder: Path
    task: str
    protocol: dict[str, Any]
    protocol_hash: str
    candidate: str
    scores: dict[str, Any]
    """The candidate's entry in result.json."""
    lines: dict[Question, dict[str, Any]]
    """The candidate's lines of answers.jsonl."""
    settings: dict[str, Any]
    """Settings of the candidate and of the evaluation, by dotted names such as adapter.rank."""

    @property
    def key(self) -> tuple[str, str]:
        """Task and protocol hash. Only answers with the same key can be compared."""
        return self.task, self.protocol_hash

    @property
    def named_protocol(self) -> str:
        """The protocol's name and hash."""
        return f"{self.protocol['name']} {self.protocol_hash}"


def read_answers(text: str) -> list[CandidateAnswers]:
    """Read all evaluations in a run folder, a folder of results, or the folder of one result, for one candidate.

    text: "FOLDER:NAME", or "FOLDER" if there is only one adapter. Raises `GraftError` for a folder without results, for an
    unknown name, and for damaged files.
    """
    folder, name = Path(text), None
    if not folder.exists() and ":" in text:
        path, _, name = text.rpartition(":")
        folder = Path(path)
    if not folder.is_dir():
        raise GraftError(f"there is no folder {folder}")
    places = [folder] if (folder / RESULT).is_file() else _inside(folder, RESULT)
    if not places:
        begun = _inside(folder, ANSWERS)
        hint = f"; the evaluation in {begun[0]} is not finished: give its command again to continue it" if begun else ""
        raise GraftError(
            f"{folder} holds no results (eval/<task>.<hash>/{RESULT}){hint or f': run graft eval {folder}'}"
        )
    return [_read(place, name) for place in places]


def _inside(folder: Path, file: str) -> list[Path]:
    return sorted(path.parent for inner in ("eval", ".") for path in (folder / inner).glob(f"*/{file}"))


def _read(folder: Path, wanted: str | None) -> CandidateAnswers:
    result = read_result(folder)
    scores = {each["name"]: each for each in result["results"]}
    name = _choose_candidate(folder, list(scores), wanted)
    lines: dict[Question, dict[str, Any]] = {}
    seen: Counter[str] = Counter()
    # Two questions can have the same text; their order in the data tells them apart.
    for line in _lines(folder, name):
        lines[line["question"], seen[line["question"]]] = line
        seen[line["question"]] += 1
    if len(lines) != scores[name]["total"]:
        raise GraftError(
            f"{folder / ANSWERS} holds {len(lines)} answers of '{name}', but {RESULT} counts {scores[name]['total']}: "
            "the evaluation is damaged, so run it again with --overwrite"
        )
    return CandidateAnswers(
        folder, result["task"], result["protocol"], result["protocol_hash"], name, scores[name], lines,
        {**_candidate_settings(folder, scores[name]), **_evaluation_settings(result, scores[name])},
    )  # fmt: skip


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the answers of a candidate in the order of the data."""
    found = []
    for number, line in enumerate(JsonLines(folder / ANSWERS).read(), start=1):
        lacking = [key for key in ("contestant", "row", "question", "outcome") if key not in line]
        if lacking:
            raise GraftError(f"{folder / ANSWERS}:{number} is not an answer: it has no {', '.join(lacking)}")
        if line["contestant"] == name:
            found.append(line)
    return sorted(found, key=lambda line: line["row"])


def _choose_candidate(folder: Path, names: list[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in names:
            raise GraftError(f"{folder} has no '{wanted}'.{did_you_mean(wanted, names)} It has: {', '.join(names)}")
        return wanted
    adapters = [name for name in names if name != "base"] or names
    if len(adapters) > 1:
        raise GraftError(f"{folder} holds answers of {', '.join(names)}: name one, as in FOLDER:{adapters[0]}")
    return adapters[0]


def _candidate_settings(folder: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a candidate and of its training, from the result or, in older results, from the run's config."""
    name = {"contestant": scores["name"]}
    if scores["name"] == "base":
        return {**name, "adapter.kind": NO_ADAPTER}
    if "adapter" in scores:
        trained = scores.get("trained") or {}
        adapter = scores["adapter"]
        if adapter is None and trained:  # a run that trained its base
            adapter = {"kind": f"{NO_ADAPTER}, the base trained ({trained['train']['method']['kind']})"}
        return {**name, **_flat({"adapter": adapter, **trained})}
    config = folder.resolve().parent.parent / "config.yaml"
    return {**name, **(_flat(read_document(config).data) if config.is_file() else {})}


def _evaluation_settings(result: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    base, template = result.get("base") or {}, scores.get("template") or {}
    return {
        "evaluated.base": base.get("model") if isinstance(base, dict) else base,
        "evaluated.base_weights": base.get("digest") if isinstance(base, dict) else None,
        "evaluated.dtype": result.get("dtype"),
        "evaluated.template": template.get("digest"),
    }


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested mappings: {"adapter": {"rank": 8}} becomes {"adapter.rank": 8}."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    inner = [_flat(each, f"{name}.{key}" if name else str(key)) for key, each in value.items()]
    return {key: each for part in inner for key, each in part.items()}
