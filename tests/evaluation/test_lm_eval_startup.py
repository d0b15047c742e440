"""What is installed for lm-eval: a line that Python runs at its start, which costs nothing and makes `lm_eval --model graft` work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest

import _graft_lm_eval
from tests.runs_at_hand import make_run

ROWS = [{"instruction": f"What is {n} plus 2?", "input": "", "output": "", "answer": str(n + 2.0)} for n in range(3)]


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, *arguments, "-c", code], check=True, capture_output=True, text=True).stdout


def test_at_its_start_python_imports_the_small_package_and_nothing_else_of_graft() -> None:
    code = "import sys; print([n for n in sys.modules if n.split('.')[0] in ('graft', '_graft_lm_eval', 'lm_eval', 'torch')])"
    assert python(code).strip() == "['_graft_lm_eval']"
    before = "import sys; before = set(sys.modules); import _graft_lm_eval; print(sorted(set(sys.modules) - before))"
    where = str(Path(_graft_lm_eval.__file__).parent.parent)
    assert python(f"import sys; sys.path.append({where!r}); {before}", "-S").strip() == "['_graft_lm_eval']"


def test_uninstalling_takes_the_start_up_line_away_since_it_is_recorded() -> None:
    assert "graft_lm_eval.pth" in {str(file) for file in files("graft-llm") or []}


def test_other_modules_are_found_as_if_the_finder_were_not_there() -> None:
    assert _graft_lm_eval.Finder.find_spec("json") is None
    assert _graft_lm_eval.Finder.find_spec("lm_eval.models.huggingface", ["/nowhere"]) is None


def test_a_task_manager_gets_the_folder_of_tasks_behind_its_own_and_before_the_users() -> None:
    class TaskManager:
        def __init__(self, verbosity: Any = None, include_path: Any = None, include_defaults: bool = True) -> None:
            self.paths = include_path

    module = types.ModuleType("manager")
    module.TaskManager = TaskManager  # pyright: ignore[reportAttributeAccessIssue]
    _graft_lm_eval.add_tasks(module)
    _graft_lm_eval.add_tasks(module)
    folder = Path(_graft_lm_eval.__file__).parent.parent / "graft" / "evaluation" / "lm_eval" / "tasks"
    assert TaskManager().paths == [str(folder)]
    assert TaskManager(None, "mine").paths == [str(folder), "mine"]
    assert TaskManager(include_path=["mine", "yours"]).paths == [str(folder), "mine", "yours"]
    assert TaskManager(include_path="mine", include_defaults=False).paths == "mine"


def test_an_lm_eval_of_another_shape_is_left_alone_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="could not register its model and tasks"):
        _graft_lm_eval._then(_graft_lm_eval.add_tasks, types.ModuleType("manager"))


@pytest.mark.slow
def test_the_command_works_as_it_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval comes with graft-llm[eval]")
    run = make_run(tmp_path / "math", {"lora": {"kind": "lora", "rank": 2, "sites": "attn.q mlp.down"}}, context=640)
    (tmp_path / "sets" / "SVAMP").mkdir(parents=True)
    (tmp_path / "sets" / "SVAMP" / "test.json").write_text(json.dumps(ROWS))
    arguments = f"base={tmp_path / 'math-base'},adapter={run / 'adapters' / 'lora'}"
    line = [str(Path(sys.executable).parent / "lm_eval"), "--model", "graft", "--model_args", arguments]
    line += ["--tasks", "graft_svamp", "--metadata", f"data={tmp_path / 'sets'}", "--limit", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "|graft_svamp|" in answer.stdout
