"""Find the numbers in plain text.

A number may have separators of thousands (1,234 and 12 000 and 12'000 and 1.234,50), an exponent (1.5e3, 1.5 × 10^3, 2^10), be a
fraction or a mixed number (2/3, 2 2/3), and have a word of magnitude (5 million). A hyphen is a minus sign only if no digit,
letter or closing bracket comes before it ("5-3" ends in 3). What only looks like a number is `None` in the list: a part of a
product (2x, 2\\pi), a version, a number too large to write down.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from graft.evaluation.reading.plain import OPAQUE

_LARGEST = 120
"""Most digits of a number, and largest exponent of ten."""
_MAGNITUDES = {
    "hundred": 2,
    "thousand": 3,
    "k": 3,
    "million": 6,
    "mn": 6,
    "m": 6,
    "billion": 9,
    "bn": 9,
    "b": 9,
    "trillion": 12,
}

_PLAIN = r"""(?:
    [1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?
  | [1-9]\d?(?:,\d{2})+,\d{3}(?!\d)(?:\.\d+)?
  | [1-9]\d{0,2}(?:(?:[ ]\d{3})+|(?:'\d{3})+|(?:_\d{3})+)(?!\d)(?:[.,]\d+)?
  | [1-9]\d{0,2}(?:\.\d{3})+,\d+
  | [1-9]\d{0,2}(?:\.\d{3}){2,}(?!\d)
  | (?<!\d,)(?:0,\d+|\d+,\d{1,2})(?!\d|,\d)
  | \d+(?:\.\d+)?
  | \.\d+
  )(?:[eE][-+]?\d+(?!\w))?"""
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)\]%])[-+])?
    (?:(?P<whole>\d+)[ ]+(?P<top>\d+)[ ]?/[ ]?(?P<bottom>\d+)
      |(?P<over>{_PLAIN})[ ]?/[ ]?(?P<under>{_PLAIN})
      |(?P<lead>{_PLAIN})[ ]*×[ ]*10\^(?P<ten>[-+]?\d+)
      |(?P<base>{_PLAIN})\^(?P<power>-?\d+)
      |(?P<only>{_PLAIN}))
    (?P<size>(?:[ ](?:hundred|thousand|million|billion|trillion)\b)+|(?:[kKMB]|mn|bn)(?![A-Za-z]))?
    |{OPAQUE}""",
    re.VERBOSE,
)
_PART_OF_MORE = re.compile(
    rf"\.?[ ]?{OPAQUE}|[abcdeinpqrtuvwxyz](?![A-Za-z])|[ ][xyzn](?![A-Za-z'])(?![ ]*\d)|\((?=[\dA-Za-z])|[\^_#]|"
    rf"/[ ]?[\d({OPAQUE}]|\.\(?\d|'\d"
)
"""What follows a number that is only a part of an expression."""
_WORDED = re.compile(r"(?i)[ ]*(?:[A-Za-z]+[ ]+)?and[ ]+(a|one|three)[ -]+(half|quarter|quarters|fourth|fourths)\b")
_FUNCTION = re.compile(r"(?i)\b(?:log|ln|sin|cos|tan|sqrt|exp)[ ]*\(?[ ]*$")
_LABELLED = re.compile(
    r"(?i)\b(?:steps?|equation|eq\.|figure|fig\.|case|method|option|choice|question|problem|example)[ ]*[(#]?$"
)


@dataclass(frozen=True)
class Numeral:
    """A number in a text, or what only looks like one (`value` None)."""

    value: Fraction | None
    start: int
    end: int


def numerals(text: str) -> Iterator[Numeral]:
    """Yield the numbers of plain text in their order, without those that count something (Step 2, the items of a list)."""
    items = _list_items(text)
    for found in _NUMBER.finditer(text):
        start, end = found.span()
        before = text[max(0, start - 20) : start]
        if found[0] != OPAQUE and found["sign"] is None and re.search(r"[A-Za-z_^]$", before):
            continue  # a part of a name, such as H2O
        if start in items or _LABELLED.search(before):
            continue
        dashed = found["over"] is not None and re.search(r"\d-$", before)  # 5-1/2
        if found[0] == OPAQUE or dashed or _is_part(text, start, end):
            yield Numeral(None, start, end)
            continue
        value = _value(found)
        worded = _WORDED.match(text, end)
        if value is not None and worded is not None and value.denominator == 1:
            part = Fraction(3 if worded[1].lower() == "three" else 1, 2 if worded[2].lower() == "half" else 4)
            value, end = (value - part if value < 0 else value + part), worded.end()
        yield Numeral(value, start, end)


def _is_part(text: str, start: int, end: int) -> bool:
    """Whether the number at these places is only a part of an expression, such as 2x or x/2."""
    before = text[max(0, start - 2) : start]
    if _FUNCTION.search(text[max(0, start - 8) : start]):
        return True
    pair = re.fullmatch(r"-?\d+,\d+", text[start:end]) is not None
    return (
        _PART_OF_MORE.match(text, end) is not None
        or re.search(rf"[\w){OPAQUE}][ ]?/$|/[ ]$|\d[.:]$|{OPAQUE}[ ]?$", before) is not None
        or (pair and not re.fullmatch(r"-?[1-9]\d{0,2},\d{3}", text[start:end]) and before.endswith("("))
    )


def _value(found: re.Match[str]) -> Fraction | None:
    value = _magnitude_free(found)
    if value is None:
        return None
    for word in (found["size"] or "").split():
        value *= 10 ** _MAGNITUDES[word.lower()]
    return -value if found["sign"] == "-" else value


def _magnitude_free(found: re.Match[str]) -> Fraction | None:
    """Return the value without sign and word of magnitude; None if it cannot be computed or written."""
    if found["whole"] is not None:
        part = _ratio(_read(found["top"]), _read(found["bottom"]))
        whole = _read(found["whole"])
        return None if part is None or whole is None else whole + part
    if found["over"] is not None:
        return _ratio(_read(found["over"]), _read(found["under"]))
    if found["lead"] is not None:
        return _raised(_read(found["lead"]), Fraction(10), found["ten"])
    if found["base"] is not None:
        return _raised(Fraction(1), _read(found["base"]), found["power"])
    return _read(found["only"])


def _ratio(top: Fraction | None, bottom: Fraction | None) -> Fraction | None:
    return top / bottom if top is not None and bottom else None


def _raised(factor: Fraction | None, base: Fraction | None, power: str) -> Fraction | None:
    small = len(power) <= 4 and abs(int(power)) <= _LARGEST
    if factor is None or base is None or not small or (base == 0 and int(power) < 0):
        return None
    digits = max(len(str(base.numerator)), len(str(base.denominator)))
    return factor * base ** int(power) if digits * max(1, abs(int(power))) <= 2 * _LARGEST else None


def _read(text: str) -> Fraction | None:
    """Read a number without sign, whatever its separators; None if it is too long to write."""
    digits, _, exponent = text.lower().partition("e")
    if len(digits) > _LARGEST or len(exponent) > 4 or abs(int(exponent or 0)) > _LARGEST:
        return None
    digits = re.sub(r"[ '_]", "", digits)
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+|0,\d+|\d+,\d{1,2}|\d{4,},\d+", digits):
        digits = digits.replace(".", "").replace(",", ".")
    elif re.fullmatch(r"\d{1,3}(?:\.\d{3}){2,}", digits):
        digits = digits.replace(".", "")
    return Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent or 0)


def _list_items(text: str) -> set[int]:
    """Return the places of the numbers that begin the items of a numbered list: 1., then 2., and so on."""
    found: set[int] = set()
    expected = 1
    for item in re.finditer(r"(?m)^[ \t>]*(\d{1,2})[.)][ \t]+(?=[^\d\s])", text):
        if int(item[1]) in (1, expected):
            found.add(item.start(1))
            expected = int(item[1]) + 1
    return found
