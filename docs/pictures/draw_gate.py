"""Draw the picture of a stack, a sum and a gate, for light and dark pages: python docs/pictures/draw_gate.py"""

from __future__ import annotations

from pathlib import Path

from draw_mixture import COLOURS, arrow, box

TITLE = "A stack, a sum and a gate at one site"
TEXT = "In a stack each adapter gets the output of the one before. In a sum all get the same. A gate scales what an adapter changes."


def said(x: int, y: int, text: str, c: dict[str, str], more: str = 'font-style="italic"') -> str:
    return f'<text x="{x}" y="{y}" fill="{c["ink"]}" {more}>{text}</text>'


def name(y: int, text: str, c: dict[str, str]) -> str:
    return f'<text x="24" y="{y}" fill="{c["line"]}" font-size="14">{text}</text>'


def line(path: str, c: dict[str, str], head: bool = True) -> str:
    end = ' marker-end="url(#arrow)"' if head else ""
    return f'<path d="{path}" stroke="{c["line"]}" stroke-width="1.6" fill="none"{end}/>'


def sign(x: int, y: int, text: str, c: dict[str, str]) -> str:
    return (
        f'<circle cx="{x}" cy="{y}" r="15" fill="{c["on"]}" stroke="{c["green"]}" stroke-width="1.6"/>'
        f'<text x="{x}" y="{y + 6}" text-anchor="middle" fill="{c["ink"]}">{text}</text>'
    )


def stack(c: dict[str, str]) -> list[str]:
    return [
        name(32, "stack (a list): the second adapter reads what the first one left", c),
        said(20, 71, "h", c), arrow(38, 118, 65, c), box(122, 44, 130, "adapter 1", True, c),
        arrow(252, 318, 65, c), box(322, 44, 130, "adapter 2", True, c), arrow(452, 540, 65, c),
        said(550, 71, "adapter 2 (adapter 1 (h))", c),
    ]  # fmt: skip


def added(c: dict[str, str]) -> list[str]:
    return [
        name(128, "sum: both read the same, and their changes are added", c),
        said(20, 190, "h", c), line("M38 184 H80 V161 H118", c), line("M80 184 V211 H118", c),
        box(122, 140, 130, "adapter 1", True, c), box(122, 190, 130, "adapter 2", True, c),
        line("M252 161 H400 V168", c), line("M252 211 H400 V200", c), sign(400, 184, "+", c), arrow(415, 540, 184, c),
        said(550, 190, "h + change 1 + change 2", c),
    ]  # fmt: skip


def gate(c: dict[str, str]) -> list[str]:
    return [
        name(272, "gate: a number from the activations scales the change", c),
        said(20, 336, "h", c), line("M38 330 H80 V307 H118", c), line("M80 330 V357 H118", c),
        box(122, 286, 130, "adapter", True, c), box(122, 336, 210, "g = sigmoid(w u + b)", False, c),
        line("M252 307 H400 V314", c), line("M332 357 H400 V346", c), sign(400, 330, "\u00d7", c), arrow(415, 540, 330, c),
        said(550, 336, "h + g \u00b7 change", c),
    ]  # fmt: skip


def picture(c: dict[str, str]) -> str:
    marker = (
        '<marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{c["line"]}"/></marker>'
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 396" width="900" height="396" role="img"'
    family = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
    about = f'     aria-labelledby="title desc" font-family="{family}" font-size="16">'
    titles = f'<title id="title">{TITLE}</title><desc id="desc">{TEXT}</desc><defs>{marker}</defs>'
    return "\n".join([head, about, titles, *stack(c), *added(c), *gate(c), "</svg>\n"])


if __name__ == "__main__":
    for theme, colours in COLOURS.items():
        Path(__file__).with_name(f"gate-{theme}.svg").write_text(picture(colours), encoding="utf-8")
