"""Short stories of everyday people, objects, places and quantities.

A story states quantities and repeats them later (who holds what, which box holds how many), so that a model learns to
keep track of them. It never asks for a result and never works one out.
"""

from __future__ import annotations

from random import Random

import words as w
from cast import Goods, Person, article, goods, listing, number, people


def opening(rng: Random) -> str:
    weather = rng.choice(w.WEATHER)
    return rng.choice(
        (
            f"{rng.choice(w.MOMENTS)} {weather}.", f"It was {rng.choice(w.DAYS)} and {weather}.",
            f"It was a day in {rng.choice(w.MONTHS)}.", f"It was {rng.choice(w.SEASONS)}, and {weather}.",
        )
    )  # fmt: skip


def inventory(rng: Random) -> str:
    """What lies in a container, then the same told again in another order."""
    items = goods(rng, rng.randint(2, 4))
    box, room = rng.choice(w.CONTAINERS), rng.choice(w.ROOMS)
    text = [f"There is {article(box)} in the {room}.", f"It holds {listing([str(i) for i in items])}."]
    rng.shuffle(items)
    for item in items[: rng.randint(1, len(items))]:
        look = rng.choice(w.COLOURS)
        text.append(
            rng.choice(
                (f"The {item} are {look}.", f"The {item} lie on the left.", f"All {item} are {rng.choice(w.LOOKS)}.",
                 f"Someone took the {item} out of the {box}.", f"The number of {item.many} is {item.n}.")
            )
        )  # fmt: skip
    return " ".join(text)


def shopping(rng: Random) -> str:
    (p,) = people(rng, 1)
    items = goods(rng, rng.randint(1, 3))
    shop = rng.choice(("market", "shop", "bakery", "store", "town", "station", "village", "museum"))
    text = [f"{p.name} went to the {shop} and {rng.choice(w.GAIN)} {listing([str(i) for i in items])}."]
    item = rng.choice(items)
    price = number(rng)
    text.append(
        rng.choice(
            (f"The {item.many} cost {price} dollars.", f"{p.He} paid {price} dollars for the {item}.",
             f"One {item.look}{item.one} costs {price} cents.", f"{p.He} carried the {item} home.",
             f"{p.He} put the {item} in {p.his} {rng.choice(w.CONTAINERS)}.")
        )
    )  # fmt: skip
    other = rng.choice(items)
    text.append(
        rng.choice(
            (f"At home {p.he} showed the {other} to {p.his} {rng.choice(w.FAMILY)}.",
             f"{p.He} was {rng.choice(w.MOODS)}.",
             f"{p.He} had always wanted {other}.", f"Now {p.he} has {other}.",
             f"The {other} are for {p.his} {rng.choice(w.FAMILY)}.")
        )
    )  # fmt: skip
    return " ".join(text)


def giving(rng: Random) -> str:
    """Things pass from one person to another; the story says who holds what at the end."""
    a, b = people(rng, 2)
    kept, given = goods(rng, 2)
    first = rng.choice(
        (f"{a.name} has {kept} and {given}.", f"{a.name} had {given} and {kept}.",
         f"{a.name} {rng.choice(w.GAIN)} {kept} and {given}.")
    )  # fmt: skip
    middle = rng.choice(
        (f"{a.He} gave the {given} to {b.name}.", f"{a.He} gives {b.name} the {given}.", f"{b.name} took the {given}.",
         f"{b.name} {rng.choice(w.GAIN)} the {given} from {a.him}.",
         f"{a.He} {rng.choice(w.LOSE)} the {given} and kept the {kept}.")
    )  # fmt: skip
    receives = b.name in middle
    last = rng.choice(
        (f"{a.name} still has {kept}.", f"{a.name} kept the {kept}.", f"So the {kept} are with {a.name}.")
        + ((f"Now {b.name} has {given}.", f"{b.name} has {given} and {a.name} has {kept}.") if receives else ())
    )
    return f"{first} {middle} {last}"


def owners(rng: Random) -> str:
    """Several people have different counts of one thing; who has more."""
    group = people(rng, rng.randint(2, 3))
    item = Goods(rng)
    counts = rng.sample(range(1, rng.choice((12, 25, 60))), len(group))
    text = [f"{p.name} has {item.of(n)}." for p, n in zip(group, counts, strict=True)]
    ranked = sorted(zip(counts, group, strict=True), key=lambda entry: entry[0])
    (low, poor), (high, rich) = ranked[0], ranked[-1]
    text.append(
        rng.choice(
            (f"{rich.name} has more {item.many} than {poor.name}.", f"{poor.name} has fewer {item.many} than {rich.name}.",
             f"{rich.name} has the most {item.many}, {high}.", f"{poor.name} has only {low}.",
             f"{high} is more than {low}, so {rich.name} has more.")
        )
    )  # fmt: skip
    return " ".join(text)


