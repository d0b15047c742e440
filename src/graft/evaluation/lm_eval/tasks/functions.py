"""The functions of this folder's tasks: rows, prompt and scoring of Graft's benchmarks in the form that lm-eval expects.

lm-eval's definition of a task includes the source of `prompt` and `judge`. Any change of their text changes the protocol hash.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import datasets

from graft.evaluation import protocols, tasks
from graft.evaluation.protocols.llm_adapters import PROMPT


def load(name: str, data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Load the test split. data: the folder of the files, from lm-eval's --metadata; None: the hub."""
    records = tasks.get(name).load(data)
    rows = [{"task": name, "question": record.instruction, "gold": record.gold} for record in records]
    return {"test": datasets.Dataset.from_list(rows)}


addsub, multiarith, singleeq = (partial(load, name) for name in ("AddSub", "MultiArith", "SingleEq"))
svamp, mawps, gsm8k = (partial(load, name) for name in ("SVAMP", "mawps", "gsm8k"))


def prompt(row: dict[str, Any]) -> str:
    """The published prompt."""
    spans = PROMPT.render([{"role": "user", "content": row["question"]}], add_generation_prompt=True)
    return "".join(span.text for span in spans)


def judge(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The published rule."""
    task = tasks.get(row["task"])
    protocol = protocols.get("llm-adapters", task)
    assert isinstance(protocol, protocols.OutputProtocol)
    judged = protocol.judge(task, row["gold"], results[0])
    return {"acc": float(judged.outcome == "correct"), "unextractable": float(judged.outcome == "unextractable")}
