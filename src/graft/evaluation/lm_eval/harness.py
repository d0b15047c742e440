"""Ask a base and its adapters lm-eval's tasks, and keep what it finds as every other evaluation keeps its results.

A task is asked contestant by contestant, since lm-eval asks one model at a time; groups are asked task by task. What is finished
is not asked again: the scores of a contestant on a task are written (scores.json, flushed to the disk) behind its answers, and a
contestant without scores is asked anew. The protocol of a result is lm-eval's version and the task's own definition; its hash
stands in the folder's name, so that results of other prompts never share a folder.

The accuracy of a task is its first metric under its first filter, where that is 0 or 1 for every question; all metrics
with lm-eval's standard errors stand beside it. lm-eval cuts prompts that do not fit the context from the left; `cut` counts them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import _graft_lm_eval
from graft.attaching.active import use
from graft.data.overlap import Question
from graft.errors import GraftError, did_you_mean, require
from graft.evaluation.answering import about, folder_of
from graft.evaluation.journal import Journal
from graft.evaluation.lm_eval.model import HFLM
from graft.evaluation.overlaps import known_overlaps
from graft.evaluation.protocols.base import Judgement
from graft.evaluation.scoring import outcomes
from graft.evaluation.statistics import bootstrap_interval
from graft.evaluation.tables import averages
from graft.generation.loaded import Candidate, LoadedModel
from graft.utils.files import write_json_atomic
from graft.utils.jsonl import read_json

lm_eval: Any = require("lm_eval", "eval")

SCORES = "scores.json"
"""Beside the files of every evaluation: contestant -> {"questions", "cut", "seconds", "metrics"}."""
DEFAULT_NEW_TOKENS = 256
"""What lm-eval lets a model write where the task does not say."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def harness(
    loaded: LoadedModel,
    names: Sequence[str],
    data: str | Path | None = None,
    out: Path | None = None,
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    each: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Results as `evaluate_tasks` gives them: one per task with an entry per contestant, and the averages.

    names: of lm-eval's tasks and groups. data: folder of the files of the graft_* tasks (None: the hub). out: folder of results;
    answers.jsonl and result.json go to <task>.<protocol hash> in it. fewshot: examples before a question, where the task
    leaves that open. each: what to do with a result when it is there.
    Raises `GraftError` before anything is asked: for a task that lm-eval does not know, for data that it cannot load, and for a
    task that wants longer answers than the context of the base holds.
    """
    manager = _manager(data)
    asked = {name: _Asked(manager, name, task, limit, fewshot) for name, task in _load(manager, names).items()}
    overlaps = known_overlaps(loaded, {name: each.questions() for name, each in asked.items()})
    results = []
    for name, one in asked.items():
        result = _evaluated(loaded, one, out, batch_size, overwrite, limit, overlaps[name])
        results.append(result)
        if each is not None:
            each(result)
    return {"protocol": "lm-eval", "tasks": results, "absent": [], "averages": averages(results)}


def _manager(data: str | Path | None) -> Any:
    """lm-eval's own, which knows Graft's tasks too. Making one takes seconds: it reads thousands of definitions."""
    import lm_eval.tasks.manager as home
    from lm_eval.tasks import TaskManager

    _graft_lm_eval.add_tasks(home)
    return TaskManager(metadata={} if data is None else {"data": str(data)})


def _load(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """The tasks by name, those of groups one by one."""
    unknown = next((name for name in names if name not in manager.all_tasks), None)
    if unknown is not None:
        raise GraftError(
            f"lm-eval has no task '{unknown}'.{did_you_mean(unknown, manager.all_tasks)} (lm_eval ls tasks)"
        )
    try:
        return manager.load(list(names))["tasks"]
    except (OSError, ImportError) as error:
        raise GraftError(f"lm-eval cannot load the data of {', '.join(names)}: {error}") from error


class _Asked:
    """A task of lm-eval with the questions that are asked of it."""

    def __init__(self, manager: Any, name: str, task: Any, limit: int | None, fewshot: int | None) -> None:
        self.manager, self.name, self.task, self.limit = manager, name, task, limit
        fixed = task.get_config("num_fewshot")
        self.fewshot = fixed if fewshot is None or fixed == 0 else fewshot
        docs = [doc for _, doc in task.doc_iterator(limit=limit)]
        self.source = str(task.get_config("dataset_path") or name)
        self.items = [(_query(task, doc), str(task.doc_to_target(doc))) for doc in docs]
        if not self.items:
            raise GraftError(f"lm-eval's task '{name}' has no questions")

    def questions(self) -> list[Question]:
        return [Question(text, f"{self.source}, row {row}") for row, (text, _) in enumerate(self.items, start=1)]

    @property
    def new_tokens(self) -> int:
        """0 where nothing is generated."""
        if self.task.OUTPUT_TYPE != "generate_until":
            return 0
        return (self.task.get_config("generation_kwargs") or {}).get("max_gen_toks", DEFAULT_NEW_TOKENS)

    def protocol(self) -> dict[str, Any]:
        """Everything that a score depends on besides the models and the rows."""
        config = dict(self.task.dump_config())
        version = (config.pop("metadata", None) or {}).get("version")
        config["num_fewshot"] = self.fewshot or 0
        definition = _ADDRESS.sub("", json.dumps(config, sort_keys=True, default=str))
        return {
            "name": "lm-eval",
            "version": lm_eval.__version__,
            "task_version": version,
            "num_fewshot": config["num_fewshot"],
            "definition": hashlib.sha256(definition.encode()).hexdigest()[:16],
        }


def _query(task: Any, doc: Any) -> str:
    """The question of a row, without the words that every prompt of the task has, where the task knows it."""
    if task.get_config("should_decontaminate"):
        return str(task.doc_to_decontamination_query(doc))
    known = next(
        (doc[key] for key in ("question", "query") if isinstance(doc, dict) and isinstance(doc.get(key), str)), None
    )
    return known if known is not None else str(task.doc_to_text(doc))


def _evaluated(
    loaded: LoadedModel,
    asked: _Asked,
    out: Path | None,
    batch_size: int,
    overwrite: bool,
    limit: int | None,
    overlap: list[dict[str, Any]],
) -> dict[str, Any]:
    """One task: ask whoever has not been asked, and write the result."""
    protocol = asked.protocol()
    name = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
    folder = folder_of(out, asked.name, name)
    head = {**about(loaded, asked.name, protocol, name), "engine": "lm-eval"}
    for candidate in head["contestants"].values():
        candidate["template"] = None  # the prompts are lm-eval's
    with Journal(folder, head, asked.items, overwrite=overwrite) as journal:
        scores = _finished(folder, len(asked.items), overwrite)
        for candidate in loaded.candidates:
            if candidate.name not in scores:
                lines, scores[candidate.name] = _ask(loaded, candidate, asked, batch_size)
                for line in lines:
                    if (line["contestant"], line["number"]) not in journal.answers:
                        journal.append(line)
                journal.sync()
                if folder is not None:
                    write_json_atomic(folder / SCORES, scores)
        results = [
            {**head["contestants"][who.name], **_counted(who, asked, journal), **scores[who.name]}
            for who in loaded.candidates
        ]
        result = {
            **{key: value for key, value in head.items() if key != "contestants"},
            "source": asked.source,
            "limit": limit,
            "overlap": overlap,
            "self_checked": None,
            "continued_from": journal.kept,
            "seconds": round(journal.seconds, 3),
            "results": results,
        }
        journal.finish(result)
    return {**result, "folder": None if folder is None else str(folder)}


def _finished(folder: Path | None, questions: int, overwrite: bool) -> dict[str, Any]:
    """The scores of earlier processes on as many questions."""
    if folder is None or not (folder / SCORES).exists():
        return {}
    if overwrite:
        (folder / SCORES).unlink()
        return {}
    return {name: scores for name, scores in read_json(folder / SCORES).items() if scores["questions"] == questions}


def _ask(
    loaded: LoadedModel, candidate: Candidate, asked: _Asked, batch_size: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """lm-eval itself: the answers of one contestant to one task, and its scores."""
    from lm_eval.evaluator import simple_evaluate

    start = time.perf_counter()
    model = _model(loaded, batch_size)
    if asked.new_tokens >= model.max_length:
        raise GraftError(
            f"lm-eval's task '{asked.name}' lets a model write {asked.new_tokens} tokens, and the context of this base holds "
            f"{model.max_length} with the prompt: choose another task or a base with a longer context"
        )
    only = use(loaded.base.model, candidate.adapter) if loaded.adapters else nullcontext()
    with only:
        found: Any = simple_evaluate(
            model=model, tasks=[asked.task], num_fewshot=asked.fewshot, limit=asked.limit, task_manager=asked.manager,
            log_samples=True, bootstrap_iters=1000,
        )  # fmt: skip
    assert found is not None  # None is for the other processes of a distributed evaluation
    samples = found["samples"][asked.name]
    first = samples[0]["filter"]
    rows = sorted((sample for sample in samples if sample["filter"] == first), key=lambda sample: sample["doc_id"])
    scores = {
        "questions": len(rows),
        "cut": sum(_is_cut(model, arguments, asked.new_tokens) for sample in rows for arguments in sample["arguments"]),
        "seconds": round(time.perf_counter() - start, 3),
        "metrics": {key: value for key, value in found["results"][asked.name].items() if "," in key},
    }
    return [_line(candidate, asked, sample) for sample in rows], scores


def _model(loaded: LoadedModel, batch_size: int) -> Any:
    """lm-eval's own class for transformers models, without its warning that it was given a model and not a name."""
    log = logging.getLogger("lm_eval.models.huggingface")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return HFLM(pretrained=loaded.base.model, tokenizer=loaded.base.tokenizer, batch_size=batch_size)
    finally:
        log.setLevel(level)