def day(rng: Random) -> str:
    (p,) = people(rng, 1)
    done = rng.sample(w.ACTIVITIES, 3)
    place = rng.choice(w.PLACES)
    text = [
        opening(rng),
        f"{p.name} was {rng.choice(w.MOODS)}.",
        f"First {p.he} {done[0]}. Then {p.he} {done[1]}.",
        f"{p.He} went to the {place} with {p.his} {rng.choice(w.FAMILY)}.",
        f"There {p.he} {rng.choice(w.DO)} {article(rng.choice(w.LOOKS))} {rng.choice(w.THINGS)[0]} "
        f"and saw {number(rng)} {rng.choice(w.ANIMALS)[1]}.",
        f"In the end {p.he} {done[2]} and was {rng.choice(w.MOODS)}.",
    ]
    keep = sorted(rng.sample(range(len(text)), rng.randint(3, len(text))))
    if 0 in keep and 1 not in keep:
        keep.insert(1, 1)
    elif 1 not in keep:
        keep.insert(0, 1)
    return " ".join(text[i] for i in keep)


def work(rng: Random) -> str:
    (p,) = people(rng, 1)
    job, does, place = rng.choice(w.JOBS)
    hour = rng.randint(5, 11)
    text = [
        f"{p.name} is {article(job)}.",
        f"{p.He} {does} every {rng.choice(w.DAYS)}.",
        f"{p.He} starts at {hour} in the morning and works for {rng.randint(2, 9)} hours.",
        f"The {place} is {number(rng)} minutes away from {p.his} house.",
        f"{p.He} has worked in the {place} for {number(rng)} years.",
        f"{p.He} likes {p.his} work.",
    ]
    return " ".join([text[0], *rng.sample(text[1:], rng.randint(1, 4))])


def animals(rng: Random) -> str:
    (p,) = people(rng, 1)
    (one, many), (_, others) = rng.sample(w.ANIMALS, 2)
    n, m = number(rng), number(rng)
    pet = Person(rng).name
    forms = (
        f"{p.name} has a {rng.choice(w.LOOKS)} {one}. Its name is {pet}. "
        f"{pet} is {rng.randint(1, 15)} years old and likes to sleep in {article(rng.choice(w.CONTAINERS))}.",
        f"{n} {many} and {m} {others} live on the farm. "
        f"The {n} {many} are {rng.choice(w.COLOURS)} and the {m} {others} are {rng.choice(w.COLOURS)}.",
        f"{p.name} saw {n} {many} near the {rng.choice(w.PLACES)}. "
        f"The {many} were {rng.choice(w.MOODS)}. {p.He} counted them: there were {n}.",
        f"Every day {p.name} feeds {n} {many}. {p.He} gives them {m} {rng.choice(w.THINGS)[1]}. "
        f"After that the {n} {many} are {rng.choice(w.MOODS)}.",
    )  # fmt: skip
    return rng.choice(forms)


def talk(rng: Random) -> str:
    """Two people ask each other about colours, places, moods and counts that the story has told."""
    a, b = people(rng, 2)
    item = Goods(rng, plain=True)
    colour, place, box = rng.choice(w.COLOURS), rng.choice(w.PLACES), rng.choice(w.CONTAINERS)
    told = rng.choice(
        (f"{a.name} and {b.name} met at the {place}.", f"{a.name} walked to the {place} and found {b.name}.",
         opening(rng))
    )  # fmt: skip
    exchanges = (
        f'"What colour is your {item.one}?" asked {a.name}. "It is {colour}," said {b.name}.',
        f'"Where are you going?" asked {a.name}. "To the {place}," said {b.name}.',
        f'"How are you?" asked {a.name}. "I am {rng.choice(w.MOODS)}," said {b.name}.',
        f'"I have {item}," said {b.name}. "{item.n} {item.many}!" said {a.name}.',
        f'"What is in the {box}?" asked {a.name}. "There are {item} in the {box}," said {b.name}.',
        f'"How many {item.many} do you have?" asked {a.name}. "I have {item}," said {b.name}.',
        f'"May I have the {item}?" asked {a.name}. "Yes, take the {item}," said {b.name}.',
        f'"Does {Person(rng).name} have a {rng.choice(w.ANIMALS)[0]}?" asked {a.name}. '
        f'"I do not know," said {b.name}.',
        f'"Is the {rng.choice(w.CONTAINERS)} empty?" asked {a.name}. "No, {item} remain in it," said {b.name}.',
        f'"Who has the {item.many}?" asked {a.name}. "{Person(rng).name} has the {item.many}," said {b.name}.',
    )  # fmt: skip
    return " ".join([told, *rng.sample(exchanges, rng.randint(1, 3))])


