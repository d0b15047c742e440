"""eval, predict, chat and merge as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import graft
from graft.cli import build
from graft.errors import GraftError
from tests.runs_at_hand import ROWS, make_run, write_rows

ADAPTERS: dict[str, Any] = {"lora": {"kind": "lora", "rank": 2, "sites": "attn.q attn.v mlp.down"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "math", ADAPTERS)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = {**ADAPTERS, "series": {"kind": "series", "bottleneck": 4}}
    return make_run(tmp_path_factory.mktemp("runs") / "both", kinds)


def graft_command(*arguments: object, stdin: str | None = None) -> Result:
    """Run the command line in this process; mistakes of the user are raised as they are."""
    result = CliRunner().invoke(build(), list(map(str, arguments)), input=stdin, catch_exceptions=False)
    return result


def answer_by_transformers(base: Path, adapter: Path | None, prompt: str, new_tokens: int) -> str:
    """The reference: transformers' own loop on the adapter loaded by hand."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if adapter is not None:
        graft.load(model, adapter)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_eval_prints_a_table_of_base_and_adapters_with_intervals(both: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "test.jsonl")
    result = graft_command("eval", both, "--data", data, "--max-new-tokens", 3)
    assert result.exit_code == 0
    for text in (
        "base",
        "lora",
        "series",
        "95 % interval",
        "0/3",
        "numeric match, greedy",
        "self-check on",
        "result.json",
    ):
        assert text in result.stdout


def test_eval_in_json_is_the_result_file(both: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "test.jsonl")
    result = graft_command("eval", both, "--data", data, "--limit", 2, "--max-new-tokens", 3, "--json")
    found = json.loads(result.stdout)
    assert [each["total"] for each in found["results"]] == [2, 2, 2]
    assert json.loads((Path(found["folder"]) / "result.json").read_text())["results"] == found["results"]
    assert graft_command("show", both, "--json").exit_code == 0


def test_eval_takes_a_base_with_adapters_from_folders(run: Path, both: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "test.jsonl")
    base = run.parent / "math-base"
    arguments = ("--data", data, "--max-new-tokens", 2, "--device", "cpu", "--out", tmp_path / "eval", "--json")
    folders = ("--adapter", run / "adapters" / "lora", "--adapter", f"second={both / 'adapters' / 'series'}")
    found = json.loads(graft_command("eval", "--base", base, *folders, *arguments).stdout)
    assert [each["name"] for each in found["results"]] == ["base", "lora", "second"]
    bare = json.loads(graft_command("eval", "--base", base, *arguments).stdout)
    assert [each["name"] for each in bare["results"]] == ["base"]


def test_mistakes_in_arguments_are_the_users(run: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "test.jsonl")
    for arguments, words in (
        (("eval",), "--data"),
        (("eval", "--data", data), "name a run folder, or a base"),
        (("eval", tmp_path / "nothing", "--data", data), "is not a run folder"),
        (("eval", run, "--data", tmp_path / "tset.jsonl"), "no such file"),
        (("eval", run, "--data", data, "--device", "gpu"), "--device 'gpu'"),
        (("eval", run, "--data", data, "--device", "cuda:55"), "no device 'cuda:55'"),
        (("eval", run, "--data", data, "--adapter", tmp_path / "none"), "no folder"),
        (("eval", run, "--data", data, "--template", "alpacca"), "Did you mean 'alpaca'"),
        (("eval", run), "has no validation data"),
        (("chat", run, "--use", "lroa", "--prompt", "x"), "there is base, lora"),
        (("predict", run, tmp_path / "none.txt"), "no such file"),
        (("merge", "--base", run.parent / "math-base", "--to", tmp_path / "new"), "no adapter to merge"),
        (("merge", run, "--to", run), "is not an empty folder"),
    ):
        with pytest.raises(GraftError) as error:
            graft_command(*arguments)
        assert words in str(error.value), arguments


def test_predict_answers_a_text_file_in_its_order(run: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    lines = ["a longer question than the others", "", "b", "two and two?"]
    prompts.write_text("\n".join(lines) + "\n")
    result = graft_command("predict", run, prompts, "--out", out, "--max-new-tokens", 4)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["row"] for record in found] == [1, 3, 4]
    adapter = run / "adapters" / "lora"
    for record in found:
        assert record["adapter"] == "lora"
        assert record["answer"] == answer_by_transformers(run.parent / "math-base", adapter, record["question"], 4)
    assert "lora answered 3 prompts" in result.stderr
    with pytest.raises(GraftError, match="exists already"):
        graft_command("predict", run, prompts, "--out", out)


