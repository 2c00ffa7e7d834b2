"""Word problems with worked solutions: the data of the bundled model.

A problem is a story with a start and two or three steps. Each step uses the running total, so a
wrong token makes the answer wrong. `problem(seed, index)` is a pure function. A question's hash
decides whether it is held out, so the training stream and the held-out set share no question, for
any seeds.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

HELD_OUT_SHARE = 32
"""The held-out set has a share of 1 / HELD_OUT_SHARE of all questions."""

PEOPLE = {
    "she": ("Mia", "Anna", "Emma", "Lily", "Sara", "Nora", "Ruth", "Zoe", "Ivy", "Clara"),
    "he": ("Tom", "Ben", "Leo", "Max", "Sam", "Paul", "Omar", "Jack", "Hugo", "Eric"),
}
ITEMS = (
    "apples", "pears", "marbles", "stickers", "coins", "books", "shells", "stamps", "cards",
    "pencils", "cookies", "buttons", "beads", "stones", "flowers", "balloons", "candles", "tickets",
    "toys", "eggs",
)  # fmt: skip
BOXES = ("boxes", "bags", "jars", "baskets", "trays", "crates")
PLACES = (
    "at the market",
    "in the garden",
    "at school",
    "in the park",
    "at the fair",
    "on the beach",
)
GAINS = ("buys", "finds", "gets", "picks up", "collects")
LOSSES = ("gives away", "loses", "sells", "breaks", "throws away")


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution, which ends with the answer, and the answer."""

    question: str
    solution: str
    answer: int


@dataclass
class _Story:
    """A problem under construction.

    Attributes:
        total: the running total.
        told: the sentences of the question so far.
        worked: the sentences of the solution so far.
    """

    rng: random.Random
    name: str
    pronoun: str
    item: str
    total: int
    told: list[str]
    worked: list[str]

    def work(self, lead: str, left: int, sign: str, right: int) -> None:
        """Add a step to the solution, with its equation and the new total."""
        operations: dict[str, Callable[[int, int], int]] = {
            "+": lambda a, b: a + b,
            "-": lambda a, b: a - b,
            "*": lambda a, b: a * b,
            "/": lambda a, b: a // b,
        }
        verb = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}[sign]
        self.total = operations[sign](left, right)
        self.worked.append(
            f"{lead}, so we {verb}: {left} {sign} {right} = {self.total}. "
            f"This means that {self.name} now has {self.total} {self.item}."
        )


def _start_plain(story: _Story) -> None:
    story.total = story.rng.randint(5, 60)
    story.told.append(f"{story.name} has {story.total} {story.item}.")
    story.worked.append(f"At the start {story.name} has {story.total} {story.item}.")


def _start_boxes(story: _Story) -> None:
    boxes, each = story.rng.randint(2, 9), story.rng.randint(2, 9)
    box = story.rng.choice(BOXES)
    story.told.append(f"{story.name} has {boxes} {box} with {each} {story.item} in each of them.")
    story.work(
        f"At the start {story.name} has {boxes} {box} with {each} {story.item} in each of them",
        boxes,
        "*",
        each,
    )


def _gain(story: _Story) -> None:
    amount = story.rng.randint(2, 40)
    verb, place = story.rng.choice(GAINS), story.rng.choice(PLACES)
    sentence = f"Then {story.pronoun} {verb} {amount} more {story.item} {place}"
    story.told.append(f"{sentence}.")
    story.work(sentence, story.total, "+", amount)


def _lose(story: _Story) -> None:
    amount, verb = story.rng.randint(1, story.total - 2), story.rng.choice(LOSSES)
    sentence = f"After that {story.pronoun} {verb} {amount} of the {story.item}"
    story.told.append(f"{sentence}.")
    story.work(sentence, story.total, "-", amount)


def _double(story: _Story) -> None:
    factor, word = story.rng.choice(((2, "double"), (3, "triple")))
    sentence = f"The next day a kind friend helps to {word} the number of {story.item}"
    story.told.append(f"{sentence}.")
    story.work(sentence, story.total, "*", factor)


def _share(story: _Story) -> None:
    divisors = [d for d in range(2, 10) if story.total % d == 0 and story.total // d > 2]
    people = story.rng.choice(divisors)
    sentence = (
        f"Some time later {story.pronoun} shares all the {story.item} "
        f"equally in a group of {people} people"
    )
    story.told.append(f"{sentence}.")
    story.work(sentence, story.total, "/", people)


def _possible_steps(story: _Story) -> list[Callable[[_Story], None]]:
    """The steps that keep all numbers below 100; gains and losses are twice as likely."""
    steps: list[Callable[[_Story], None]] = []
    if story.total <= 59:
        steps += [_gain, _gain]
    if story.total >= 10:
        steps += [_lose, _lose]
    if story.total <= 33:
        steps.append(_double)
    if any(story.total % d == 0 and story.total // d > 2 for d in range(2, 10)):
        steps.append(_share)
    return steps


def problem(seed: int, index: int) -> Problem:
    """Problem `index` of the stream `seed`, whether it is held out or not."""
    rng = random.Random(f"{seed}/{index}")
    pronoun = rng.choice(("she", "he"))
    story = _Story(rng, rng.choice(PEOPLE[pronoun]), pronoun, rng.choice(ITEMS), 0, [], [])
    rng.choice((_start_plain, _start_boxes))(story)
    for _ in range(rng.randint(2, 3)):
        rng.choice(_possible_steps(story))(story)
    question = " ".join([*story.told, f"How many {story.item} does {story.name} have now?"])
    solution = " ".join([*story.worked, f"The answer is {story.total}."])
    return Problem(question, solution, story.total)


def is_held_out(question: str) -> bool:
    """Whether a question is in the held-out set, which depends on its text alone."""
    return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


def training_problems(seed: int) -> Iterator[Problem]:
    """The endless training stream of `seed`, without held-out questions."""
    return (p for p in (problem(seed, i) for i in count()) if not is_held_out(p.question))


def held_out_problems(size: int, seed: int = 1) -> list[Problem]:
    """The first `size` held-out problems of the stream `seed`."""
    stream = (p for p in (problem(seed, i) for i in count()) if is_held_out(p.question))
    return list(islice(stream, size))


def read_answer(text: str) -> int | None:
    """The number after "The answer is", or None if the text has none."""
    match = re.search(r"The answer is (\d+)\.", text)
    return int(match.group(1)) if match else None
