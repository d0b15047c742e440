"""Drills of attention and memory: lists said again, questions of who has what, numbers carried into an equation.

A small model takes long to find out that text refers back to itself. These documents hardly make sense unless one looks
back, which teaches it soon.
"""

from __future__ import annotations

from random import Random

import words as w
from cast import Goods, goods, listing, people
from facts import LARGEST, pair


def numbers(rng: Random, count: int) -> list[int]:
    return [rng.randint(0, rng.choice((9, 20, 20, LARGEST))) for _ in range(count)]


def echo(rng: Random) -> str:
    """One person says something, another says it again."""
    a, b = people(rng, 2)
    said = rng.choice(
        (
            listing([str(n) for n in numbers(rng, rng.randint(2, 6))]),
            listing([str(item) for item in goods(rng, rng.randint(1, 4))]),
            listing(rng.sample(w.COLOURS + w.LOOKS + w.MOODS, rng.randint(2, 5))),
            listing([p.name for p in people(rng, rng.randint(2, 5))]),
        )
    )
    forms = (
        f"{a.name} says: {said}. {b.name} says: {said}.", f'"{said}," said {a.name}. "{said}," said {b.name}.',
        f"On the list: {said}. On the copy: {said}.", f"Say it once: {said}. Say it twice: {said}. Say it again: {said}.",
        f"{a.name} wrote {said}. {b.name} read {said}.",
    )  # fmt: skip
    return rng.choice(forms)


def ledger(rng: Random) -> str:
    """Who has what; then the same is told again in another order."""
    group = people(rng, rng.randint(2, 4))
    thing = Goods(rng, plain=True)
    held = goods(rng, len(group))
    same = rng.random() < 0.5
    entries = [(p.name, thing.of(item.n) if same else str(item)) for p, item in zip(group, held, strict=True)]
    told = " ".join(f"{name} has {what}." for name, what in entries)
    rng.shuffle(entries)
    form = rng.choice(
        ("{name} has {what}.", "{name}: {what}.", "Who has {what}? {name} has {what}.", "{what}: {name}.")
    )
    return f"{told} {' '.join(form.format(name=name, what=what) for name, what in entries)}"


def shelves(rng: Random) -> str:
    """How many of each thing there are, thing by thing."""
    items = goods(rng, rng.randint(2, 4))
    place = rng.choice((f"In the {rng.choice(w.CONTAINERS)}", f"In the {rng.choice(w.ROOMS)}", "On the table"))
    told = f"{place} there are {listing([f'{i.n} {i.many}' for i in items])}."
    rng.shuffle(items)
    form = rng.choice(
        ("Count the {many}: {n} {many}.", "The {many}: {n}.", "Of the {many} there are {n}.", "{n} are {many}.")
    )
    return f"{told} {' '.join(form.format(n=i.n, many=i.many) for i in items)}"


def carry(rng: Random) -> str:
    """Two numbers are named and then stand in an equation, in the order in which it needs them."""
    a, b = pair(rng)
    thing = rng.choice(w.THINGS)[1]
    c = a + b
    sums = (
        f"The sum of {a} and {b} is {a} + {b} = {c}.", f"{a} {thing} and {b} {thing}: {a} + {b} = {c}.",
        f"Add {b} to {a}: {a} + {b} = {c}.", f"{a} plus {b}: {a} + {b} = {c}.", f"{b} more than {a}: {a} + {b} = {c}.",
    )  # fmt: skip
    differences = (
        f"Take {b} from {c}: {c} - {b} = {a}.", f"{c} {thing} without {b}: {c} - {b} = {a}.",
        f"{b} less than {c}: {c} - {b} = {a}.", f"{c} minus {b}: {c} - {b} = {a}.",
        f"The difference between {c} and {b} is {c} - {b} = {a}.",
    )  # fmt: skip
    d, e = rng.randint(1, 10), rng.randint(1, 9)
    products = (
        f"{d} times {e}: {d} x {e} = {d * e}.", f"{d} rows of {e} {thing}: {d} x {e} = {d * e}.",
        f"{d} groups of {e}: {d} x {e} = {d * e}.",
    )  # fmt: skip
    both = (f"Take the numbers {c} and {b}. Their sum is {c} + {b} = {c + b}. Their difference is {c} - {b} = {a}.",)
    return rng.choice(rng.choice((sums, differences, products, both if c + b <= LARGEST else sums)))


def drill(rng: Random) -> str:
    """A document of 2 to 4 drills."""
    return " ".join(
        kind(rng) for kind in rng.choices((echo, ledger, shelves, carry), (3, 3, 3, 5), k=rng.randint(2, 4))
    )
