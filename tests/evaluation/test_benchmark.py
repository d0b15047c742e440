"""Benchmarks from a folder of files to results: all contestants, all tasks, outcomes, averages, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graft.cli import build
from graft.errors import GraftError
from graft.evaluation import protocols, tasks
from graft.evaluation.tables import average_intervals, averages, group_tables
from graft.run import Run
from graft.utils.jsonl import JsonLines
from tests.runs_at_hand import make_run

ADAPTERS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 2, "sites": "attn.q mlp.down"},
    "series": {"kind": "series", "bottleneck": 4},
}
GSM8K = [("Two and two?", "4.0"), ("What is 40 plus 2?", "42.0"), ("x" * 600, "1.0"), ("Three less one?", "2.0")]
PIQA = [(("pin", "a needle"), "solution1"), (("wood", "stone"), "solution2"), (("tea", "salt"), "solution1")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    rows = {
        "gsm8k": [{"instruction": text, "input": "", "output": "", "answer": answer} for text, answer in GSM8K],
        "SVAMP": [{"instruction": text, "input": "", "output": "", "answer": answer} for text, answer in GSM8K[:2]],
        "piqa": [
            {"instruction": tasks.get("piqa").wording.write("What is it?", choices), "answer": gold}  # type: ignore[union-attr]
            for choices, gold in PIQA
        ],
    }
    for name, each in rows.items():
        (folder / name).mkdir()
        (folder / name / "test.json").write_text(json.dumps(each))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "math", ADAPTERS, context=640)


def graft_command(*arguments: object) -> Any:
    return CliRunner().invoke(build(), list(map(str, arguments)), catch_exceptions=False)


def found(*arguments: object) -> dict[str, Any]:
    return json.loads(graft_command("eval", *arguments, "--json").stdout)


def test_a_group_is_evaluated_for_base_and_adapters_and_what_is_absent_is_named(
    run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    result = found(run, "--tasks", "arithmetic-4", "--data", data, "--protocol", "llm-adapters", "--out", out)
    assert [each["task"] for each in result["tasks"]] == ["gsm8k", "SVAMP"]
    assert [each["task"] for each in result["absent"]] == ["AQuA", "mawps"]
    assert "AQuA/test.json" in result["absent"][0]["reason"]
    for each in result["tasks"]:
        assert each["protocol_hash"] == protocols.get("llm-adapters", tasks.get(each["task"])).digest(
            tasks.get(each["task"])
        )
        folder = out / f"{each['task']}.{each['protocol_hash']}"
        assert json.loads((folder / "result.json").read_text()) == {k: v for k, v in each.items() if k != "folder"}
        assert [one["name"] for one in each["results"]] == ["base", "lora", "series"]
        for one in each["results"]:
            outcomes = sum(one[name] for name in ("correct", "wrong", "unextractable", "no_room"))
            assert outcomes == one["total"] == len(GSM8K if each["task"] == "gsm8k" else GSM8K[:2])
    gsm8k = result["tasks"][0]
    assert [one["no_room"] for one in gsm8k["results"]] == [1, 1, 1], "600 letters and the prompt fill 640 tokens"
    for name, mean in result["averages"].items():
        shares = [one["accuracy"] for each in result["tasks"] for one in each["results"] if one["name"] == name]
        assert mean == {"accuracy": sum(shares) / 2, "tasks": 2}


@pytest.mark.slow
def test_base_and_adapters_of_several_folders_answer_tasks_under_limits_of_their_own(
    run: Path, data: Path, tmp_path: Path
) -> None:
    """One command: every task the first question only, one task in full; the training data of each run are known."""
    other = make_run(tmp_path / "other", {"lora": ADAPTERS["lora"]}, context=640)
    adapters = ("--adapter", f"one={run / 'adapters' / 'lora'}", "--adapter", f"two={run / 'adapters' / 'series'}")
    where = ("--data", data, "--protocol", "strict", "--out", tmp_path / "out", "--limit", "1,gsm8k=all")
    base = ("--base", run.parent / "math-base", *adapters, "--adapter", f"three={other}")
    result = found(*base, "--tasks", "arithmetic-4,gsm8k", *where)
    assert [(each["task"], each["limit"], each["results"][0]["total"]) for each in result["tasks"]] == [
        ("gsm8k", None, len(GSM8K)), ("SVAMP", 1, 1),
    ]  # fmt: skip
    assert [one["name"] for one in result["tasks"][0]["results"]] == ["base", "one", "two", "three"]
    for each in result["tasks"]:
        assert [(report["of"], report["exact"]) for report in each["overlap"]] == [(["one", "two"], 1), (["three"], 1)]
    printed = graft_command("eval", *base, "--tasks", "SVAMP", *where[:-1], "1").stdout
    assert (
        "the first question;" in printed and "1 of 1 question word for word in the training data of one, two" in printed
    )
    with pytest.raises(GraftError, match="a limit is given for 'gsm8k', which is not evaluated; the tasks are SVAMP"):
        graft_command("eval", *base, "--tasks", "SVAMP", *where)
    (other.parent / "other.jsonl").unlink()
    (report,) = [
        each
        for each in found(*base, "--tasks", "SVAMP", *where[:-1], "1")["tasks"][0]["overlap"]
        if each["of"] == ["three"]
    ]
    assert "no such file" in report["unknown"]


def test_answers_are_judged_by_the_protocol(run: Path, data: Path, tmp_path: Path) -> None:
    result = found(run, "--tasks", "gsm8k", "--data", data, "--protocol", "strict", "--out", tmp_path)
    task, protocol = tasks.get("gsm8k"), protocols.get("strict", tasks.get("gsm8k"))
    lines = JsonLines(Path(result["tasks"][0]["folder"]) / "answers.jsonl").read()
    assert {(line["contestant"], line["row"]) for line in lines} == {
        (name, row) for name in ("base", "lora", "series") for row in range(1, 5)
    }
    for line in lines:
        judged = protocol.judge(task, GSM8K[line["row"] - 1][1], line["answer"])  # type: ignore[union-attr]
        expected = "no_room" if line["ended"] == "no_room" else judged.outcome
        assert (line["extracted"], line["outcome"]) == (judged.extracted, expected)


def test_ranking_goes_through_the_same_files(run: Path, data: Path, tmp_path: Path) -> None:
    result = found(run, "--tasks", "piqa", "--data", data, "--protocol", "rank", "--out", tmp_path)["tasks"][0]
    lines = JsonLines(Path(result["folder"]) / "answers.jsonl").read()
    for one in result["results"]:
        own = [line for line in lines if line["contestant"] == one["name"]]
        best = [max((0, 1), key=line["likelihoods"].__getitem__) for line in own]
        right = sum(f"solution{best + 1}" == gold for best, (_, gold) in zip(best, PIQA, strict=True))
        assert one["correct"] == right and "tokens" not in one and one["unextractable"] == 0
        assert one["normalised"]["total"] == 3
    assert result["self_checked"] == 6, "two questions of each contestant, all three of which fit"
    again = found(run, "--tasks", "piqa", "--data", data, "--protocol", "rank", "--out", tmp_path)["tasks"][0]
    assert again["results"] == result["results"] and again["continued_from"] == 9


def test_the_run_says_what_is_evaluated_and_show_prints_it_again(run: Path, data: Path) -> None:
    evaluated = Run.load(run, "eval.tasks=[SVAMP]", f"eval.data={data}", "eval.protocol=strict").eval()
    assert [each["task"] for each in evaluated["tasks"]] == ["SVAMP"] and evaluated["protocol"] == "strict"
    assert Run.load(run).eval(["SVAMP"], data=data)["tasks"][0]["continued_from"] == 6
    printed = graft_command("show", run).stdout
    assert "protocol strict, version" in printed and "SVAMP" in printed
    (overlap,) = evaluated["tasks"][0]["overlap"]
    assert overlap["of"] == ["lora", "series"] and overlap["questions"] == 2
    assert overlap["exact"] == 1, "'Two and two?' stands in the training data"
    assert "gsm8k" in graft_command("show", "tasks").stdout
    folder = Path(evaluated["tasks"][0]["folder"])
    assert "SVAMP" in graft_command("show", folder).stdout
    (folder / "result.json").unlink()
    assert f"not finished: {folder}; give the same command again" in graft_command("show", run).stdout
    with pytest.raises(GraftError, match="there is no folder task. Did you mean 'tasks'?"):
        graft_command("show", "task")


def test_the_interval_of_an_average_follows_from_those_of_its_tasks() -> None:
    """Two equal tasks: the interval of the mean is narrower by the root of 2."""
    score = {"name": "base", "total": 9, "accuracy": 0.5, "interval": [0.4, 0.7]}
    some = [
        {"task": task, "protocol": {"name": "strict", "version": 2}, "protocol_hash": task, "results": [score]}
        for task in "ab"
    ]
    assert average_intervals(some) == {"base": pytest.approx([0.5 - 0.1 / 2**0.5, 0.5 + 0.2 / 2**0.5])}
    assert average_intervals([*some, {**some[0], "results": [{**score, "interval": None}]}]) == {}
    (table,) = group_tables(some)
    assert table.rows()[-1] == ["average of 2 tasks", None, "50.0% (from 42.9% to 64.1%)"]


def test_a_table_holds_one_protocol_and_averages_count_tasks_once() -> None:
    def result(task: str, protocol: str, digest: str, **shares: float) -> dict[str, Any]:
        results = [{"name": name, "total": 9, "accuracy": share} for name, share in shares.items()]
        return {"task": task, "protocol": {"name": protocol, "version": 1}, "protocol_hash": digest, "results": results}

    some = [
        result("a", "strict", "1", base=0.5, lora=1.0),
        result("b", "rank", "2", base=0.1),
        result("c", "strict", "3", base=0.0),
    ]
    tables = group_tables(some)
    assert [(table.protocol, [each["task"] for each in table.results]) for table in tables] == [
        ("strict, version 1", ["a", "c"]),
        ("rank, version 1", ["b"]),
    ]
    assert averages(tables[0].results) == {"base": {"accuracy": 0.25, "tasks": 2}}, "lora lacks a task"
    assert len(group_tables([*some, result("a", "strict", "4", base=0.0)])) == 3


def test_mistakes_are_the_users(run: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.json").write_text('[{"instruction": "a", "answer": "1"}, {"instruction": "b"}]')
    for arguments, words in (
        (("--tasks", "gsm8", "--data", data), "Did you mean 'gsm8k'"),
        (("--tasks", "mawps", "--data", data), "looked for mawps/test.json"),
        (("--tasks", "commonsense", "--data", tmp_path), "looked for boolq/test.json"),
        (("--tasks", "gsm8k", "--data", tmp_path), "row 2: there is no answer"),
        (("--tasks", "gsm8k", "--data", data, "--protocol", "rank"), "not defined under protocol 'rank'"),
        (("--tasks", "gsm8k", "--data", data, "--protocol", "strikt"), "Did you mean 'strict'"),
        (("--tasks", "gsm8k", "--data", data, "--beams", 2), "--beams is for data files"),
        (("--tasks", "piqa", "--data", data, "--protocol", "rank", "--template", "alpaca"), "--template has no effect"),
        (("--tasks", "gsm8k,SVAMP", "--data", data / "gsm8k" / "test.json"), "is one file, but 2 tasks"),
        (("--data", data / "gsm8k" / "test.json", "--protocol", "strict"), "--protocol is for benchmarks"),
    ):
        with pytest.raises(GraftError) as error:
            graft_command("eval", run, *arguments, "--out", tmp_path / "out")
        assert words in str(error.value), (arguments, str(error.value))


def test_answers_of_something_else_are_refused_and_more_rows_go_on(run: Path, data: Path, tmp_path: Path) -> None:
    arguments = (run, "--tasks", "gsm8k", "--data", data, "--protocol", "strict", "--out", tmp_path)
    few = found(*arguments, "--limit", 2)["tasks"][0]
    folder = Path(few["folder"])
    assert found(*arguments)["tasks"][0]["continued_from"] == 6
    with pytest.raises(GraftError, match="answers question 3, but only 2 are asked.*--overwrite"):
        found(*arguments, "--limit", 2)
    about = json.loads((folder / "evaluation.json").read_text())
    for change, words in (
        ({"protocol_hash": "0" * 12}, "another protocol hash: 000000000000"),
        ({"contestants": {**about["contestants"], "other": about["contestants"]["lora"]}}, "answers of 'other'"),
        ({"contestants": {"lora": {**about["contestants"]["lora"], "digest": "x"}}}, "'lora' with other weights"),
    ):
        (folder / "evaluation.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(GraftError, match=words):
            found(*arguments)
    assert found(*arguments, "--overwrite")["tasks"][0]["continued_from"] == 0


def test_a_killed_evaluation_goes_on_where_it_was(run: Path, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "graft", "eval", run, "--tasks", "gsm8k", "--data", data, "--protocol", "strict"]
    command += ["--token-budget", 1, "--out", tmp_path / "killed"]
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    answers = []
    deadline = time.monotonic() + 120
    while len(answers) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        answers = [line for path in tmp_path.glob("killed/*/answers.jsonl") for line in path.read_bytes().splitlines()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    arguments = (run, "--tasks", "gsm8k", "--data", data, "--protocol", "strict")
    resumed = found(*arguments, "--out", tmp_path / "killed")["tasks"][0]
    whole = found(*arguments, "--out", tmp_path / "whole")["tasks"][0]
    assert 5 <= resumed["continued_from"] < 12 and whole["continued_from"] == 0
    assert resumed["results"] == whole["results"]
