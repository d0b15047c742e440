"""Text of data, files and models on a terminal: control characters are shown and never obeyed.

A row of data may hold the sequence that renames the window, moves the cursor or turns text around. `visible` writes such characters as
escapes, `console` does so in whatever rich prints, and `shown` for every other writer of a stream.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_TURNING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that turn the direction of text around."""
_OBEYED = [
    code
    for code in (*range(0xA0), 0x2028, 0x2029, *_TURNING, *range(0xD800, 0xE000))
    if chr(code) not in "\n\t" and unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
]
ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _OBEYED}
"""What a terminal would obey, or cannot be encoded -> how it is shown."""
_STYLE = re.compile(r"(\x1b\[[0-9;]*m)")


def visible(text: str) -> str:
    """Return text with control characters as escapes; line ends and tabs stay."""
    return text.translate(ESCAPES)


def console(*, stderr: bool = False, **options: Any) -> Console:
    """Make a rich console that shows the control characters of what it prints. options: those of rich's `Console`."""
    from collections.abc import Iterable

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Shows(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    stream = sys.stderr if stderr else sys.stdout
    return Shows(file=stream.stream if isinstance(stream, _Shown) else stream, **options)


def shown(stream: TextIO) -> Any:
    """Return a stream that writes to another, with control characters as escapes; colours stay."""
    return _Shown(stream)


class _Shown:
    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        pieces = _STYLE.split(text)  # every second one is a colour
        self.stream.write("".join(piece if at % 2 else visible(piece) for at, piece in enumerate(pieces)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
