"""Draw the picture of several adapters on one row, and of fusion, for light and dark pages: python docs/pictures/draw_together.py"""

from __future__ import annotations

from pathlib import Path

from draw_gate import line, name, said, sign
from draw_mixture import COLOURS, arrow, box

TITLE = "Several adapters on one row, and attention over trained adapters"
TEXT = "Each row adds the weighted changes of its own adapters to what the base gave it. Fusion makes the weights from the activations."


def rows(c: dict[str, str]) -> list[str]:
    drawn = [name(32, "on one row: each row takes its own adapters, each with a weight; the base runs once", c)]
    choices = (("base alone", "h"), ("style", "h + style"), ("0.5 \u00b7 style, task", "h + 0.5 \u00b7 style + task"))
    for number, (choice, result) in enumerate(choices):
        middle = 68 + 50 * number
        drawn += [
            said(20, middle + 6, f"row {number + 1}", c), arrow(70, 118, middle, c),
            arrow(252, 318, middle, c), box(322, middle - 21, 200, choice, number > 0, c), arrow(522, 590, middle, c),
            said(600, middle + 6, result, c),
        ]  # fmt: skip
    return [*drawn, tall("base", 47, 142, c)]


def tall(text: str, top: int, height: int, c: dict[str, str]) -> str:
    """A box over several rows."""
    return (
        f'<rect x="122" y="{top}" width="130" height="{height}" rx="8" fill="{c["idle"]}" stroke="{c["edge"]}" stroke-width="1.6"/>'
        f'<text x="187" y="{top + height // 2 + 6}" text-anchor="middle" fill="{c["ink"]}">{text}</text>'
    )


def fusion(c: dict[str, str]) -> list[str]:
    return [
        name(232, "fusion: for each token, an attention says how much of each trained adapter to take", c),
        said(20, 310, "h", c), line("M38 304 H80 V281 H118", c), line("M80 304 V331 H118", c), line("M80 331 V381 H118", c),
        box(122, 260, 130, "adapter 1", False, c), box(122, 310, 130, "adapter 2", False, c),
        box(122, 360, 260, "attention: h asks", True, c),
        line("M252 281 H440 V315", c), line("M252 331 H422", c), line("M382 381 H440 V349", c),
        sign(440, 331, "\u00d7", c), arrow(455, 590, 331, c),
        said(600, 337, "h + a\u2081 \u00b7 change 1 + a\u2082 \u00b7 change 2", c),
    ]  # fmt: skip


def picture(c: dict[str, str]) -> str:
    marker = (
        '<marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{c["line"]}"/></marker>'
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 416" width="900" height="416" role="img"'
    family = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
    about = f'     aria-labelledby="title desc" font-family="{family}" font-size="16">'
    titles = f'<title id="title">{TITLE}</title><desc id="desc">{TEXT}</desc><defs>{marker}</defs>'
    return "\n".join([head, about, titles, *rows(c), *fusion(c), "</svg>\n"])


if __name__ == "__main__":
    for theme, colours in COLOURS.items():
        Path(__file__).with_name(f"together-{theme}.svg").write_text(picture(colours), encoding="utf-8")