def clock(rng: Random) -> str:
    (p,) = people(rng, 1)
    hours = sorted(rng.sample(range(1, 13), 3))
    done = rng.sample(w.ACTIVITIES, 3)
    age = rng.randint(4, 90)
    forms = (
        " ".join(f"At {h} o'clock {p.he if h > hours[0] else p.name} {d}." for h, d in zip(hours, done, strict=True)),
        f"{p.name} is {age} years old. {p.He} was born in {rng.choice(w.MONTHS)}. "
        f"{p.He} lives near the {rng.choice(w.PLACES)}.",
        f"The train leaves on {rng.choice(w.DAYS)} at {hours[0]} and arrives at {hours[2]}. "
        f"{p.name} waits at the station until {hours[0]}.",
        "A week has 7 days. A day has 24 hours. An hour has 60 minutes. A year has 12 months.",
        f"{p.name} reads {number(rng)} pages on {rng.choice(w.DAYS)}. {p.He} {rng.choice(w.ACTIVITIES)} on {rng.choice(w.DAYS)}.",
    )  # fmt: skip
    return rng.choice(forms)


def grouping(rng: Random) -> str:
    """Groups: how things are laid out in boxes, rows and bags."""
    (p,) = people(rng, 1)
    item = Goods(rng)
    boxes, each = rng.randint(2, 12), rng.randint(2, 12)
    box = rng.choice(("box/boxes", "bag/bags", "row/rows", "shelf/shelves", "basket/baskets", "tray/trays", "jar/jars"))
    one, many = box.split("/")
    forms = (
        f"{p.name} has {boxes} {many}. In each {one} there are {item.of(each)}. "
        f"{p.He} carries the {boxes} {many} to the {rng.choice(w.PLACES)}.",
        f"The {item.many} stand in {boxes} {many} of {each}. {p.name} likes the {boxes} {many}.",
        f"{p.name} put {item.of(each)} into every {one}. {p.He} filled {boxes} {many}, and each {one} got {each}.",
        f"{p.name} filled {article(one)} with {item} and another with {number(rng)}. The first {one} holds {item}.",
    )  # fmt: skip
    return rng.choice(forms)


def change(rng: Random) -> str:
    """Something comes or goes; the story says whether there is more or less than before, never how much."""
    a, b = people(rng, 2)
    item = Goods(rng)
    m = number(rng)
    comes = (
        f"{a.He} {rng.choice(w.GAIN)} {m} more.", f"{b.name} gave {a.him} {m} more {item.many}.",
        f"{a.He} got {m} {item.many} from {b.name}.", f"Then {m} more came.", f"{b.name} brought {m} {item.many}.",
        f"Another {m} {item.many} were added to the {rng.choice(w.CONTAINERS)}.", f"The next day {a.he} {rng.choice(w.GAIN)} {m}.",
    )  # fmt: skip
    goes = (
        f"{a.He} {rng.choice(w.LOSE)} {m} of them.", f"{a.He} gave {m} of the {item.many} to {b.name}.", f"{a.He} gave away {m}.",
        f"{b.name} took {m} of them.", f"Then {m} {item.many} broke.", f"{m} of the {item.many} were taken away.",
        f"The next day {a.he} {rng.choice(w.LOSE)} {m}.", f"{a.He} threw away {m} {item.many}.",
    )  # fmt: skip
    up = rng.random() < 0.5
    verb = rng.choice(("has", "had", rng.choice(w.GAIN)))
    start = rng.choice((f"{a.name} {verb} {item}.", f"There are {item} in {a.name}'s {rng.choice(w.CONTAINERS)}."))
    more = rng.choice(("more", "more and more") if up else ("fewer",))
    end = rng.choice(
        (f"Now {a.he} has {more} {item.many} than before.", f"Now there are {more} {item.many}.",
         f"So the number of {item.many} {'grew' if up else 'became smaller'}.",
         f"That is {'more' if up else 'less'} than {item.n}.",
         f"{'All of them together' if up else 'Those that are left'} are in the {rng.choice(w.ROOMS)}.")
    )  # fmt: skip
    return f"{start} {rng.choice(comes if up else goes)} {end}"


KINDS = (inventory, shopping, giving, owners, day, work, animals, talk, clock, grouping, change)
WEIGHTS = (12, 12, 14, 9, 10, 6, 8, 12, 7, 10, 16)


def story(rng: Random) -> str:
    """A document of one or two stories."""
    return " ".join(kind(rng) for kind in rng.choices(KINDS, WEIGHTS, k=rng.choice((1, 1, 2))))
