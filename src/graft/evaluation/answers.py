"""Is an answer right? Two metrics with their rules written down.

`numeric` compares the last number of the answer with the last number of the reference, as values: 72, 72.0 and 1,234 = 1234.
Before that, these are taken out of the way: thousands separators (a comma between digits that is followed by exactly three),
currency signs before or behind the sign, the sentence's last period, and the Unicode minus. A hyphen is a minus only where no
digit, letter or closing bracket stands before it ("5-3" ends in 3). An answer without a number is unextractable.

`exact` compares the texts after Unicode normalisation (NFKC), case folding, joining of white space, and without the last
period. An empty answer is unextractable.
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
    """The last number in a text, or None."""
    text = re.sub(rf"([{_CURRENCY}])\s*-\s*(?=[\d.])", r"-\1", text.replace("\u2212", "-"))
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    return Decimal(("-" if found[-1]["minus"] else "") + found[-1]["digits"].replace(",", ""))


def normalised(text: str) -> str:
    """The form in which `exact` compares texts."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def extract(text: str, metric: Metric) -> str | None:
    """What of an answer is compared, as text, or None for nothing."""
    if metric == "exact":
        return normalised(text) or None
    number = last_number(text)
    return None if number is None else f"{number.normalize() + 0:f}"  # + 0 turns -0 into 0


def choose_metric(wanted: Literal["auto", "exact", "numeric"], references: Iterable[str]) -> Metric:
    """The metric of a data set: `auto` is numeric where every reference has a number."""
    if wanted != "auto":
        return wanted
    return "numeric" if all(last_number(reference) is not None for reference in references) else "exact"
