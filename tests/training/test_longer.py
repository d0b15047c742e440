"""Runs that go on: resumed for more steps, begun from another adapter, on data whose tokens the base lacks or never learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import seedling
from graft.config import RunConfig, load_run
from graft.data.samples import Example
from graft.errors import GraftError
from graft.training import check, resume, train


@pytest.fixture
def configured(world: Path) -> Callable[..., RunConfig]:
    def make(
        data: dict | None = None, base: dict | None = None, adapter: object = None, **settings: object
    ) -> RunConfig:
        return load_run(
            {
                "base": {"model": str(world / "base"), "device": "cpu", **(base or {})},
                "adapter": adapter or {"kind": "lora", "rank": 4, "sites": "linear"},
                "data": {"train": str(world / "data.json"), "template": "alpaca", "cache": False, **(data or {})},
                "train": {"steps": 3, "batch_size": 4, "lr": 1e-2, **settings},
            }
        )

    return make


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_goes_on_longer_and_equals_the_longer_run(
    configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    short = train(configured(schedule="constant", steps=2), tmp_path / "short", quiet=True)
    whole = train(configured(schedule="constant", steps=4), tmp_path / "whole", quiet=True)
    resume(short, ["train.steps=4"], quiet=True)
    found, wanted = ([(line["step"], line["loss"]) for line in lines(f.path) if "loss" in line] for f in (short, whole))
    assert found == wanted and short.config.train.steps == 4
    assert short.read_status()["state"] == "finished"


def test_a_falling_schedule_is_that_of_the_new_length(
    configured: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(configured(schedule="linear", steps=2, lr=0.01), tmp_path / "run", quiet=True)
    resume(folder, ["train.steps=4"])
    rates = [line["lr"] for line in lines(folder.path) if "lr" in line]
    assert rates == pytest.approx([0.01, 0.005, 0.005, 0.0025])
    said = "".join(capsys.readouterr())
    assert "goes on to step 4 instead of 2" in said and "from step 3 on" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [("train.steps=1", "cannot become shorter"), ("train.lr=1", "a run that goes on keeps its settings")],
)
def test_other_changes_are_refused(
    configured: Callable[..., RunConfig], tmp_path: Path, change: str, said: str
) -> None:
    folder = train(configured(steps=2), tmp_path / "run", quiet=True)
    with pytest.raises(GraftError, match=said):
        resume(folder, [change], quiet=True)
    assert folder.config.train.steps == 2


def test_an_adapter_to_start_from_with_another_template_or_base_is_named(
    configured: Callable[..., RunConfig], world: Path, tmp_path: Path
) -> None:
    origin = train(configured(steps=1), tmp_path / "first", quiet=True).adapter_dir("lora")
    notes = check(configured(init_from=str(origin), data={"template": "plain"})).parts.data.report.notes
    assert any("was trained with template 'alpaca'" in note and f"data.template to {origin}" in note for note in notes)
    assert not any(
        "was trained with" in note for note in check(configured(init_from=str(origin))).parts.data.report.notes
    )
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(world / "base").save_pretrained(tmp_path / "other")
    other = {"base": {"model": str(tmp_path / "other")}, "init_from": str(origin)}
    with pytest.raises(GraftError, match=r"train\.any_base: true"):
        check(configured(**other))
    assert check(configured(**other, any_base=True)).problems == ()
    with pytest.raises(GraftError, match=r"dropout 0\.0 there, 0\.1 here.*Give `adapter` the values that are there"):
        check(configured(init_from=str(origin), adapter={"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.1}))


@pytest.fixture
def added(tmp_path: Path) -> Callable[..., RunConfig]:
    """A run on the seedling with two tokens added for a chat template; `resized`: whether the base has rows for them."""

    def made(resized: bool = True, adapter: object = None) -> RunConfig:
        tokenizer, model = (kind.from_pretrained(seedling.path()) for kind in (AutoTokenizer, AutoModelForCausalLM))
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        torch.manual_seed(0)
        if resized:
            model.resize_token_embeddings(len(tokenizer))
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        rows = [{"prompt": f"Who is it? {name}", "completion": f"It is a {name}."} for name in ("cat", "dog")]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lora = {"kind": "lora", "rank": 4, "sites": "linear"}
        return RunConfig.model_validate(
            {
                "base": {"model": str(tmp_path / "base")},
                "adapter": [lora, adapter] if adapter else lora,
                "data": {"train": str(tmp_path / "rows.jsonl"), "template": "chat", "cache": False},
                "train": {"steps": 1, "batch_size": 2},
            }
        )

    return made


def test_tokens_that_the_base_never_learnt_are_a_problem_with_its_cure(added: Callable[..., RunConfig]) -> None:
    (problem,) = check(added()).problems
    assert "<|im_start|> is the mean of all rows" in problem and "<|im_end|>" in problem
    tokens = [int(token) for token in problem.split("tokens: [")[1].split("]")[0].split(",")]
    assert check(added(adapter={"kind": "full", "sites": "embed head", "tokens": tokens})).problems == ()


@pytest.mark.parametrize("verb", [check, lambda config: train(config, "never", quiet=True)], ids=["check", "train"])
def test_tokens_beyond_the_embedding_are_named_with_both_numbers(
    added: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Callable[..., object]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GraftError, match=r"token '<\|im_end\|>' \(id 2475\).*only 2,474 rows.*knows 2,476 tokens"):
        verb(added(resized=False))
    assert not Path("never").exists()


def test_the_stop_rate_counts_end_marks_that_are_likelier_than_not(
    configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    from types import SimpleNamespace

    from graft.training.validation import _ends

    ids = np.array([5, 6, 2, 7], np.int32)
    examples = [Example(ids, np.array(mask, bool), "a", 1) for mask in ([0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0])]
    losses = torch.tensor([3.0, 0.6, 3.0, 0.8, 0.1, 0.1])  # ln 2 is 0.693; the third row has no end mark
    assert _ends(losses, [SimpleNamespace(example=example) for example in examples], {2}) == [True, False]
    folder = train(configured(data={"validation": 8}, steps=1), tmp_path / "run", quiet=True)
    assert [line["validation_stop_rate"] for line in lines(folder.path) if "validation_stop_rate" in line] == [0.0]
