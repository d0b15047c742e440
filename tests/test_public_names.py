"""The names that others type: complete, lazy, and never hidden by a module of the same name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import graft

PACKAGE = Path(graft.__file__).parent


@pytest.mark.parametrize("name", sorted(graft.__all__))
def test_every_public_name_resolves_to_the_object_of_its_home_module(name: str) -> None:
    value = getattr(graft, name)
    home = sys.modules[graft._HOME[name]]
    assert value is getattr(home, name)


def test_the_table_the_list_and_the_imports_for_type_checkers_agree() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("graft"):
            typed.update({alias.name: node.module for alias in node.names})
    assert typed.pop("__version__") == "graft.version"
    assert typed.pop("built_in_classes") == "graft.adapters.registry"
    missing = set(graft._HOME) - set(typed)
    assert not missing, f"editors do not know {sorted(missing)}: add their imports at the end of graft/__init__.py"
    assert typed == graft._HOME
    assert sorted(graft.__all__) == sorted(graft._HOME)
    assert set(graft.__all__) <= set(dir(graft))


def test_no_module_carries_a_public_name() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert modules.isdisjoint(graft.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        graft.atach  # noqa: B018


def test_importing_graft_imports_neither_torch_nor_pydantic() -> None:
    code = "import sys, graft; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
