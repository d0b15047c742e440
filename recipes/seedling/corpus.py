"""The corpus of seedling: an endless, seeded stream of short English documents that a program writes.

Half of the documents are stories (`stories.py`), half are number facts (`facts.py`). With drills, two fifths are
exercises in looking back (`drills.py`) and the rest is halved. There are no word problems with worked answers in it: those
are what adapters are later trained on.

    python corpus.py --seed 0 --count 5        # look at five documents
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

import drills  # noqa: E402
import facts  # noqa: E402
import stories  # noqa: E402

STORY_SHARE = 0.5
DRILL_SHARE = 0.4


def documents(seed: int, count: int, with_drills: bool = False) -> Iterator[str]:
    """Yield `count` documents; the same arguments always give the same ones."""
    rng = Random(seed)
    for _ in range(count):
        if with_drills and rng.random() < DRILL_SHARE:
            yield drills.drill(rng)
        else:
            yield stories.story(rng) if rng.random() < STORY_SHARE else facts.page(rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--drills", action="store_true")
    arguments = parser.parse_args()
    for document in documents(arguments.seed, arguments.count, arguments.drills):
        print(document, end="\n\n")


if __name__ == "__main__":
    main()
