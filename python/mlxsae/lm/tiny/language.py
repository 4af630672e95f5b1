"""Generator of the tiny language: documents of short episodes over the closed world, and prompts with one right answer.

A document is two to five episodes of one genre (stories or lessons). The stories of a document share two people.
An episode of training text never uses a combination that `world.held_out` names; held-out text uses only those.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from . import world as w

Split = Literal["train", "held_out"]
CONTEXT = 64
"""Tokens of a row: one document with its begin and end marks always fits."""

T = TypeVar("T")


class Prompt(NamedTuple):
    """A text, the word that must follow, and a word of the same kind that a shallow model would say instead."""

    text: str
    answer: str
    wrong: str


class Slot(NamedTuple):
    """A place in an episode where the next word is settled by what stands before it."""

    task: str
    position: int
    wrong: str


@dataclass
class Episode:
    """Words of a few sentences, and the slots in them."""

    words: list[str] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def say(self, text: str) -> Episode:
        self.words += text.split()
        return self

    def answer(self, task: str, word: str, wrong: str) -> Episode:
        self.slots.append(Slot(task, len(self.words), wrong))
        self.words.append(word)
        return self


class _Exhausted(Exception):
    """No combination of the split is left in this document."""


class _Writer:
    """Writes the episodes of one document."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.held = split == "held_out"
        self.people = rng.sample(w.PEOPLE, 2)
        self.objects = rng.sample(list(w.OBJECTS), len(w.OBJECTS))  # none plays two parts in a document

    def draw(self, choose: Callable[[], T], held: Callable[[T], bool]) -> T:
        """Choose until the choice belongs to the split."""
        for _ in range(1000):
            if held(choice := choose()) == self.held:
                return choice
        raise _Exhausted

    def things(self, kind: str, values: Sequence[str]) -> list[tuple[str, str]]:
        """Two (thing, value) pairs, the things used by no other episode of the document."""
        pairs = self.draw(
            lambda: list(zip(self.rng.sample(self.objects, 2), self.rng.sample(values, 2), strict=True)),
            held=lambda pairs: w.held_out(kind, *pairs[0], *pairs[1]),
        )
        self.objects = [thing for thing in self.objects if thing not in dict(pairs)]
        return pairs

    def phrased(self, facts: dict[str, Iterable[str]]) -> tuple[str, str]:
        """A phrasing and a fact: `facts` gives for each group of phrasings the facts that it can tell."""

        def choose() -> tuple[str, str, str]:
            phrasings = self.rng.choice([group for group in facts for _ in group])
            return phrasings, self.rng.choice(phrasings), self.rng.choice(list(facts[phrasings]))

        _, phrasing, fact = self.draw(choose, held=lambda c: w.held_phrasing(c[2], c[0]) == c[1])
        return phrasing, fact

    def other(self, words: Iterable[str], *taken: str) -> str:
        return self.rng.choice([word for word in words if word not in taken])

    def pronoun(self, name: str) -> str:
        return "She" if name in w.WOMEN else "He"

    # ---- stories

    def giving(self) -> Episode:
        """Two people go somewhere and one gives the other something: the indirect object is the other one."""
        rng, e = self.rng, Episode()
        a, b = rng.sample(self.people, 2)
        giver, taker = rng.sample(self.people, 2)
        place = self.draw(lambda: rng.choice(w.PLACES), held=lambda place: w.held_out(*sorted((a, b)), place))
        gift = self.objects.pop()
        if rng.random() < 0.3:
            gift = f"{rng.choice(w.COLOURS)} {gift}"
        openings = (
            f"When {a} and {b} went to the {place} ,",
            f"After {a} and {b} walked to the {place} ,",
            f"While {a} and {b} were in the {place} ,",
            f"{a} and {b} met in the {place} .",
        )
        e.say(f"{rng.choice(openings)} {giver} {rng.choice(w.GIVING_VERBS)} the {gift} to")
        e.answer("indirect_object", taker, giver).say(".")
        match rng.randrange(5):
            case 0 | 1:
                e.say("Then").answer("thanks", taker, giver).say("thanked").answer(
                    "thanks", giver, taker
                ).say(".")
            case 2 | 3:
                e.say("Now").answer("possession", taker, giver).say(f"has the {gift} .")
        return e

    def belongings(self) -> Episode:
        """Two people (or one) have coloured things; the colour or the owner of each is recalled."""
        rng, e = self.rng, Episode()
        people = rng.sample(self.people, 2)
        things, colours = zip(*self.things("colour", w.COLOURS), strict=True)
        n = self.two_or_one()
        clauses = [f"{people[i]} has a {colours[i]} {things[i]}" for i in range(n)]
        e.say(" and ".join(clauses) + " .")
        for i in rng.sample(range(n), n):
            if rng.random() < 0.6:
                e.say(f"The {things[i]} is").answer("colour_recall", colours[i], colours[1 - i]).say(".")
            else:
                e.say(f"The {colours[i]} {things[i]} belongs to")
                e.answer("possession", people[i], people[1 - i]).say(".")
        return e

    def hiding(self) -> Episode:
        """Two things (or one) lie in two containers; somebody finds them where they were put."""
        rng, e = self.rng, Episode()
        things, boxes = zip(*self.things("hiding", w.CONTAINERS), strict=True)
        n = self.two_or_one()
        for i in range(n):
            e.say(f"The {things[i]} is in the {boxes[i]} .")
        for i in rng.sample(range(n), rng.randint(1, n)):
            e.say(f"{rng.choice(self.people)} found the {things[i]} in the")
            e.answer("location_recall", boxes[i], boxes[1 - i]).say(".")
        return e

    def two_or_one(self) -> int:
        """Mostly two; now and then one, an easy case from which recall is learnt sooner. Prompts are never easy."""
        return 2 if self.held or self.rng.random() < 0.7 else 1

    def outing(self) -> Episode:
        """One person goes somewhere, sees an animal, and is inside or outside as the place says."""
        rng, e = self.rng, Episode()
        name = rng.choice(self.people)
        place = self.draw(lambda: rng.choice(w.PLACES), held=lambda place: w.held_out(name, place))
        pronoun, wrong = self.pronoun(name), "He" if name in w.WOMEN else "She"
        e.say(f"{name} went to the {place} .").answer("pronoun", pronoun, wrong)
        if rng.random() < 0.6:
            e.say(f"saw a {rng.choice(w.ADJECTIVES)} {rng.choice(list(w.ANIMALS))} .").answer(
                "pronoun", pronoun, wrong
            )
        answers = ("inside", "outside") if place in w.INDOORS else ("outside", "inside")
        return e.say(rng.choice(w.STAYING_VERBS)).answer("whereabouts", *answers).say(".")

    def day(self) -> Episode:
        """The weather of a day or a part of it."""
        rng = self.rng
        when = rng.choice((f"On {rng.choice(w.DAYS)}", f"In the {rng.choice(w.DAY_PARTS)}"))
        return Episode().say(f"{when} it was {rng.choice(w.WEATHER)} .")

    def doing(self) -> Episode:
        """One of the two people eats, travels, practises or feels something."""
        rng = self.rng
        name = rng.choice(self.people)
        predicates = (
            f"{rng.choice(w.COOKING_VERBS)} {rng.choice(w.FOODS)} for {rng.choice(w.MEALS)}",
            f"travelled to the {rng.choice(w.PLACES)} by {rng.choice(w.VEHICLES)}",
            f"practised the {rng.choice(w.INSTRUMENTS)} {rng.choice(w.MANNERS)}",
            f"felt {rng.choice(w.FEELINGS)}",
        )
        return Episode().say(f"{name} {rng.choice(predicates)} .")

    # ---- lessons

    def agreement(self) -> Episode:
        """A verb agrees with a subject that other nouns stand between."""
        rng, e = self.rng, Episode()
        between = rng.choice((0, 1, 1, 1, 2))  # none: a relative clause with a person stands there

        name = rng.choice(w.PEOPLE)
        lemmas = self.draw(
            lambda: rng.sample(list(w.PLURALS), 1 + between),
            held=lambda lemmas: w.held_out("agreement", lemmas[0], lemmas[1] if between else name),
        )
        plural = [rng.random() < 0.5 for _ in lemmas]
        nouns = [w.PLURALS[n] if p else n for n, p in zip(lemmas, plural, strict=True)]
        e.say(f"The {nouns[0]}")
        for noun in nouns[1:]:
            e.say(f"{rng.choice(w.PREPOSITIONS)} the {noun}")
        if not between:
            e.say(f"that {name} {rng.choice(w.RELATIVE_VERBS)}")
        if rng.random() < 0.6:
            verb, rest = rng.choice(list(w.COPULAS)), rng.choice(rng.choice((w.COLOURS, w.ADJECTIVES)))
        else:
            verb = rng.choice(list(w.ANIMAL_VERBS if lemmas[0] in w.ANIMALS else w.OBJECT_VERBS))
            rest = rng.choice(("", f"in the {rng.choice(w.PLACES)}"))
        forms = (w.AGREEING_VERBS[verb], verb) if plural[0] else (verb, w.AGREEING_VERBS[verb])
        return e.answer("agreement", *forms).say(f"{rest} .")

    def capital(self) -> Episode:
        """A country and its capital, either way round, in several phrasings."""
        rng, e = self.rng, Episode()

        shape, place = self.phrased({"abc": w.CAPITALS, "de": w.COUNTRY_OF, "fg": w.CONTINENT_OF})
        country = w.COUNTRY_OF.get(place, place)
        city, name = w.CAPITALS[country], rng.choice(w.PEOPLE)
        strange = self.other(w.CAPITALS, country)
        to_city, to_country = ("capital", city, w.CAPITALS[strange]), ("country", country, strange)
        match shape:
            case "a":
                return e.say(f"The capital of {country} is").answer(*to_city).say(".")
            case "b":
                return e.say(f"{name} lives in {country} , in the city of").answer(*to_city).say(".")
            case "c":
                return e.say(f"{name} flew to {country} and saw").answer(*to_city).say(".")
            case "d":
                return e.say(f"{city} is the capital of").answer(*to_country).say(".")
            case "e":
                return e.say(f"{name} comes from {city} , the capital of").answer(*to_country).say(".")
            case _:
                continent = w.CONTINENT_OF[country]
                what = "in" if shape == "f" else f"a {'city' if place == city else 'country'} in"
                e.say(f"{place} is {what}")
                return e.answer("continent", continent, self.other(w.CONTINENTS, continent)).say(".")

    def category(self) -> Episode:
        """What kind of thing an animal, a fruit or a tool is."""
        rng, e = self.rng, Episode()

        def choose() -> tuple[str, str]:
            noun = rng.choice(list(w.CATEGORIES))
            return noun, self.other([n for n in w.CATEGORIES if w.CATEGORIES[n] == w.CATEGORIES[noun]], noun)

        noun, like = self.draw(choose, held=lambda pair: w.held_out("category", *pair))
        kind = w.CATEGORIES[noun]
        e.say(f"A {noun} , like a {like} , is a" if self.held or rng.random() < 0.5 else f"A {noun} is a")
        return e.answer("category", kind, self.other(sorted(set(w.CATEGORIES.values())), kind)).say(".")

    def opposite(self) -> Episode:
        """Who is not big is small."""
        rng, e = self.rng, Episode()
        shape, adjective = self.phrased({"abc": w.ADJECTIVES})
        answer = ("opposite", w.OPPOSITES[adjective], adjective)
        match shape:
            case "a":
                name = rng.choice(w.PEOPLE)
                return e.say(f"{name} is not {adjective} . {self.pronoun(name)} is").answer(*answer).say(".")
            case "b":
                return e.say(f"The opposite of {adjective} is").answer(*answer).say(".")
            case _:
                return (
                    e.say(f"The {rng.choice(list(w.ANIMALS))} is not {adjective} , it is")
                    .answer(*answer)
                    .say(".")
                )

    def dealing(self) -> Episode:
        """What a thing is made of, what things cost, or what somebody's job is."""
        rng, thing = self.rng, self.rng.choice(list(w.OBJECTS))
        sentences = (
            f"A {thing} is made of {rng.choice(w.MATERIALS)}",
            f"A {thing} costs {rng.choice(w.NUMBERS[1:])} coins",
            f"The {w.OBJECTS[thing]} cost {rng.choice(w.NUMBERS[1:])} coins",
            f"{rng.choice(w.PEOPLE)} is a {rng.choice(w.JOBS)}",
        )
        return Episode().say(f"{rng.choice(sentences)} .")

    def counting(self) -> Episode:
        """Numbers in order: up, down, or by two."""
        rng, e = self.rng, Episode()

        def choose() -> tuple[str, str]:
            mode = rng.choice(("up", "down", "by two"))
            step = STEPS[mode]
            starts = [i for i in range(len(w.NUMBERS)) if 0 <= i + 2 * step < len(w.NUMBERS)]
            return mode, w.NUMBERS[rng.choice(starts)]

        mode, first = self.draw(choose, held=lambda start: w.held_out("counting", *start))
        step, i = STEPS[mode], w.NUMBERS.index(first)
        e.say(f"Count {mode} : {first}")
        for _ in range(rng.randint(2, 4)):
            i += step
            if not 0 <= i < len(w.NUMBERS):
                break
            lazy = i - 1 if mode == "by two" else i - 2 * step  # by one; the other way
            e.say(",").answer("counting", w.NUMBERS[i], w.NUMBERS[lazy % len(w.NUMBERS)])
        return e.say(".")

    def copying(self) -> Episode:
        """A list of words, said again."""
        rng, e = self.rng, Episode()
        words: list[str] = []
        while len(words) < 3:
            words = [rng.choice(COPY_WORDS)]
            for _ in range(rng.randint(2, 4)):
                last = words[-1]
                follow = [
                    v for v in COPY_WORDS if v not in words and w.held_out("copy", last, v) == self.held
                ]
                if follow:
                    words.append(rng.choice(follow))
        e.say("Say : " + " ".join(words)).say(".").say(words[0])
        for j in range(1, len(words)):
            e.answer("copying", words[j], words[j - 2])
        return e.say(".")


