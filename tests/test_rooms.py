"""The rooms of the package: no file is in a circle of imports, nothing below `cli` uses the facade, no module lies loose.

Imports under TYPE_CHECKING and inside functions count: they tie files together all the same. That rooms import only lower rooms is
checked with their picture in docs/architecture.md (test_docs.py).
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import graft

PACKAGE = Path(graft.__file__).parent
LOOSE = {"__init__.py", "__main__.py", "errors.py", "run.py", "version.py"}


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of Graft that it imports, anywhere in its text."""
    paths = {_name(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "graft":
                targets |= {
                    full if (full := f"{node.module}.{alias.name}") in paths else str(node.module)
                    for alias in node.names
                }
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names if alias.name.split(".")[0] == "graft"}
        found[name] = (targets & set(paths)) - {name}
    return found


def _name(path: Path) -> str:
    return ".".join(("graft", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_file_is_in_a_circle_of_imports() -> None:
    left = dict(imports())
    while leaves := {module for module, targets in left.items() if not targets & set(left)}:
        left = {module: targets for module, targets in left.items() if module not in leaves}
    # what is left is circles and what leads to them: drop the latter from the top
    while roots := {module for module in left if not any(module in targets for targets in left.values())}:
        left = {module: targets for module, targets in left.items() if module not in roots}
    assert sorted(left) == []


def test_nothing_below_cli_uses_the_facade() -> None:
    assert [
        module for module, targets in imports().items() if "graft" in targets and _room(module) not in ("cli", "")
    ] == []


def test_no_module_lies_loose_beside_the_rooms() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == LOOSE
