"""Evaluate a base and its adapters on lm-eval's tasks, and keep the results as every other evaluation does.

lm-eval evaluates one model at a time, so a task is run candidate by candidate; groups are run task by task. What is finished
is not run again: after the answers of a candidate, its scores are written to scores.json, and a candidate without scores
starts again. The protocol of a result consists of lm-eval's version and the definition of the task. Its hash is part of the
folder's name, so results of different prompts never share a folder.

The accuracy of a task is its first metric under its first filter, if that is 0 or 1 for every question. The result also holds
all metrics with lm-eval's standard errors. lm-eval truncates prompts that exceed the context on the left; `cut` counts them.
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
from graft.evaluation.answering import describe_evaluation, result_folder
from graft.evaluation.journal import Journal
from graft.evaluation.lm_eval.model import HFLM
from graft.evaluation.overlaps import known_overlaps
from graft.evaluation.protocols.base import Judgement
from graft.evaluation.scoring import count_outcomes
from graft.evaluation.statistics import bootstrap_interval
from graft.evaluation.tables import averages
from graft.generation.loaded import Candidate, LoadedModel
from graft.utils.files import write_json_atomic
from graft.utils.jsonl import read_json

lm_eval: Any = require("lm_eval", "eval")

SCORES = "scores.json"
"""An additional file in the folder of an evaluation: candidate -> {"questions", "cut", "seconds", "metrics"}."""
DEFAULT_NEW_TOKENS = 256
"""lm-eval's limit of new tokens for tasks that set none."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the repr of a function, different in every process


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
    """Evaluate all candidates on tasks and groups of lm-eval. Returns results of the same form as `evaluate_tasks`.

    data: folder with the files of the graft_* tasks (None: the hub). out: folder of results; answers.jsonl and result.json are
    written to <task>.<protocol hash> in it. fewshot: number of examples before a question, for tasks that do not fix it. each:
    called with every result.
    Raises `GraftError` for a task that lm-eval does not know, for data that it cannot load, and for a task with longer answers
    than the context of the base.
    """
    manager = _manager(data)
    asked = {name: _TaskRun(manager, name, task, limit, fewshot) for name, task in _load(manager, names).items()}
    overlaps = known_overlaps(loaded, {name: each.questions() for name, each in asked.items()})
    results = []
    for name, one in asked.items():
        result = _evaluate(loaded, one, out, batch_size, overwrite, limit, overlaps[name])
        results.append(result)
        if each is not None:
            each(result)
    return {"protocol": "lm-eval", "tasks": results, "absent": [], "averages": averages(results)}


def _manager(data: str | Path | None) -> Any:
    """Return lm-eval's task manager, with Graft's tasks added. It takes seconds, since it reads thousands of definitions."""
    import lm_eval.tasks.manager as home
    from lm_eval.tasks import TaskManager

    _graft_lm_eval.add_tasks(home)
    return TaskManager(metadata={} if data is None else {"data": str(data)})


