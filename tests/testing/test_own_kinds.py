"""A stranger's kind in one file: the contract holds it from Python, from pytest and on the command line."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import graft
import graft.testing
from graft.cli import main
from graft.testing import CHECKS, DEFAULT_FAMILIES, Case, Check, DoesNotApply, contract, run_contract
from graft.testing.kind_files import configs_in
from graft.testing.run import label_of
from tests.testing import broken_kinds
from tests.testing.conftest import QUICK, SLOW
from tests.testing.strangers import scale_file


@pytest.fixture
def scale(tmp_path: Path) -> Path:
    file = tmp_path / "scale.py"
    file.write_text(scale_file() + "\nCONTRACT = [Scale(sites='linear')]\n")
    return file


@pytest.mark.parametrize("family", DEFAULT_FAMILIES)
def test_the_example_of_the_docstring_keeps_every_promise(family: str, scale: Path) -> None:
    report = run_contract(configs_in(scale), [family], checks=set(CHECKS) - SLOW if family == "llama" else QUICK)
    assert report.ok, str(report)
    assert report.variants == ("scale", "scale(sites=linear)")
    apart = {row.check: row.message for row in report.rows if row.outcome == "does not apply"}
    assert apart["dropout_follows_the_row_seed"] == "the adapter draws no random numbers in training"
    assert ("padding_on_the_left" in apart) == (family in ("bert", "t5"))


def test_the_example_loads_in_a_fresh_process_and_another_kind_does_not(scale: Path) -> None:
    kinds = [configs_in(scale)[0], broken_kinds.UnsavedBuffer, broken_kinds.NotInTheFile]
    report = run_contract(kinds, ["llama"], checks=["fresh_process_computes_the_same"])
    last = {row.variant: row for row in report.rows if row.check != "attaches"}
    assert {name: row.outcome for name, row in last.items()} == {
        "scale": "passed",
        "unsaved-buffer": "failed",
        "not-in-the-file": "failed",
    }
    assert "persistent buffers, or make it from a seed" in last["unsaved-buffer"].message
    assert "loading in a fresh process failed: AttributeError" in last["not-in-the-file"].message


def test_the_example_compiles(scale: Path) -> None:
    report = run_contract(configs_in(scale)[0], ["llama"], checks=["one_compiled_graph_serves_every_choice"])
    assert [row.outcome for row in report.rows] == ["passed"] * 2, str(report)


@pytest.mark.slow
def test_the_example_keeps_every_promise_on_every_family(scale: Path) -> None:
    report = run_contract(configs_in(scale))
    assert report.ok, str(report)


def test_a_class_that_no_other_process_can_import_is_said() -> None:
    class Inner(broken_kinds.Broken):
        kind: Any = "inner-of-a-function"

        def build(self, spec: Any) -> Any:
            return broken_kinds.ScaleAdapter(spec)

    report = run_contract(Inner, ["llama"], checks=["fresh_process_computes_the_same"])
    assert report.ok and report.rows[-1].outcome == "does not apply"
    assert "Inner is not defined at the top level of a file" in report.rows[-1].message


def test_the_report_is_a_table_with_what_is_broken_below() -> None:
    report = run_contract(broken_kinds.StartsElsewhere, ["llama", "bert"], checks=QUICK)
    assert not report.ok and len(report.failures) == 2
    lines = str(report).splitlines()
    assert lines[0].startswith("starts-elsewhere: 3 passed, 2 failed, 3 do not apply, in ")
    assert lines[1].split() == ["check", "llama", "bert"]
    assert "fresh adapter is identity or declares it  failed  failed" in lines
    assert any(
        line.startswith("failed: fresh adapter is identity or declares it on llama: the config declares")
        for line in lines
    )
    assert "does not apply (-): padding on the left on bert: bert does not generate from a prompt" in lines


def test_a_family_that_lacks_a_needed_site_is_one_line_of_the_report() -> None:
    report = run_contract("bitfit", ["llama", "bert"], checks=QUICK[:1])
    assert [(row.check, row.family, row.outcome) for row in report.rows] == [
        ("attaches", "llama", "does not apply"),
        ("attaches", "bert", "passed"),
        (QUICK[0], "bert", "passed"),
    ]
    assert report.rows[0].message == "llama has no site 'bias', which the kind declares that it needs"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run_contract("lorra"), "lorra"),
        (lambda: run_contract("lora", ["lama"]), "no tiny base 'lama'. Did you mean 'llama'"),
        (lambda: run_contract("lora", checks=["ataches"]), "no check 'ataches'. Did you mean 'attaches'"),
        (lambda: run_contract(3), "an adapter is a config"),
    ],
)
def test_what_cannot_be_tested_is_an_error(call: Any, message: str) -> None:
    with pytest.raises(graft.GraftError, match=message):
        call()


def test_a_config_is_named_by_what_differs_from_its_example() -> None:
    assert [label_of(config) for config in (graft.LoRA(), graft.LoRA(rank=2, sites="mlp"))] == [
        "lora",
        "lora(sites=mlp, rank=2)",
    ]


@contract(graft.LoRA(rank=2), families=["llama"])
def test_the_pytest_form(case: Case, check: Check) -> None:
    if check.check.name in QUICK:  # pyright: ignore[reportAttributeAccessIssue]
        check(case)


def test_the_pytest_form_skips_what_does_not_apply() -> None:
    cases = contract("bitfit", families=["llama"]).args[1]
    with pytest.raises(AssertionError, match="attaches to none of llama"):
        cases[0].values[1](cases[0].values[0])
    with pytest.raises(pytest.skip.Exception, match="llama has no site 'bias'"):
        cases[1].values[1](cases[1].values[0])


def test_every_check_states_its_promise_and_runs_alone() -> None:
    case = Case("bert", "lora", graft.LoRA(rank=2))
    for name, check in CHECKS.items():
        assert check.promise.endswith((".", ").")) and check.function.__name__ == f"check_{name}"
    with pytest.raises(DoesNotApply, match="bert does not generate"):
        CHECKS["padding_on_the_left"](case)
    CHECKS["off_is_the_base"](case)


def test_no_file_of_the_room_imports_pytest_or_hypothesis_at_the_top() -> None:
    for file in Path(graft.testing.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pytest", "hypothesis"} & {name.split(".")[0] for name in names}, file


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `graft kinds`."""
    with pytest.raises(SystemExit) as end:
        main(["kinds", *arguments])
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


