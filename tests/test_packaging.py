"""The project frame: constraints that pin what the Makefile installs, and a package that says what it is."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import entry_points, version

import graft
from graft.cli import main
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE))


PINS, FLOORS = _pins("constraints.txt"), _pins("tests/versions/floors.txt")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def test_what_the_makefile_installs_is_pinned_within_the_bounds_of_the_project() -> None:
    pins = {_plain(name): pin for name, pin in PINS.items()}
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["dev"], *extras["report"], *extras["docs"]]:
        name, bound = requirement.split(">=")
        assert _numbers(pins[_plain(name)]) >= _numbers(bound), requirement
    assert pins["torch"] == "2.13.0"


def test_every_floor_of_a_core_dependency_is_the_release_that_is_tested() -> None:
    promised = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])
    tools = dict(requirement.split(">=") for requirement in PROJECT["optional-dependencies"]["dev"])
    assert set(promised) <= set(FLOORS) <= set(promised) | set(tools)
    for name, tested in FLOORS.items():
        bound = _numbers((promised | tools)[name])
        assert _numbers(tested) == bound + (0,) * (len(_numbers(tested)) - len(bound)), name


def test_the_site_is_built_with_what_the_extra_docs_names() -> None:
    recipe = (ROOT / "Makefile").read_text().split("$(VENV)/.graft-docs: ")[1]
    assert re.findall(r"'([^']+)'", recipe) == PROJECT["optional-dependencies"]["docs"]


def test_the_subset_of_test_versions_is_there() -> None:
    script = (ROOT / "tests/versions/try.sh").read_text()
    paths = re.search(r'^SUBSET="(.*?)"', script, re.MULTILINE | re.DOTALL)
    assert paths is not None and len(paths[1].split()) > 10
    assert [path for path in paths[1].split() if not (ROOT / path).exists()] == []


def test_the_installed_package_is_this_version_and_has_the_command() -> None:
    assert version("graft-llm") == graft.__version__
    [command] = entry_points(group="console_scripts", name="graft")
    assert command.load() is main


def test_the_changelog_speaks_of_this_version() -> None:
    assert f"## {graft.__version__}" in (ROOT / "CHANGELOG.md").read_text()