def _is_cut(model: Any, arguments: Sequence[Any], new_tokens: int) -> bool:
    """Whether lm-eval took tokens away from the start of a prompt. arguments: (prompt, settings), or (context, text)."""
    text = arguments[0] if new_tokens or len(arguments) < 2 else arguments[0] + arguments[1]
    return len(model.tok_encode(text)) > model.max_length - new_tokens


def _line(candidate: Candidate, asked: _Asked, sample: Mapping[str, Any]) -> dict[str, Any]:
    """One line of answers.jsonl."""
    question, expected = asked.items[sample["doc_id"]]
    value = sample[sample["metrics"][0]]
    if asked.task.OUTPUT_TYPE == "generate_until":
        said = {"answer": sample["resps"][0][0], "extracted": sample["filtered_resps"][0]}
    else:
        each = [answer[0] if isinstance(answer, (list, tuple)) else answer for answer in sample["filtered_resps"]]
        best = max(range(len(each)), key=each.__getitem__)
        said = {"answer": sample["arguments"][best][-1], "extracted": best, "likelihoods": each}
    is_judged = isinstance(value, (bool, int, float)) and value in (0, 1)
    return {
        "contestant": candidate.name,
        "number": sample["doc_id"] + 1,
        "source": asked.source,
        "row": sample["doc_id"] + 1,
        "question": question,
        "reference": expected,
        "expected": expected,
        "prompt": sample["arguments"][0][0],
        **said,
        "outcome": ("correct" if value else "wrong") if is_judged else None,
        "value": value,
        "ended": None,
        "tokens": 0,
    }


def _counted(candidate: Candidate, asked: _Asked, journal: Journal) -> dict[str, Any]:
    """Accuracy and intervals, where every answer is right or wrong; else the number of questions alone."""
    lines = [journal.answers[candidate.name, number] for number in range(1, len(asked.items) + 1)]
    if any(line["outcome"] is None for line in lines):
        return {"total": len(lines)}
    found = outcomes([Judgement(str(line["extracted"]), line["outcome"]) for line in lines])
    right = [line["outcome"] == "correct" for line in lines]
    kept = {name: found[name] for name in ("correct", "wrong", "total", "accuracy", "interval")}
    return {**kept, "bootstrap_interval": list(bootstrap_interval(right))}