def test_predict_reads_data_files_with_and_without_answers_and_prints(run: Path, tmp_path: Path) -> None:
    with_answers = write_rows(tmp_path / "with.jsonl")
    without = write_rows(tmp_path / "without.jsonl", [{"question": row["question"]} for row in ROWS])
    options = ("--use", "base", "--max-new-tokens", 3)
    printed = [graft_command("predict", run, path, *options).stdout for path in (with_answers, without)]
    assert printed[0] == printed[1]
    assert [json.loads(line)["question"] for line in printed[0].splitlines()] == [row["question"] for row in ROWS]


def test_predict_in_json_is_one_value(run: Path, tmp_path: Path) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl"
    options = ("--max-new-tokens", 3)
    lines = [json.loads(line) for line in graft_command("predict", run, data, *options).stdout.splitlines()]
    found = json.loads(graft_command("predict", run, data, *options, "--json").stdout)
    assert found.pop("answers") == lines and found["total"] == sum(found["ended"].values()) == len(ROWS)
    assert found["adapter"] == "lora" and found["out"] is None and found["reused"] == 0
    again = json.loads(graft_command("predict", run, data, *options, "--json", "--out", out).stdout)
    assert again == {**found, "out": str(out)}
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines


def test_merge_takes_another_template(run: Path, tmp_path: Path) -> None:
    for name, template in (("own", ()), ("other", ("--template", "alpaca"))):
        said = json.loads(graft_command("merge", run, "--to", tmp_path / name, *template, "--json").stdout)
        saved = json.loads((tmp_path / name / "template.json").read_text())
        assert said["template"] == saved["name"] == ("alpaca" if template else "plain")
    chat = ("--prompt", "two?", "--max-new-tokens", 4, "--json")
    merged = json.loads(graft_command("chat", "--base", tmp_path / "other", "--device", "cpu", *chat).stdout)
    assert merged["answer"] == json.loads(graft_command("chat", run, "--template", "alpaca", *chat).stdout)["answer"]


def test_predict_wants_to_know_which_adapter_where_there_are_several(both: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="choose with --use lora, series"):
        graft_command("predict", both, write_rows(tmp_path / "p.jsonl"))


def test_chat_answers_one_prompt(run: Path) -> None:
    result = graft_command("chat", run, "--prompt", "two and two?", "--max-new-tokens", 6)
    expected = answer_by_transformers(run.parent / "math-base", run / "adapters" / "lora", "two and two?", 6)
    assert result.stdout == expected + "\n"


def test_chat_reads_lines_and_commands_where_stdin_is_no_terminal(both: Path) -> None:
    def chat(*lines: str) -> list[str]:
        said = graft_command("chat", both, "--max-new-tokens", 4, stdin="".join(line + "\n" for line in lines))
        return said.stdout.encode().splitlines(keepends=False)  # type: ignore[return-value]

    def alone(use: str) -> bytes:
        return (
            graft_command("chat", both, "--use", use, "-p", "hello?", "--max-new-tokens", 4)
            .stdout.encode()
            .rstrip(b"\n")
        )

    answers = {use: alone(use) for use in ("base", "lora", "series")}
    assert len(set(answers.values())) == 3
    assert chat("hello?", "/quit", "hello?") == [answers["lora"]]
    assert chat("/base", "hello?", "/reset", "/adapter series", "hello?") == [answers["base"], answers["series"]]
    assert chat("hello?", "hello?")[1] != answers["lora"], "the first turn is part of the second prompt"


def test_chat_names_the_adapters_for_an_unknown_one_and_goes_on(run: Path) -> None:
    result = graft_command("chat", run, "--max-new-tokens", 2, stdin="/adapter other\n/what\nhello\n")
    assert "there is base, lora" in result.stderr
    assert "/adapter NAME (one of base, lora)" in result.stdout
    assert result.exit_code == 0


