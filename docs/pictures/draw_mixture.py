"""Draw the picture of a mixture, for light and dark pages: python docs/pictures/draw_mixture.py"""

from __future__ import annotations

from pathlib import Path

COLOURS = {
    "light": {
        "ink": "#1f2328",
        "line": "#59636e",
        "idle": "#eaeef2",
        "edge": "#8c959f",
        "on": "#dafbe1",
        "green": "#1a7f37",
    },
    "dark": {
        "ink": "#e6edf3",
        "line": "#9198a1",
        "idle": "#262c36",
        "edge": "#656c76",
        "on": "#12361f",
        "green": "#3fb950",
    },
}
ROWS = (("training, first pass", 1), ("training, second pass", 3), ("evaluation and file", None))
TITLE = "A mixture of four experts that share up"
TEXT = "In each pass of training one of four down matrices is drawn. Evaluation and the saved file use their mean."


def box(x: int, y: int, width: int, text: str, on: bool, c: dict[str, str]) -> str:
    fill, edge = (c["on"], c["green"]) if on else (c["idle"], c["edge"])
    weight = ' font-weight="600"' if on else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="42" rx="8" fill="{fill}" stroke="{edge}" stroke-width="1.6"/>'
        f'<text x="{x + width // 2}" y="{y + 27}" text-anchor="middle" fill="{c["ink"]}"{weight}>{text}</text>'
    )


def arrow(x: int, to: int, y: int, c: dict[str, str]) -> str:
    return f'<path d="M{x} {y} H{to}" stroke="{c["line"]}" stroke-width="1.6" fill="none" marker-end="url(#arrow)"/>'


def row(number: int, name: str, chosen: int | None, c: dict[str, str]) -> list[str]:
    y = 44 + 96 * number
    parts = [f'<text x="24" y="{y - 12}" fill="{c["line"]}" font-size="14">{name}</text>', arrow(34, 84, y + 21, c)]
    parts.append(f'<text x="24" y="{y + 27}" text-anchor="middle" fill="{c["ink"]}" font-style="italic">h</text>')
    if chosen is None:
        parts.append(box(88, y, 392, "mean of down 1, down 2, down 3, down 4", True, c))
    for at in range(4) if chosen is not None else ():
        parts.append(box(88 + 100 * at, y, 92, f"down {at + 1}", at + 1 == chosen, c))
    parts += [arrow(480, 524, y + 21, c), box(528, y, 92, "up", True, c), arrow(620, 690, y + 21, c)]
    parts.append(f'<text x="696" y="{y + 27}" fill="{c["ink"]}" font-style="italic">h + up(act(down(h)))</text>')
    return parts


def picture(c: dict[str, str]) -> str:
    parts = [part for number, (name, chosen) in enumerate(ROWS) for part in row(number, name, chosen, c)]
    marker = (
        '<marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{c["line"]}"/></marker>'
    )
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 290" width="900" height="290" role="img"',
            '     aria-labelledby="title desc" font-family="system-ui, \'Segoe UI\', Helvetica, Arial, sans-serif" font-size="16">',
            f'<title id="title">{TITLE}</title><desc id="desc">{TEXT}</desc><defs>{marker}</defs>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    for name, colours in COLOURS.items():
        Path(__file__).with_name(f"mixture-{name}.svg").write_text(picture(colours), encoding="utf-8")
