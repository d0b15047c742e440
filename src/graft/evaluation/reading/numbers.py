"""Read the number that an output gives as its answer.

A number that is stated (`statements`) counts, else the last number of the output. Of two boxes the last counts, of several
lines with #### the first, because models go on with another question. After "x = 3 + 4 = 7" it is the 7. An answer that is not
one number has none: "3 or 5", "5-10", "5 hours and 30 minutes", "2\\pi". The last number of an output without a statement may
also end a range or a list ("3-5" gives 5).
"""

from __future__ import annotations

import re
from enum import Enum
from fractions import Fraction

from graft.evaluation.reading.numerals import Numeral, numerals
from graft.evaluation.reading.plain import BOX_CLOSE, BOX_OPEN, plain
from graft.evaluation.reading.statements import Statement, segments, statements


class _Nothing(Enum):
    NOTHING = "nothing"


NOTHING = _Nothing.NOTHING
Found = Fraction | None | _Nothing
"""A number; None: there is an answer, which is not one number; nothing: there is no answer here."""
_TRIED = 20
"""Most statements of one strength that are read, from the last one."""

_LEAD = re.compile(
    r"(?i)[\s:=\"'(\[|-]*?(?:(?:about|approximately|approx\.?|roughly|around|exactly|only|just|equal to|a total of|therefore|thus|then|"
    r"simply|also|still|=)[\s:]+)*[\s:=\"'(\[|]*(?=[-+.\d])"
)
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n|</")
_OPERATOR = re.compile(
    r"\s*[\])]?\s*(?:(?:(?<![A-Za-z])-|/)(?![ ]*[A-Za-z]{2})|[+×÷*^]|(?:plus|minus|times|divided by|over|out of)\b|of(?=\s*[\d.]))"
    r"\s*[(A-Za-z\d.]"
)
_NEXT = r"[-+]?[\d.(]|[-+]?\d"
_JOINED = re.compile(
    rf"(?i)\s*(?:,?\s*(?:and|or|to|through)|[,;:/&-])(?:\s+(?:about|also|then))?\s*(?:[A-Za-z]\s*=\s*)?(?:{_NEXT})"
)
_UNIT = re.compile(r"\s*(?!and\b|or\b|to\b)[A-Za-z%'.²/]+")
_DENIED = re.compile(
    r"(?i)(?:\bnot|n't|\bcannot)(?:[ ]+be)?[ ]+$|\b(?:more|less|greater|fewer|other)[ ]+than[ ]+$|[<>][ ]*$"
)
_LIST = re.compile(r"\s*1[.)][ \t]+[^\d\s].*^[ \t]*2[.)][ \t]", re.DOTALL | re.MULTILINE)
_RELATION = frozenset(
    [
        "in",
        "per",
        "for",
        "at",
        "after",
        "by",
        "on",
        "of",
        "from",
        "within",
        "every",
        "each",
        "since",
        "with",
        "over",
        "during",
        "before",
        "until",
        "because",
        "if",
        "when",
        "as",
        "so",
        "which",
        "where",
        "that",
        "than",
        "while",
        "but",
        "not",
        "given",
        "using",
        "left",
    ]
)
_VERBS = re.compile(
    r"(?i)\b(?:is|are|was|were|has|have|had|will|would|cost|costs|gives?|buys?|sells?|goes|went|sold|bought)\b"
)
_NONE = re.compile(
    r"(?i)(?:(?:a|an|the|therefore)\s+)*(?:un(?:known|defined|determined)|impossible|indeterminate|not possible|cannot|none|infinit|"
    r"zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|"
    r"hundred)"
)
"""What a sentence begins with that states an answer without digits."""
_LARGER = re.compile(r"\s*(?:×|\^|/\s*\d|(?:hundred|thousand|million|billion|trillion)\b)")


def read_number(output: str) -> Fraction | None:
    """Return the number that an output gives as its answer, or None."""
    for segment in segments(output):
        found = _in_segment(segment)
        if found is not NOTHING:
            return found
    return None


def is_number(text: str) -> bool:
    """Whether a text is one number and nothing else, but for a currency or percent sign. Codes (007) and dates are none."""
    own = plain(text).strip().removesuffix(".")
    bare = own.removesuffix("%").rstrip()
    if re.match(r"[-+]?0\d", bare) or re.search(r"[A-DF-Za-df-z]", bare):
        return False
    found = list(numerals(bare))
    return len(found) == 1 and found[0].value is not None and (found[0].start, found[0].end) == (0, len(bare))


def written(value: Fraction) -> str:
    """Write a number as a decimal if it has an end, else as a fraction in lowest terms."""
    rest, digits = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        digits = max(digits, count)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    if digits == 0:
        return str(value.numerator)
    scaled = f"{abs(value.numerator) * 10**digits // value.denominator:0{digits + 1}d}"
    return f"{'-' if value < 0 else ''}{scaled[:-digits]}.{scaled[-digits:]}"


def _in_segment(segment: str) -> Found:
    places = list(statements(segment))
    mark: Found = next(
        (found for each in places if each.kind == "mark" and (found := _phrase(each)) is not NOTHING), NOTHING
    )
    if mark is not NOTHING:
        return mark
    for strong in (True, False):
        chosen = [each for each in places if each.strong == strong and each.kind != "mark"]
        for each in sorted(chosen, key=lambda one: one.end, reverse=True)[:_TRIED]:
            found = _box(segment, each) if each.kind == "box" else _phrase(each)
            if found is not NOTHING:
                return found
    return _last(segment)


