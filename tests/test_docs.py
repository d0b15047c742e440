"""The pages agree with one another and with the code: links, paths, messages, names."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import graft
from graft.adapters.registry import built_in_classes
from graft.cli import VERBS
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
GENERATED = DOCS / "adapters"
WIDTH = 100


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """The ids of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", _prose(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    for target in targets:
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(file), target
        if DOCS in page.parents:
            assert DOCS in file.parents, f"{target} lies outside of docs/, where the site cannot follow"


@pytest.mark.parametrize("page", [page for page in PAGES if GENERATED not in page.parents], ids=_name)
def test_prose_fits_the_width(page: Path) -> None:
    free = ("|", "    ", "  <img", "::: ")  # tables, indented code
    long = [line for line in _prose(page).splitlines() if len(line) > WIDTH and not line.startswith(free)]
    breakable = [line for line in long if " " in re.sub(r"`[^`]*`|\]\([^)]*\)", "", line.strip())]
    assert not breakable


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=_name)
def test_every_path_in_the_text_exists(page: Path) -> None:
    for path in re.findall(r"`((?:src|tests|docs|benchmarks|examples|recipes)/[\w./-]*)`", _prose(page)):
        assert (ROOT / path).exists(), path
    rooms = "|".join(each.name for each in (ROOT / "src" / "graft").iterdir() if each.is_dir())
    for path in re.findall(rf"`((?:{rooms})/[\w./]*)`", _prose(page)):
        assert (ROOT / "src" / "graft" / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_verb_in_the_text_is_one(page: Path) -> None:
    verbs = re.findall(r"(?:`|^\$ |^    )graft ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(verbs) <= set(VERBS)


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = set(re.findall(r"([\w/-]+\.md)\b", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {page.name for page in DOCS.glob("*.md")} | {"adapters/README.md"}


def test_the_reference_has_every_public_name() -> None:
    shown = re.findall(r"^::: graft\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(set(graft.__all__) - set(built_in_classes()))  # the kinds have pages of their own


@cache
def _texts() -> tuple[str, ...]:
    """Every text in the code, with a mark for each value that is put in."""
    found: list[str] = []
    for file in (ROOT / "src" / "graft").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(each.value if isinstance(each, ast.Constant) else "\0" for each in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


MESSAGES = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_of_the_troubleshooting_page_is_in_the_code(message: str) -> None:
    pattern = re.compile(".+".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in _texts())


def test_the_two_pictures_differ_in_colours_alone() -> None:
    light, dark = (
        re.sub(r"#[0-9a-f]{6}\b", "", (DOCS / "pictures" / f"site-{mode}.svg").read_text())
        for mode in ("light", "dark")
    )
    assert light == dark


def test_what_the_architecture_names_is_where_it_says() -> None:
    text = re.sub(r"\s+", " ", (DOCS / "architecture.md").read_text(encoding="utf-8"))
    named = re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)
    assert len(named) > 40
    for name, path in named:
        assert re.search(rf"^(?:def|class) {name}\b", (ROOT / "src" / "graft" / path).read_text(), re.MULTILINE), (
            name,
            path,
        )