def _load(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """Load the tasks by name; groups are replaced by their tasks."""
    unknown = next((name for name in names if name not in manager.all_tasks), None)
    if unknown is not None:
        raise GraftError(
            f"lm-eval has no task '{unknown}'.{did_you_mean(unknown, manager.all_tasks)} List its tasks with lm_eval ls tasks"
        )
    try:
        return manager.load(list(names))["tasks"]
    except (OSError, ImportError) as error:
        raise GraftError(f"lm-eval cannot load the data of {', '.join(names)}: {error}") from error


class _TaskRun:
    """A task of lm-eval with the questions that are asked."""

    def __init__(self, manager: Any, name: str, task: Any, limit: int | None, fewshot: int | None) -> None:
        self.manager, self.name, self.task, self.limit = manager, name, task, limit
        # A task that fixes 0 examples is meant to be asked without any; other numbers may be replaced.
        fixed = task.get_config("num_fewshot")
        self.fewshot = fixed if fewshot is None or fixed == 0 else fewshot
        docs = [doc for _, doc in task.doc_iterator(limit=limit)]
        self.source = str(task.get_config("dataset_path") or name)
        self.items = [(_question(task, doc), str(task.doc_to_target(doc))) for doc in docs]
        if not self.items:
            raise GraftError(f"lm-eval's task '{name}' has no questions")

    def questions(self) -> list[Question]:
        return [Question(text, f"{self.source}, row {row}") for row, (text, _) in enumerate(self.items, start=1)]

    @property
    def new_tokens(self) -> int:
        """The limit of new tokens; 0 if the task generates nothing."""
        if self.task.OUTPUT_TYPE != "generate_until":
            return 0
        return (self.task.get_config("generation_kwargs") or {}).get("max_gen_toks", DEFAULT_NEW_TOKENS)

    def protocol(self) -> dict[str, Any]:
        """Return everything that a score depends on besides the models and the rows."""
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


def _question(task: Any, doc: Any) -> str:
    """Return the question of a row, if the task says which it is, else the whole prompt."""
    if task.get_config("should_decontaminate"):
        return str(task.doc_to_decontamination_query(doc))
    known = next(
        (doc[key] for key in ("question", "query") if isinstance(doc, dict) and isinstance(doc.get(key), str)), None
    )
    return known if known is not None else str(task.doc_to_text(doc))


def _evaluate(
    loaded: LoadedModel,
    asked: _TaskRun,
    out: Path | None,
    batch_size: int,
    overwrite: bool,
    limit: int | None,
    overlap: list[dict[str, Any]],
) -> dict[str, Any]:
    """Evaluate the candidates that have no scores on a task yet, and write the result."""
    protocol = asked.protocol()
    header = {**describe_evaluation(loaded, asked.name, protocol), "engine": "lm-eval"}
    folder = result_folder(out, asked.name, header["protocol_hash"])
    for candidate in header["contestants"].values():
        candidate["template"] = None  # the prompts are lm-eval's
    with Journal(folder, header, asked.items, overwrite=overwrite) as journal:
        scores = _saved_scores(folder, len(asked.items), overwrite)
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
            {**header["contestants"][who.name], **_accuracy(who, asked, journal), **scores[who.name]}
            for who in loaded.candidates
        ]
        result = {
            **{key: value for key, value in header.items() if key != "contestants"},
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


def _saved_scores(folder: Path | None, questions: int, overwrite: bool) -> dict[str, Any]:
    """Return the scores that earlier processes saved for the same number of questions."""
    if folder is None or not (folder / SCORES).exists():
        return {}
    if overwrite:
        (folder / SCORES).unlink()
        return {}
    return {name: scores for name, scores in read_json(folder / SCORES).items() if scores["questions"] == questions}


def _ask(
    loaded: LoadedModel, candidate: Candidate, asked: _TaskRun, batch_size: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run lm-eval for one candidate on one task. Returns the lines of answers.jsonl, and the scores."""
    from lm_eval.evaluator import simple_evaluate

    start = time.perf_counter()
    model = _model(loaded, batch_size)
    if asked.new_tokens >= model.max_length:
        raise GraftError(
            f"lm-eval's task '{asked.name}' lets a model write {asked.new_tokens} tokens, and the context of this base holds "
            f"{model.max_length}, prompt included: choose another task or a base with a longer context"
        )
    only = use(loaded.base.model, candidate.adapter) if loaded.adapters else nullcontext()
    with only:
        found: Any = simple_evaluate(
            model=model, tasks=[asked.task], num_fewshot=asked.fewshot, limit=asked.limit, task_manager=asked.manager,
            log_samples=True, bootstrap_iters=1000,
        )  # fmt: skip
    assert found is not None  # it is None only in the other processes of a distributed evaluation
    samples = found["samples"][asked.name]
    # A sample appears once per filter; keep those of the first, in the order of the data.
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
    """Wrap the base in lm-eval's class for transformers models, without its warning that the model is already loaded."""
    log = logging.getLogger("lm_eval.models.huggingface")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return HFLM(pretrained=loaded.base.model, tokenizer=loaded.base.tokenizer, batch_size=batch_size)
    finally:
        log.setLevel(level)


def _is_cut(model: Any, arguments: Sequence[Any], new_tokens: int) -> bool:
    """Whether lm-eval truncated a prompt. arguments: (prompt, settings) for generation, (context, text) for likelihoods."""
    text = arguments[0] if new_tokens or len(arguments) < 2 else arguments[0] + arguments[1]
    return len(model.tok_encode(text)) > model.max_length - new_tokens


def _line(candidate: Candidate, asked: _TaskRun, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return one line of answers.jsonl."""
    question, expected = asked.items[sample["doc_id"]]
    value = sample[sample["metrics"][0]]
    if asked.task.OUTPUT_TYPE == "generate_until":
        answer = {"answer": sample["resps"][0][0], "extracted": sample["filtered_resps"][0]}
    else:
        # The answer is the likeliest choice.
        each = [answer[0] if isinstance(answer, (list, tuple)) else answer for answer in sample["filtered_resps"]]
        best = max(range(len(each)), key=each.__getitem__)
        answer = {"answer": sample["arguments"][best][-1], "extracted": best, "likelihoods": each}
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
        **answer,
        "outcome": ("correct" if value else "wrong") if is_judged else None,
        "value": value,
        "ended": None,
        "tokens": 0,
    }


def _accuracy(candidate: Candidate, asked: _TaskRun, journal: Journal) -> dict[str, Any]:
    """Return accuracy and intervals if every answer is right or wrong, else only the number of questions."""
    lines = [journal.answers[candidate.name, number] for number in range(1, len(asked.items) + 1)]
    if any(line["outcome"] is None for line in lines):
        return {"total": len(lines)}
    found = count_outcomes([Judgement(str(line["extracted"]), line["outcome"]) for line in lines])
    right = [line["outcome"] == "correct" for line in lines]
    kept = {name: found[name] for name in ("correct", "wrong", "total", "accuracy", "interval")}
    return {**kept, "bootstrap_interval": list(bootstrap_interval(right))}
