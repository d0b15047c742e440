"""Number facts in many phrasings: sums, differences, products, comparisons, counting, doubles, names of numbers.

All numbers lie between 0 and 99, where the tokenizer has one token per number.
"""

from __future__ import annotations

from random import Random

from words import THINGS, spelled

LARGEST = 99


def pair(rng: Random) -> tuple[int, int]:
    """Two addends whose sum is at most 99; small ones are more frequent, as they are in life."""
    limit = rng.choice((10, 20, 20, 20, 20, 40, LARGEST))
    a = rng.randint(0, limit)
    b = rng.randint(0, min(limit, LARGEST - a))
    return a, b


def things(rng: Random, n: int, name: tuple[str, str]) -> str:
    """`7 apples`, `1 apple`; now and then the number in words."""
    number = spelled(n) if rng.random() < 0.08 else str(n)
    return f"{number} {name[0] if n == 1 else name[1]}"


def addition(rng: Random) -> str:
    a, b = pair(rng)
    c = a + b
    thing = rng.choice(THINGS)
    forms = (
        *[f"{a} + {b} = {c}."] * 6, f"{a} plus {b} is {c}.", f"{a} and {b} make {c}.",
        f"The sum of {a} and {b} is {c}.", f"{b} more than {a} is {c}.", f"Add {b} to {a} to get {c}.",
        f"{c} is {b} more than {a}.", f"{c} = {a} + {b}.", f"Count {b} up from {a} and you reach {c}.",
        f"{things(rng, a, thing)} and {things(rng, b, thing)} make {things(rng, c, thing)}.",
        f"{things(rng, a, thing)} and {things(rng, b, thing)} are {c} in total.",
        f"{a} and {b} are {c} altogether.",
        f"{things(rng, a, thing)} and {b} more are {things(rng, c, thing)}.", f"{a} + {b} = {b} + {a} = {c}.",
        f"{a} + {b} = {c}, so {c} - {b} = {a}.", f"{spelled(a).capitalize()} plus {spelled(b)} is {spelled(c)}.",
    )  # fmt: skip
    return rng.choice(forms)


def subtraction(rng: Random) -> str:
    c, b = pair(rng)
    a = b + c
    thing = rng.choice(THINGS)
    forms = (
        *[f"{a} - {b} = {c}."] * 6, f"{a} minus {b} is {c}.",
        f"{b} from {a} leaves {c}.",
        f"The difference between {a} and {b} is {c}.", f"{b} less than {a} is {c}.", f"Take {b} away from {a} to get {c}.",
        f"{c} is {b} less than {a}.", f"{c} = {a} - {b}.", f"Count {b} down from {a} and you reach {c}.",
        f"{things(rng, a, thing)} without {b} of them are {things(rng, c, thing)}.",
        f"Of {things(rng, a, thing)}, {b} are gone and {c} are left.",
        f"Of {a}, when {b} go, {c} remain.",
        f"From {a} to {c} there are {b} steps down.", f"{a} - {b} = {c}, so {c} + {b} = {a}.",
        f"{spelled(a).capitalize()} minus {spelled(b)} is {spelled(c)}.",
    )  # fmt: skip
    return rng.choice(forms)