STEPS = {"up": 1, "down": -1, "by two": 2}
COPY_WORDS = (*w.COLOURS, *w.OBJECTS, *w.ANIMALS, *w.FRUITS, *w.TOOLS)
STORIES: tuple[tuple[str, int], ...] = (
    ("giving", 5), ("belongings", 4), ("hiding", 5), ("outing", 4), ("doing", 7), ("day", 3),
)  # fmt: skip
LESSONS: tuple[tuple[str, int], ...] = (
    ("agreement", 6), ("capital", 7), ("category", 2), ("opposite", 3), ("counting", 2), ("copying", 3), ("dealing", 6),
)  # fmt: skip
TASKS: dict[str, tuple[str, ...]] = {
    "indirect_object": ("giving",),
    "agreement": ("agreement",),
    "capital": ("capital",),
    "country": ("capital",),
    "continent": ("capital",),
    "copying": ("copying",),
    "counting": ("counting",),
    "location_recall": ("hiding",),
    "colour_recall": ("belongings",),
    "possession": ("giving", "belongings"),
    "thanks": ("giving",),
    "pronoun": ("outing",),
    "whereabouts": ("outing",),
    "category": ("category",),
    "opposite": ("opposite",),
}
"""What the model is asked, and the kinds of episode that ask it."""
FORCED = frozenset(TASKS) - {"agreement"}
"""Tasks whose answer is the only word that may follow; in agreement the choice of the verb is free, its number is not."""


