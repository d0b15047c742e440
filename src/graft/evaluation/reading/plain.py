"""Turn LaTeX, Markdown and Unicode into plain text in which numbers have one form.

Spacing, fonts and currency signs go; minus signs, fractions and powers become -, 1/2 and 10^3. What is no number but may stand
where one could (pi, roots, variables to a power, dates, times, pairs) becomes the sign `OPAQUE`, so that no part of it is read
as a number: 2\\pi is not 2.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

OPAQUE = "\u00a4"
BOX_OPEN, BOX_CLOSE = "\ue000", "\ue001"
"""Signs around the content of a box. They are in Unicode's private area, so no text has them."""

_DEPTH = 12
"""Most levels of braces that are resolved."""
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SIGNS = {ord(sign): "-" for sign in "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"} | {
    **{ord(sign): "/" for sign in "\u2044\u2215"},
    **{ord(sign): " × " for sign in "×·⋅∙"},
    **{ord(sign): " = " for sign in "≈≃≅⇒→⟹⟶"},
    **{ord(sign): OPAQUE for sign in "π∞√±∑∫"},
    **{ord(sign): None for sign in "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"},
    ord("\u2019"): "'", ord("\u066b"): ".", ord("\u066c"): ",", ord("°"): " ",
}  # fmt: skip

_FONTS = (
    r"text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|bb|cal|normal)|boldsymbol|bm|mbox|hbox|operatorname\*?|emph|underline|"
    r"fbox|textcolor\s*\{[^{}]*\}|color\s*\{[^{}]*\}"
)
_SWITCHES = (
    r"bf|rm|it|displaystyle|textstyle|left|right|[bB]ig{1,2}[lr]?|limits|normalsize|[lL]arge|LARGE|huge|Huge|boxed|blacksquare|"
    r"square|Box|checkmark|qed|hfill|newline|par|noindent|quad|qquad|thinspace|enspace|circ|degree|therefore|because"
)
_EQUALS = r"approx|simeq|sim|cong|equiv|implies|(?:Long)?[rR]ightarrow|to|iff"
_WRITTEN_NUMBER = r"[-+]?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_ARGUMENT = r"\s*(\{[^{}]*\}|\d)"
_CURRENCY = "[$" + "".join(chr(code) for code in range(0x20A0, 0x20C1)) + "£¥¢]"
_UNIT_LETTERS = "msghlLKCFAVWNJ"

_Step = tuple[str, str | Callable[[re.Match[str]], str]]


def _fraction(match: re.Match[str]) -> str:
    """Write a fraction of two numbers as 1/2, after a space if a number precedes it (a mixed number); others are opaque."""
    top, bottom = (part.strip("{} ").replace(" ", "").replace(",", "") for part in match.groups())
    before = match.string[max(0, match.start() - 9) : match.start()]
    written = all(re.fullmatch(_WRITTEN_NUMBER, part) for part in (top, bottom))
    if not written or re.search(r"[A-Za-z)\]]$", before):
        return OPAQUE
    if bottom.startswith("-"):
        top, bottom = (top[1:] if top.startswith("-") else f"-{top}"), bottom[1:]
    return f"{' ' if re.search(r'[0-9] *$', before) else ''}{top}/{bottom}"


def _power(match: re.Match[str]) -> str:
    inner = match[1].replace(" ", "")
    return f"^{inner}" if re.fullmatch(r"[-+]?\d+", inner) else f"^{OPAQUE}"


def _letter_power(match: re.Match[str]) -> str:
    """Leave the unit of m^2; a variable to a power is opaque."""
    name = match[1]
    return name if len(name) > 1 or name in _UNIT_LETTERS else OPAQUE


def _tuple(match: re.Match[str]) -> str:
    return match[0] if re.fullmatch(r"[(\[]\s*-?\d{1,3}(?:,\d{3})+(?:\.\d+)?\s*[)\]]", match[0]) else OPAQUE


