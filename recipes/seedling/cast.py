"""Who and what a story is about: people with their pronouns, counted things, and how they are written in a sentence."""

from __future__ import annotations

from random import Random

import words as w


class Person:
    """A name with the pronouns that go with it."""

    def __init__(self, rng: Random) -> None:
        female = rng.random() < 0.5
        self.name = rng.choice(w.SHE if female else w.HE)
        self.he, self.his, self.him = ("she", "her", "her") if female else ("he", "his", "him")
        self.He = self.he.capitalize()


def people(rng: Random, count: int) -> list[Person]:
    """People with different names."""
    found: dict[str, Person] = {}
    while len(found) < count:
        person = Person(rng)
        found.setdefault(person.name, person)
    return list(found.values())


def number(rng: Random) -> int:
    return rng.randint(2, rng.choice((9, 20, 20, 50, 99)))


class Goods:
    """A counted thing, such as 7 red pens. `of(n)` writes it with another count."""

    def __init__(self, rng: Random, plain: bool = False) -> None:
        self.one, self.many = rng.choice(w.THINGS)
        self.n = number(rng)
        self.look = "" if plain or rng.random() < 0.6 else rng.choice(w.COLOURS + w.LOOKS) + " "

    def of(self, n: int | str) -> str:
        return f"{n} {self.look}{self.one if n in (1, 'one') else self.many}"

    def __str__(self) -> str:
        return self.of(self.n)


def goods(rng: Random, count: int) -> list[Goods]:
    found: dict[str, Goods] = {}
    while len(found) < count:
        item = Goods(rng)
        found.setdefault(item.many, item)
    return list(found.values())


def listing(parts: list[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