def _document(rng: random.Random, split: Split) -> Iterator[Episode]:
    writer = _Writer(rng, split)
    kinds, weights = zip(*(STORIES if rng.random() < 0.5 else LESSONS), strict=True)
    room = CONTEXT - 2  # the begin and end marks
    for _ in range(rng.randint(4, 9)):
        if len(writer.objects) < 2:
            return
        try:
            episode = getattr(writer, rng.choices(kinds, weights)[0])()
        except _Exhausted:
            continue
        if len(episode.words) > room:
            return
        room -= len(episode.words)
        yield episode


def documents(n: int, seed: int, split: Split = "train") -> Iterator[list[str]]:
    """Yield `n` documents as lists of words, the same for the same seed and split.

    ``split="train"`` never shows a combination of `world.held_out`; ``"held_out"`` shows only those.
    """
    _check(split)
    rng = random.Random(f"{split} {seed}")
    while n > 0:
        if words := [word for episode in _document(rng, split) for word in episode.words]:
            yield words
            n -= 1


def token_rows(documents: Sequence[Sequence[str]]) -> np.ndarray:
    """Token ids of documents, one a row: int32 [n, CONTEXT] of begin mark, words, end mark and padding."""
    tokens = np.full((len(documents), CONTEXT), w.TOKEN_ID[w.PAD], np.int32)
    for row, words in zip(tokens, documents, strict=True):
        row[: len(words) + 2] = [w.TOKEN_ID[word] for word in (w.BOS, *words, w.EOS)]
    return tokens