_SPACING: tuple[_Step, ...] = (
    (r"<<[^<>\n]*>>", ""),  # GSM8K's notes for a calculator: 9 * 2 = <<9*2=18>>18
    (r"\\\\", "\n"),
    (r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[^{}]*\})?", "\n"),
    (r"(?<=\d)(?:\{,\}|,\\[!,])(?:\\!)*(?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\{[,.]\}(?=\d)", "."),
    (r"\{([:;])\}", r"\1"),
    (r"\{\s*(?:\\[,;: ])?\s*\}(?=\d)|\\[,;: ]|~", " "),
    (r"\\!", ""),
    (r"\\([%#&_])", r"\1"),
    (r"\\(?:\$|pounds(?![a-z])|euro(?![a-z])|texteuro(?![a-z])|textdollar(?![a-z]))", "$"),
    (r"\\[()\[\]]", " "),
    (r"\\[{}]", " | "),
    (r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?", " "),
    (r"\^\s*\{?\s*(?:\\text\w*\s*\{)?\s*(?:st|nd|rd|th)(?![A-Za-z])\s*\}{0,2}", " "),
    (r"\\textsuperscript(?=\s*\{)", "^"),
    (rf"\\(?:{_EQUALS})(?![A-Za-z])", " = "),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])", " × "),
    (r"\\div(?![A-Za-z])", " ÷ "),
    (r"\\(?:[lc]?dots)(?![A-Za-z])", "..."),
    (rf"\\(?:{_SWITCHES})(?![A-Za-z])", " "),
    (r"(?<=[A-Za-z])_(?:\{[^{}]*\}|\w+)", ""),
)
_BRACES: tuple[_Step, ...] = (
    (rf"\\(?:{_FONTS})\s*\{{([^{{}}]*)\}}", r" \1 "),
    (r"\\(?:phantom|hspace|vspace|label|tag)\*?\s*\{[^{}]*\}", " "),
    (rf"\\(?:[dtcsx]?frac|nicefrac){_ARGUMENT}{_ARGUMENT}", _fraction),
    (r"\{([^{}]*?)\\over(?![A-Za-z])([^{}]*?)\}", _fraction),
    (rf"\\(?:sqrt\s*(?:\[[^\]]*\])?|overline|bar|dot|binom{_ARGUMENT}){_ARGUMENT}", OPAQUE),
    (r"\s*\^\s*\{([^{}]*)\}", _power),
)
_SIMPLE: tuple[_Step, ...] = (
    (r"\\[A-Za-z]+", OPAQUE),
    (r"[{}&\\]", " "),
    (r"(?<=\d)\*\*(?=-?\d)", "^"),
    (r"\*\*|__|`|</?(?:b|i|strong|em|sub)>", ""),
    (r"</?sup>", "^"),
    (r"(?<=\d)[ \t]*\*[ \t]*(?=[\d.(])", " × "),
    (r"\*", ""),
    (r"[ \t]*\^[ \t]*(?:\([ \t]*([-+]?\w+)[ \t]*\)|([-+]?\w+))", r"^\1\2"),
    (r"(?<=\d)[ \t]*[xX][ \t]*(?=10\^)", " × "),
    (rf"\b([A-Za-z]+)\^[-+]?[\w{OPAQUE}]+", _letter_power),
    (r"\b(?:US|AU|CA|NZ|HK|[ACS])(?=\$)", ""),
    (r"\b(?:Rs\.?|USD|EUR|GBP|INR)(?=[ \t]*[-\d])", " "),
    # A sign before or after a currency sign is that of the number; between two prices it is a dash.
    (rf"(?<![\w)\]%.])(?<![\w)\]%.] )-[ \t]*{_CURRENCY}[ \t]*(?=[\d.])|{_CURRENCY}[ \t]*-[ \t]*(?=[\d.])", " -"),
    (rf"(?<=-){_CURRENCY}", ""),
    (_CURRENCY, " "),
    (r"(?i)\bnegative[ \t]+(?=[\d.])|(?<![\d)] )(?<![\d)])\bminus[ \t]+(?=[\d.])", "-"),
    (r"(?<![\w)\]])-\(([\d.,]+)\)", r"-\1"),
    (r"(?<=[=(:])[ \t]*-[ \t]+(?=[\d.])|(?<=\bis)[ \t]+-[ \t]+(?=[\d.])", " -"),
    (r"(?<![\d.])(?!\d{1,3}(?:\.\d{3})+(?![\d.]))\d+(?:\.\d+){2,}", OPAQUE),
    (r"(?<![\w.])\d{1,4}([-/])\d{1,2}\1\d{1,4}(?![\w.]\d)", OPAQUE),
    (r"\d+(?::\d+)+|\d+(?: : \d+)+", OPAQUE),
    (r"[(\[][ \t]*-?[\d./]+[ \t]*(?:,[ \t]*-?[\d./]+[ \t]*)+[)\]]", _tuple),
)


def plain(text: str) -> str:
    """Return the text without LaTeX, Markdown and unusual characters. Boxes marked by `BOX_OPEN` and `BOX_CLOSE` stay."""
    text = re.sub(r"\d{121,}", OPAQUE, text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
    text = re.sub(r"[¼½¾⅐-⅞]", lambda found: " " + unicodedata.normalize("NFKD", found[0]), text)
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS)
    text = re.sub(r"[^\x00-\x7f]", lambda found: str(unicodedata.decimal(found[0], found[0])), text)
    text = _apply(_SPACING, text)
    for _ in range(_DEPTH):
        before, text = text, _apply(_BRACES, text)
        # Braces that are the argument of nothing only group.
        text = re.sub(r"(?<![A-Za-z\]}_^])\{([^{}]*)\}", r"\1", text) if text == before else text
        if text == before:
            break
    return _apply(_SIMPLE, text)


def _apply(steps: tuple[_Step, ...], text: str) -> str:
    for pattern, new in steps:
        text = re.sub(pattern, new, text)
    return text
