"""Arithmetic word problems with worked answers, written by a seeded generator.

A problem tells a short story with two numbers and asks for the result of one operation. The answer works it out as an
equation: `She has 7 + 5 = 12 apples. The answer is 12.` The two splits share neither a template nor an unordered pair of
numbers, so a model that solves held-out problems has learnt the task, not its training rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement
from random import Random
from typing import Final, Literal

Split = Literal["train", "heldout"]
Row = dict[str, str]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SPLITS: tuple[Split, ...] = ("train", "heldout")
SMALLEST = 2
LARGEST = {"+": 20, "-": 30, "x": 9}
HELDOUT_EVERY = 5  # one of five pairs of numbers belongs to the held-out split

SHE: Final = _words("Anna Maria Lily Emma Sofia Grace Nora Ruth Clara Alice Hannah Julia Rosa Ella Mia Zoe")
HE: Final = _words("Tom Ben Sam Max Leo Jack Peter Paul David Omar Ali Ravi Carlos Diego Ivan Felix")
THINGS: Final = _words("""
    apples pears plums oranges lemons eggs cookies books pens pencils stamps cards coins buttons beads hats cups plates
    bottles keys stones shells flowers roses marbles balls kites toys stickers balloons feathers badges
""")


@dataclass(frozen=True)
class Template:
    """One wording of a problem. Fields: {name} {other} {he} {He} {him} {things} {a} {b}; in `answer` also {equation}."""

    operation: Literal["+", "-", "x"]
    problem: str
    answer: str


def _templates(operation: Literal["+", "-", "x"], answer: str, *problems: str) -> tuple[Template, ...]:
    return tuple(Template(operation, problem, answer) for problem in problems)


TEMPLATES: dict[Split, tuple[Template, ...]] = {
    "train": (
        *_templates(
            "+",
            "{He} has {equation} {things}.",
            "{name} has {a} {things}. {He} buys {b} more. How many {things} does {he} have now?",
            "{name} had {a} {things} and found {b} more {things}. How many {things} does {he} have?",
            "{name} has {a} {things}. {other} gives {him} {b} {things}. How many {things} does {name} have now?",
            "{name} picked {a} {things} in the morning and {b} {things} in the evening. How many {things} does {he} have?",
            "First {name} won {a} {things}. Then {he} got {b} more. How many {things} does {he} have in total?",
            "{name} bought {a} {things}. Then {other} gave {him} {b} more. How many {things} does {he} have now?",
            "{name} found {a} {things} and {he} won {b} {things}. How many {things} does {he} have in total?",
            "{other} brings {b} {things} to {name}. Before that, {name} had {a}. How many {things} does {he} have now?",
            "{name}, who has {a} {things}, gets {b} more from {other}. How many {things} does {name} have in total?",
            "After lunch {name} picked {a} {things}, then {he} bought {b} from {other}. How many {things} does {he} have?",
            "After {name} won {a} {things}, {other} brought {him} {b} more. How many {things} does {name} have now?",
            "On Friday {name} had {a} {things}. {He} received {b} {things}. How many {things} does {name} have now?",
        ),
        *_templates(
            "+",
            "There are {equation} {things}.",
            "There are {a} {things} in a box and {b} {things} in a bag. How many {things} are there?",
            "{name} brings {a} {things} and {other} brings {b} {things}. How many {things} are there in total?",
            "A basket holds {a} {things}. {name} puts {b} more {things} into it. How many {things} are there now?",
            "{name} sees {a} {things} in a shop and {b} {things} in a park. How many {things} are there in total?",
        ),
        *_templates(
            "-",
            "{He} has {equation} {things}.",
            "{name} has {a} {things}. {He} gives {b} of them to {other}. How many {things} does {he} have now?",
            "{name} had {a} {things} and lost {b} of them. How many {things} does {he} have?",
            "{name} has {a} {things}. {other} takes {b} {things} from {him}. How many {things} does {name} have now?",
            "{name} bought {a} {things} and sold {b} {things}. How many {things} does {he} have left?",
            "First {name} had {a} {things}. Then {he} gave away {b}. How many {things} does {he} still have?",
            "{name} found {a} {things}. Then {other} took {b} of them. How many {things} does {he} have now?",
            "{name} won {a} {things} and {he} lost {b} {things}. How many {things} does {he} have left?",
            "{other} takes {b} {things} from {name}, who has {a}. How many {things} does {name} have now?",
            "After {name} got {a} {things}, {he} lost {b} of them. How many {things} does {he} still have?",
            "After lunch {name} had {a} {things}, then {other} bought {b} from {him}. How many {things} does {he} have?",
            "On Friday {name} had {a} {things}. {He} sold {b} {things}. How many {things} does {name} have now?",
        ),
        *_templates(
            "-",
            "There are {equation} {things}.",
            "There are {a} {things} in a box. {name} takes {b} of them. How many {things} are there now?",
            "{name} brought {a} {things}, but {b} {things} broke. How many {things} are left?",
            "A basket holds {a} {things}. {name} uses {b} {things}. How many {things} are there still?",
            "{name} sees {a} {things} in a shop and buys {b} of the {things}. How many {things} are left?",
        ),
        *_templates(
            "x",
            "There are {equation} {things}.",
            "{name} has {a} boxes with {b} {things} in each box. How many {things} are there?",
            "There are {a} bags. Each bag holds {b} {things}. How many {things} are there in total?",
            "{name} puts {b} {things} into each of {a} baskets. How many {things} are there?",
            "The {things} stand in {a} rows of {b}. How many {things} are there?",
            "In each of {a} boxes there are {b} {things}. How many {things} are there in total?",
            "{name} fills {a} baskets with {b} {things} each. How many {things} are there in total?",
            "Each of {a} jars holds {b} {things}. How many {things} are there?",
            "There are {b} {things} in each of {a} bags. How many {things} are there in total?",
            "{name} has {a} trays. On each tray {he} puts {b} {things}. How many {things} are there?",
        ),
    ),
    "heldout": (
        *_templates(
            "+",
            "{He} has {equation} {things}.",
            "{name} found {a} {things} on Monday. On Sunday {he} found {b} more. How many {things} does {he} have now?",
            "{other} gives {b} {things} to {name}, who has {a} {things}. How many {things} does {name} have in total?",
            "After {name} bought {a} {things}, {he} got {b} more from {other}. How many {things} does {he} have?",
        ),
        *_templates(
            "+",
            "There are {equation} {things}.",
            "{name} sees {a} {things} on a table and {b} more {things} on a chair. How many {things} are there in total?",
        ),
        *_templates(
            "-",
            "{He} has {equation} {things}.",
            "{name} found {a} {things}. On Sunday {he} lost {b} of the {things}. How many {things} does {he} have now?",
            "Of {a} {things}, {name} gives away {b} {things}. How many {things} does {he} have left?",
            "After {name} bought {a} {things}, {other} took {b} of them. How many {things} does {name} still have?",
        ),
        *_templates(
            "-",
            "There are {equation} {things}.",
            "There were {a} {things} on a table. {name} sold {b}. How many {things} are left?",
        ),
        *_templates(
            "x",
            "There are {equation} {things}.",
            "In each of {a} bags {name} has {b} {things}. How many {things} are there in total?",
            "{name} fills {a} trays. Each tray holds {b} {things}. How many {things} are there?",
        ),
    ),
}


def _pairs(operation: str, split: Split) -> list[tuple[int, int]]:
    """Return the (a, b) of one operation and split. An unordered pair of numbers belongs to the same split for all operations."""
    allowed = []
    for low, high in combinations_with_replacement(range(SMALLEST, max(LARGEST.values()) + 1), 2):
        heldout = (3 * low + high) % HELDOUT_EVERY == 0
        if high > LARGEST[operation] or heldout != (split == "heldout"):
            continue
        if operation == "-":
            if low < high:
                allowed.append((high, low))
        else:
            allowed.extend({(low, high), (high, low)})
    return sorted(allowed)


def _solve(operation: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "x": a * b}[operation]


def generate(split: Split, count: int, seed: int = 0) -> list[Row]:
    """Return `count` rows {"instruction", "output", "answer"}; the same arguments always give the same rows.

    Raises ValueError for an unknown split or a negative count.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: allowed are {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = Random(f"{split}-{seed}")
    pairs = {operation: _pairs(operation, split) for operation in LARGEST}
    return [_row(rng, rng.choice(TEMPLATES[split]), pairs) for _ in range(count)]


def _row(rng: Random, template: Template, pairs: dict[str, list[tuple[int, int]]]) -> Row:
    a, b = rng.choice(pairs[template.operation])
    result = _solve(template.operation, a, b)
    she = rng.random() < 0.5
    name, other = rng.sample(SHE if she else HE, 2)
    words = {
        "name": name,
        "other": other,
        "he": "she" if she else "he",
        "He": "She" if she else "He",
        "him": "her" if she else "him",
        "things": rng.choice(THINGS),
        "a": a,
        "b": b,
        "equation": f"{a} {template.operation} {b} = {result}",
    }
    worked = f"{template.answer.format(**words)} The answer is {result}."
    return {"instruction": template.problem.format(**words), "output": worked, "answer": str(result)}
