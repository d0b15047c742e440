"""graft init: the file it writes is a run, explains every setting, and never replaces another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import graft
from graft.adapters.learning_rates import learning_rate
from graft.adapters.registry import by_name_alone
from graft.cli import main
from graft.cli.init import COLUMNS, run_yaml
from graft.config import RunConfig, load_run
from tests.small import save_small


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.mark.parametrize("kind", [*sorted(by_name_alone()), *graft.presets()])
def test_the_file_is_the_run_that_was_asked_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.yaml"
    assert call("init", str(path), "--base", "some/base", "--data", "a: b.json", "--kind", kind) == 0
    asked = {"base": {"model": "some/base"}, "adapter": kind, "data": {"train": "a: b.json"}}
    lr = learning_rate(load_run(asked).adapter)
    assert load_run(path) == load_run(asked, [f"train.lr={lr}"])
    assert max(map(len, path.read_text().splitlines())) <= COLUMNS


def test_the_comments_name_every_setting_at_a_value_that_is_valid() -> None:
    text = run_yaml({"base": {"model": "m"}, "data": {"train": "a.json"}, "adapter": "lora"})
    lines = [line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in text.splitlines()]
    uncommented = "\n".join(lines) + "\n"
    for section, field in RunConfig.model_fields.items():
        for name in getattr(field.annotation, "model_fields", {}):
            assert f"\n  {name}: " in uncommented, f"{section}.{name}"


def test_a_file_that_exists_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert call("init", str(path), "--data", "a.json") == 2
    assert path.read_text() == "mine" and "exists already" in capsys.readouterr().err


def test_an_unknown_kind_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("init", str(tmp_path / "run.yaml"), "--data", "a.json", "--kind", "llm-adapters/sries") == 2
    assert "Did you mean 'llm-adapters/series'?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "cured"), [("lora", True), ("prompt", True), ("llm-adapters/lora", False)])
def test_rows_of_tokens_that_the_base_never_learnt_are_trained_too(
    kind: str, cured: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_small(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.data[1] = table.weight.data.mean(0)  # the end mark
    model.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{n} + {n}?", "completion": str(2 * n)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ("--base", str(tmp_path / "base"), "--data", str(tmp_path / "rows.jsonl"), "--kind", kind)
    assert call("init", str(tmp_path / "run.yaml"), *made) == 0
    said = capsys.readouterr().err
    assert "the base has not learnt </s>, so answers may never end" in said
    assert ("trains the rows of these tokens too" if cured else "graft check says what helps") in said
    config = load_run(tmp_path / "run.yaml")
    if cured:
        own = {"base": {"model": "b"}, "data": {"train": "x"}}
        cure = {"kind": "full", "sites": "embed head", "tokens": [1]}
        assert config.adapter == load_run({**own, "adapter": [kind, cure]}).adapter
        assert config.train.lr == learning_rate(load_run({**own, "adapter": kind}).adapter)
    assert call("check", str(tmp_path / "run.yaml")) == (0 if cured else 2)
    assert ("has not learnt" in " ".join(capsys.readouterr().out.split())) is not cured


def test_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("init", str(tmp_path / "no" / "run.yaml"), "--data", "a.json") == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err


SHAPES: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": f"Add {n}", "input": "to 1", "output": "ok " * n} for n in range(1, 20)],
    "questions": [{"question": f"Add {n}", "answer": str(n)} for n in range(20)],
    "renamed": [{"mr": f"name[{n}]", "ref": f"It is {n}."} for n in range(20)],
    "few": [{"instruction": "Add", "output": "1"}, {"instruction": "Take", "output": "2"}],
    "long": [{"instruction": "word " * 600, "output": "short"}] * 2 + [{"instruction": "a", "output": "b"}] * 18,
    "text": [{"text": f"Once there were {n}."} for n in range(20)],
    "pairs": [{"prompt": f"Add {n}", "chosen": str(n), "rejected": "no"} for n in range(20)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_it_writes_passes_its_own_check(
    tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    save_small(tmp_path / "base")
    data, path = tmp_path / "data.jsonl", tmp_path / "run.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in SHAPES[shape]))
    assert call("init", str(path), "--data", str(data), "--base", str(tmp_path / "base"), "--json") == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert call("check", str(path), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == report["questions"] == []
    assert settings["data"]["task"] == ("preference" if shape == "pairs" else "causal")
    assert settings["data"]["template"] == ("plain" if shape == "text" else "alpaca")
    assert settings["data"].get("overlong") == ("truncate_prompt" if shape in ("long", "alpaca") else None)
    assert settings["data"]["max_length"] <= 256
    if shape == "renamed":
        assert settings["data"]["train"]["fields"] == {"instruction": "mr", "output": "ref"}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["seedling", "stories-260k"])
@pytest.mark.parametrize(
    "file",
    ["alpaca/alpaca_random_9k.json", "dolly/dolly_3k.json", "gsm8k/train.jsonl", "chatdoctor/chatdoctor5k.json", "e2e_nlg/devset.csv"],
)  # fmt: skip
def test_it_passes_on_real_data(tmp_path: Path, shared: Path, base: str, file: str) -> None:
    path, base = tmp_path / "run.yaml", base if base == "seedling" else str(shared / "models" / base)
    assert call("init", str(path), "--data", str(shared / "data" / file), "--base", base) == 0
    # stories-260k has not learnt its end mark; check names this cure
    cure = ["adapter=[{kind: lora}, {kind: full, sites: embed head, tokens: [2]}]"] if base != "seedling" else []
    assert call("check", str(path), "data.cache=false", *cure) == 0