def test_chat_says_when_the_conversation_fills_the_context(tmp_path: Path) -> None:
    run = make_run(tmp_path / "short", ADAPTERS, context=20)
    result = graft_command("chat", run, "--max-new-tokens", 2, stdin="x" * 30 + "\nhello\n")
    assert "[no room: 30 tokens fill the context of 20" in result.stdout
    assert len(result.stdout.splitlines()) >= 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_merge_writes_a_plain_model_that_answers_as_the_adapter(family: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ADAPTERS, family=family)
    to = tmp_path / "merged"
    report = json.loads(graft_command("merge", run, "--to", to, "--json").stdout)
    assert report["max_difference"] < 1e-4 * (1 + report["largest_logit"]) and report["same_next_token"] > 0.99
    base = tmp_path / "run-base"
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(to), AutoTokenizer.from_pretrained(to)
    original = AutoModelForCausalLM.from_pretrained(base)
    assert type(plain) is type(original) and set(plain.state_dict()) == set(original.state_dict())
    ids = tokenizer("two and two?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = original(ids).logits
        graft.load(original, run / "adapters" / "lora")
        assert torch.allclose(plain(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(plain(ids).logits, before, atol=0.1)
    chat = graft_command("chat", "--base", to, "--device", "cpu", "-p", "two and two?", "--max-new-tokens", 5)
    assert chat.stdout == graft_command("chat", run, "-p", "two and two?", "--max-new-tokens", 5).stdout


def test_merging_an_adapted_head_that_shares_the_embeddings_weight_gives_it_its_own(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", {"lora": {"kind": "lora", "rank": 2, "sites": "head attn.q"}}, tie_word_embeddings=True
    )
    to = tmp_path / "merged"
    report = json.loads(graft_command("merge", run, "--to", to, "--json").stdout)
    assert report["untied"] == ["lm_head.weight"] and report["max_difference"] < 1e-2
    plain, base = AutoModelForCausalLM.from_pretrained(to), AutoModelForCausalLM.from_pretrained(tmp_path / "run-base")
    assert plain.config.tie_word_embeddings is False
    assert torch.equal(plain.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.equal(plain.get_output_embeddings().weight, base.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["series", "prefix"])
def test_a_kind_that_cannot_be_merged_says_what_to_do_and_writes_nothing(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {kind: {"kind": kind}})
    with pytest.raises(GraftError, match=f"{kind} adapters compute what the base.s weights cannot express.*graft chat"):
        graft_command("merge", run, "--to", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_that_answers_differently_is_not_left_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graft.bases import merged

    load = merged.load_model

    def damaged(*given: Any) -> Any:
        model = load(*given)
        model.lm_head.weight.mul_(1.1)
        return model

    monkeypatch.setattr(merged, "load_model", damaged)
    with pytest.raises(GraftError, match="answers differently from the adapter.*Nothing was written"):
        graft_command("merge", run, "--to", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_predict_continues_what_was_interrupted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graft.evaluation.predictions import Predictions

    prompts, whole, out = tmp_path / "prompts.txt", tmp_path / "whole.jsonl", tmp_path / "new" / "answers.jsonl"
    prompts.write_text("\n".join(f"question {'x' * number}" for number in range(7)) + "\n")
    options = ("--max-new-tokens", 4, "--temperature", 0.7, "--token-budget", 60)
    graft_command("predict", run, prompts, "--out", whole, *options)

    add = Predictions.add

    def add_three(self: Predictions, number: int, record: dict[str, Any]) -> None:
        if len(self.records) == 3:
            raise KeyboardInterrupt
        add(self, number, record)

    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "add", add_three)
        graft_command("predict", run, prompts, "--out", out, *options)
    partial = out.with_name("answers.jsonl.partial")
    assert not out.exists() and len(partial.read_text().splitlines()) == 4
    with pytest.raises(GraftError, match="holds answers of another prediction .decoding differ"):
        graft_command("predict", run, prompts, "--out", out, "--max-new-tokens", 5)
    with open(partial, "a") as file:
        file.write('{"number": 5, "row"')  # as a killed process leaves it
    result = graft_command("predict", run, prompts, "--out", out, *options)
    assert "3 were there from an interrupted command" in result.stderr
    assert out.read_text() == whole.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]
    assert graft_command("predict", run, prompts, *options).stdout == whole.read_text()


def test_eval_and_predict_read_the_columns_that_the_run_read(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{n} + {n}", "a": str(2 * n), "tools": ["x"]}) + "\n" for n in range(4)))
    source = {"path": str(rows), "fields": {"prompt": "q", "completion": "a"}, "ignore": ["tools"]}
    own = make_run(tmp_path / "run", ADAPTERS, data={"train": source})
    found = json.loads(graft_command("eval", own, "--data", rows, "--max-new-tokens", 2, "--json").stdout)
    assert found["results"][0]["total"] == 4
    answers = graft_command("predict", own, rows, "--max-new-tokens", 2).stdout.splitlines()
    assert [json.loads(line)["question"] for line in answers] == [f"{n} + {n}" for n in range(4)]

    other = tmp_path / "other.jsonl"
    other.write_text('{"one": "1 + 1", "two": "2"}\n')
    with pytest.raises(GraftError, match="Rename columns with --fields EXPECTED=COLUMN, e.g. --fields instruction=one"):
        graft_command("eval", own, "--data", other)
    renamed = ("--fields", "prompt=one", "--fields", "completion=two")
    assert graft_command("eval", own, "--data", other, *renamed, "--max-new-tokens", 2).exit_code == 0
    assert graft_command("predict", own, other, *renamed, "--max-new-tokens", 2).exit_code == 0
    with pytest.raises(GraftError, match="--fields takes EXPECTED=COLUMN"):
        graft_command("predict", own, other, "--fields", "prompt")
    with pytest.raises(GraftError, match="no effect on a .txt"):
        (tmp_path / "a.txt").write_text("x")
        graft_command("predict", own, tmp_path / "a.txt", "--fields", "prompt=one")