def _box(segment: str, box: Statement) -> Found:
    """Read a box. What stands outside it may belong to its number: a sign, a power of ten, the word "or" and another box."""
    content = re.sub(r"^\s*\((.*)\)\s*$", r"\1", box.content)
    value = _start(content, anchored=False)
    signed = segment[: box.start].rstrip(" ").endswith("-")
    return None if value is NOTHING or box.joined or signed or _LARGER.match(segment, box.end) else value


def _phrase(statement: Statement) -> Found:
    """Read the number behind words such as "the answer is"."""
    content = re.sub(f"[{BOX_OPEN}{BOX_CLOSE}]", " ", statement.content)
    if statement.kind == "mark":
        return _start(_sentence(content), anchored=True)
    if _LIST.match(content):
        return _last(content)
    sentence = _sentence(content)
    found = _start(sentence, anchored=True)
    if statement.kind == "is":
        if found is NOTHING and _NONE.match(sentence):
            return None
        return _in_words(sentence) if found is NOTHING else found
    # "Answer:" may begin a piece of reasoning, such as "Answer: 48/2 = 24 clips were sold in May. 48 + 24 = 72".
    worked = found is NOTHING or "=" in sentence or _VERBS.search(sentence) is not None
    more = content.lstrip(" \t\n:")[len(sentence) :].strip(" \t\n.")
    if worked and (more or found is NOTHING):
        return _last(content)
    return found


def _sentence(text: str) -> str:
    """Return the first sentence or line of a text."""
    text = text.lstrip(" \t\n:\"'|")
    end = _SENTENCE_END.search(text)
    return text if end is None else text[: end.start()]


def _start(text: str, *, anchored: bool) -> Found:
    """Read the number that a phrase begins with, or that it arrives at after equals signs.

    anchored: False allows words before the number.
    """
    first = _first(text, anchored)
    if first is not None and (first.value is None or not _OPERATOR.match(text, first.end)):
        rest = text[first.end :]
        bare = re.sub(r"\([^()]*\)", " ", rest)
        if "=" not in bare:
            return first.value if first.value is None or _is_whole(bare, boxed=not anchored) else None
    *parts, last = re.sub(r"\([^()=]*=[^()]*\)", " ", text).split("=")
    if not parts:
        return None if first is not None else NOTHING
    if any(re.search(r"[,;]\s|\b(?:and|or)\b", part) for part in parts[1:]):
        return None
    final = _first(last, anchored=True)
    if final is None:
        return NOTHING if anchored and first is None else None
    if not _OPERATOR.match(last, final.end):
        return final.value if _is_whole(last[final.end :], boxed=not anchored) else None
    if first is None or len(parts) > 1 or _OPERATOR.match(text, first.end):
        return None
    return first.value if re.fullmatch(r"[\d\s+×÷/().,-]+", last.rstrip(" .")) else None  # 72 = 48 + 24


def _first(text: str, anchored: bool) -> Numeral | None:
    """Return the number that a text begins with, after words that do not change it."""
    found = next(numerals(text), None)
    if found is None:
        return None
    before = text[: found.start]
    if found.value is None:
        return found if not anchored or not before.strip(" :=\"'([>|-") else None
    allowed = r"[A-Za-z :,.'\"|\[(=]*" if not anchored else None
    if allowed is None:
        lead = _LEAD.match(text)
        return found if lead is not None and lead.end() == found.start else None
    return found if re.fullmatch(allowed, before) and not re.search(r"(?i)\bnot\b|\b[b-z]\s*$", before) else None


def _is_whole(rest: str, *, boxed: bool) -> bool:
    """Whether what follows a number leaves it the answer: at most two words of a unit, and no second number joined to it."""
    rest = rest.rstrip(" .")
    place = 0
    for _ in range(4):
        if _JOINED.match(rest, place) or _OPERATOR.match(rest, place):
            return False
        unit = _UNIT.match(rest, place)
        if unit is None:
            break
        if unit[0].strip(" .").lower() in _RELATION:
            break
        place = unit.end()
        if re.match(r"\s*[-+]?[\d.]*\d", rest[place:]):
            return False  # 5 feet 3 inches
    if re.match(r"(?i)\s+and\s+(?:an?|one|two|three)\s", rest):
        return False  # 2 and a third
    return not boxed or not re.search(r"[×÷=<>|!]|\b(?:and|or)\b|,\s*[-+\d]", rest)


def _in_words(sentence: str) -> Found:
    """Read the last number of a sentence, unless it is denied or joined to the one before it."""
    found = list(numerals(sentence))
    if not found:
        return NOTHING
    last = found[-1]
    if last.value is None or _is_denied(sentence, last):
        return None
    if not _is_whole(sentence[last.end :], boxed=False) or _OPERATOR.match(sentence, last.end):
        return None
    if len(found) > 1 and _JOINED.fullmatch(sentence[found[-2].end : last.start + 1]):
        return None
    return last.value


def _last(text: str) -> Found:
    """Read the last number of a text that states no answer."""
    found = list(numerals(text))
    if not found:
        return NOTHING
    if len(found) > 1 and re.fullmatch(r"(?i)\s+(?:or|to|and)\s+", text[found[-2].end : found[-1].start]):
        return None
    return None if _is_denied(text, found[-1]) else found[-1].value


def _is_denied(text: str, number: Numeral) -> bool:
    return _DENIED.search(text[max(0, number.start - 16) : number.start]) is not None
