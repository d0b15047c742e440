"""The rooms of the package: imports go down in the picture of docs/architecture.md, no file is in a circle of imports, nothing below
`cli` uses the facade, no module lies loose.

Imports under TYPE_CHECKING and inside functions count: they tie files together all the same.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import graft
from tests.conftest import ROOT

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


def _lines() -> dict[str, int]:
    """Room -> the line of the picture in docs/architecture.md in which it is."""
    section = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## The rooms")[1]
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    return {
        room: number
        for number, line in enumerate(lines)
        for room in re.findall(r"(?:^ {4}| {3,})([a-z_]+)(?:/|\.py)(?= )", line)
    }


def test_the_picture_has_every_room_and_imports_go_down() -> None:
    lines = _lines()
    there = {each.stem for each in PACKAGE.iterdir() if not each.name.startswith("_") and each.suffix != ".typed"}
    assert there == set(lines)
    up = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if (here := _room(module)) in lines and (other := _room(target)) in lines and here != other
        if lines[other] <= lines[here]
    ]
    assert not up, f"{up}: these are not below"


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
