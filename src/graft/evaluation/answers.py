"""The two metrics that decide whether an answer to a data file's question is right.

`numeric` compares the last number of the answer with the last number of the reference by value: 72 equals 72.0 and 1,234
equals 1234. It ignores thousands separators (a comma before exactly three digits), currency signs before or after the minus
sign, and the period at the end of a sentence, and it reads the Unicode minus. A hyphen is a minus sign only if no digit,
letter or closing bracket comes before it ("5-3" ends in 3). An answer without a number is unextractable.

`exact` compares the texts after Unicode normalisation (NFKC), case folding and joining of white space, and without a period
at the end. An empty answer is unextractable.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from typing import Literal

Metric = Literal["exact", "numeric"]
_CURRENCY = "$€£¥₹"
_NUMBER = re.compile(
    rf"(?P<minus>(?<![\w)\]])-)?[{_CURRENCY}]?(?P<digits>\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, or None."""
    text = re.sub(rf"([{_CURRENCY}])\s*-\s*(?=[\d.])", r"-\1", text.replace("\u2212", "-"))
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    return Decimal(("-" if found[-1]["minus"] else "") + found[-1]["digits"].replace(",", ""))


def normalised(text: str) -> str:
    """Return the form in which `exact` compares texts."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def extract(text: str, metric: Metric) -> str | None:
    """Return the part of an answer that is compared, as text; None if there is none."""
    if metric == "exact":
        return normalised(text) or None
    number = last_number(text)
    return None if number is None else f"{number.normalize() + 0:f}"  # + 0 turns -0 into 0


def choose_metric(wanted: Literal["auto", "exact", "numeric"], references: Iterable[str]) -> Metric:
    """Choose the metric of a data set: `auto` becomes numeric if every reference has a number, else exact."""
    if wanted != "auto":
        return wanted
    return "numeric" if all(last_number(reference) is not None for reference in references) else "exact"