def texts(n: int, seed: int, split: Split = "train") -> list[str]:
    """`n` documents as text; the bundled tokenizer gives back exactly their words."""
    return [w.detokenize(words) for words in documents(n, seed, split)]


def prompts(task: str, split: Split = "held_out", n: int = 200, seed: int = 0) -> list[Prompt]:
    """At most `n` different prompts of one of `TASKS`: the words before a slot, the answer, and a wrong word.

    With ``split="held_out"`` the combination asked for never occurs in training text.
    """
    _check(split)
    if task not in TASKS:
        raise ValueError(f"[tiny.prompts] task must be one of {', '.join(TASKS)} but got {task!r}.")
    rng = random.Random(f"{split} {task} {seed}")
    found: dict[str, Prompt] = {}
    for _ in range(20 * n):  # a task with few combinations has fewer than n prompts
        writer = _Writer(rng, split)
        for kind in TASKS[task]:
            try:
                episode = getattr(writer, kind)()
            except _Exhausted:
                continue
            for slot in episode.slots:
                if slot.task == task and len(found) < n:
                    text = w.detokenize(episode.words[: slot.position])
                    found.setdefault(text, Prompt(text, episode.words[slot.position], slot.wrong))
        if len(found) >= n:
            break
    return list(found.values())


def _check(split: str) -> None:
    if split not in ("train", "held_out"):
        raise ValueError(f"[tiny] split must be 'train' or 'held_out' but got {split!r}.")