def product(rng: Random) -> str:
    a = rng.randint(0, 12)
    b = rng.randint(0, min(20, LARGEST // max(a, 1)))
    if rng.random() < 0.5:
        a, b = b, a
    c = a * b
    thing = rng.choice(THINGS)
    forms = (
        *[f"{a} x {b} = {c}."] * 4, f"{a} times {b} is {c}.",
        f"The product of {a} and {b} is {c}.", f"{a} groups of {b} are {c}.", f"{c} = {a} x {b}.",
        f"{a} times {things(rng, b, thing)} are {c} in total.", f"{a} with {b} each are {c} altogether.",
        f"{a} rows of {things(rng, b, thing)} are {things(rng, c, thing)}.", f"{a} x {b} = {b} x {a} = {c}.",
    )  # fmt: skip
    return rng.choice(forms)


def comparison(rng: Random) -> str:
    a, b = rng.sample(range(LARGEST + 1), 2) if rng.random() < 0.5 else rng.sample(range(21), 2)
    low, high = sorted((a, b))
    forms = (
        f"{high} is more than {low}.", f"{low} is less than {high}.", f"{high} is greater than {low}.",
        f"Of {a} and {b}, {high} is the larger number.", f"Of {a} and {b}, {low} is the smaller number.",
        f"{low} comes before {high}.", f"{low} < {high}.", f"{high} > {low}.",
    )  # fmt: skip
    return rng.choice(forms)


def doubling(rng: Random) -> str:
    n = rng.randint(0, rng.choice((12, 49)))
    forms = (
        f"Double {n} is {2 * n}.", f"Half of {2 * n} is {n}.", f"Twice {n} is {2 * n}.", f"{n} + {n} = {2 * n}.",
        f"{2 * n} is double {n}.", f"{n} is half of {2 * n}.",
    )  # fmt: skip
    return rng.choice(forms)


def name_of_number(rng: Random) -> str:
    n = rng.randint(0, LARGEST)
    word = spelled(n)
    parity = "even" if n % 2 == 0 else "odd"
    forms = (
        f"{n} is written {word}.", f"{word.capitalize()} is written {n}.", f"The number {n} is {parity}.",
        f"{n} has {len(str(n))} digit{'s' if n > 9 else ''}.", f"{n} is {word}, and {word} is {n}.",
    )  # fmt: skip
    return rng.choice(forms)


def neighbours(rng: Random) -> str:
    n = rng.randint(1, LARGEST - 1)
    forms = (
        f"After {n} comes {n + 1}.", f"Before {n} comes {n - 1}.", f"{n} is between {n - 1} and {n + 1}.",
        f"One more than {n} is {n + 1}.", f"One less than {n} is {n - 1}.",
    )  # fmt: skip
    return rng.choice(forms)


def counting(rng: Random) -> str:
    step = rng.choice((1, 1, 1, 2, 3, 5, 10))
    length = rng.randint(4, 12)
    start = rng.randint(0, max(0, LARGEST - step * (length - 1))) if step < 9 else rng.randint(0, 9)
    numbers = [n for n in range(start, start + step * length, step) if n <= LARGEST]
    if rng.random() < 0.3:
        numbers.reverse()
    head = rng.choice(("Count", "Counting", "The numbers go", "We count")) + (f" by {step}s" if step > 1 else "")
    return f"{head}: {', '.join(map(str, numbers))}."


def table(rng: Random) -> str:
    """A run of equations with one operand fixed, like a page of a sum book."""
    b = rng.randint(0, 20)
    length = rng.randint(4, 9)
    kind = rng.choice("+-x")
    if kind == "x":
        b = rng.randint(0, 12)
        return " ".join(f"{a} x {b} = {a * b}." for a in range(rng.randint(0, 3), 9) if a * b <= LARGEST)
    start = rng.randint(0, LARGEST - 30)
    firsts = rng.sample(range(start, start + length + 1), length)
    if kind == "+":
        return " ".join(f"{a} + {b} = {a + b}." for a in firsts if a + b <= LARGEST)
    return " ".join(f"{a + b} - {b} = {a}." for a in firsts if a + b <= LARGEST)


_KINDS = (addition, subtraction, product, comparison, doubling, name_of_number, neighbours, counting, table)
_WEIGHTS = (30, 30, 14, 5, 5, 4, 4, 3, 3)


def page(rng: Random) -> str:
    """A document of 3 to 12 facts: all of one kind, or mixed."""
    count = rng.randint(3, 12)
    uniform = rng.random() < 0.4
    kinds = rng.choices(_KINDS[:5], _WEIGHTS[:5]) * count if uniform else rng.choices(_KINDS, _WEIGHTS, k=count)
    text = " ".join(kind(rng) for kind in kinds)
    if rng.random() < 0.05:
        text = text.replace(" + ", "+").replace(" - ", "-").replace(" = ", "=")
    return text