@pytest.mark.usefixtures("quick")
def test_the_command_tests_a_file(capsys: pytest.CaptureFixture[str], scale: Path) -> None:
    code, out, _ = called(capsys, "--contract", str(scale))
    assert code == 0 and "scale(sites=linear): " in out and "every promise is kept" in out
    code, out, _ = called(capsys, "--contract", str(scale), "--json")
    answer = json.loads(out)
    assert code == 0 and answer["ok"] and {row["variant"] for row in answer["rows"]} == {"scale", "scale(sites=linear)"}
    assert set(answer["rows"][0]) == {"check", "family", "variant", "outcome", "message", "seconds"}


@pytest.mark.usefixtures("quick")
def test_the_command_tests_a_kind_by_its_name_and_ends_with_1_when_a_promise_is_broken(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert called(capsys, "ia3", "--contract")[0] == 0
    file = tmp_path / "wrong_scale.py"
    file.write_text(scale_file().replace('"scale"', '"wrong-scale"').replace("torch.ones", "torch.zeros"))
    code, out, _ = called(capsys, str(file), "--contract")
    assert code == 1 and "2 broken promises" in out and "but a fresh adapter changes the output" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("x = 3", "defines no adapter kind: write a subclass"),
        (
            "import nothing_of_this_name",
            "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name' (line 1)",
        ),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("CONTRACT", "cannot be imported: NameError: name 'CONTRACT' is not defined (line 1)"),
        (scale_file().replace('"scale"', '"unusable"') + "\nCONTRACT = [3]\n", "CONTRACT is a list of configs"),
        (scale_file().replace('"scale"', '"lora"'), "there is an adapter kind 'lora' already"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "unusable.py"
    if text is not None:
        file.write_text(text)
    code, _, err = called(capsys, "--contract", str(file))
    assert code == 2 and message in " ".join(err.split()), err


def test_other_words_for_a_kind_are_errors_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "kind.txt").write_text("")
    for arguments, message in (
        (["--contract"], "--contract tests one kind"),
        (["--contract", "lorra"], "lorra"),
        (["--contract", str(tmp_path / "kind.txt")], "is no Python file"),
    ):
        code, _, err = called(capsys, *arguments)
        assert code == 2 and message in err
