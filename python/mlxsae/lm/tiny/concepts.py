"""What each token of the tiny language means: the ground truth for the features that are found in the model.

Two sorts of concept. A *word* concept is carried by certain words wherever they stand (a country, a plural noun). A
*context* concept is settled by what stands before as well: ``to`` before the recipient and ``to`` before a place are
the same word. Labels are read from left to right by one automaton, so a token's labels depend on the tokens up to and
including it and on nothing else, which is all that a causal model can know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from . import world as w
from .language import Split, documents, token_rows


class Concept(NamedTuple):
    name: str
    description: str
    contextual: bool


_WORDS: dict[str, tuple[str, Iterable[str]]] = {
    "woman": ("a woman's name", w.WOMEN),
    "man": ("a man's name", w.MEN),
    "country": ("a country", w.CAPITALS),
    "city": ("a capital city", w.COUNTRY_OF),
    "continent": ("a continent", w.CONTINENTS),
    "colour": ("a colour", w.COLOURS),
    "quality": ("an adjective that has an opposite", w.ADJECTIVES),
    "object": ("an object, singular", w.OBJECTS),
    "objects": ("objects, plural", w.OBJECTS.values()),
    "animal": ("an animal, singular", w.ANIMALS),
    "animals": ("animals, plural", w.ANIMALS.values()),
    "plural_noun": ("any plural noun", w.PLURALS.values()),
    "fruit": ("a fruit", w.FRUITS),
    "container": ("a container", w.CONTAINERS),
    "indoor_place": ("a room", w.INDOORS),
    "outdoor_place": ("a place under the sky", w.OUTDOORS),
    "place": ("a room or a place under the sky", w.PLACES),
    "kind": ("the word for a kind of thing: creature, fruit, tool, thing", set(w.CATEGORIES.values())),
    "number": ("a number", w.NUMBERS),
    "frame_word": ("When, After, While", w.FRAME_WORDS),
    "giving_verb": ("a verb that hands something over", w.GIVING_VERBS),
    "place_preposition": ("near, behind, under, beside, above", w.PREPOSITIONS),
    "plural_verb": ("a verb in the plural", w.AGREEING_VERBS.values()),
    "relative_verb": ("the verb of a relative clause: likes, sees", w.RELATIVE_VERBS),
    "staying_verb": ("what people do in a place: played, sang, rested", w.STAYING_VERBS),
    "cooking_verb": ("what people do with food: ate, cooked, bought", w.COOKING_VERBS),
    "day": ("a day of the week", w.DAYS),
    "day_part": ("a part of the day", w.DAY_PARTS),
    "weather": ("a word for the weather", w.WEATHER),
    "job": ("a job", w.JOBS),
    "food": ("a food", w.FOODS),
    "meal": ("a meal", w.MEALS),
    "feeling": ("a feeling", w.FEELINGS),
    "vehicle": ("a vehicle", w.VEHICLES),
    "instrument": ("a musical instrument", w.INSTRUMENTS),
    "manner": ("an adverb of manner", w.MANNERS),
    "material": ("a material", w.MATERIALS),
}

_CONTEXT: dict[str, str] = {
    # giving
    "first_of_pair": "the person named right after When, After or While",
    "were_of_pair": "'were' of two people, not of plural things",
    "and_of_people": "'and' between two people who act together",
    "second_of_pair": "the second name of two people who act together",
    "place_of_pair": "the place where two people are or go",
    "frame_comma": "the comma that ends a clause with When, After or While: the giver must follow",
    "giver": "the person who gives, as subject of the giving sentence",
    "the_before_gift": "'the' that the thing given must follow, maybe after its colour",
    "gift": "the thing given",
    "to_recipient": "'to' in a giving sentence: the other person must follow",
    "recipient": "the person given to",
    "stop_after_meeting": "the full stop after 'A and B met in the park'",
    "stop_after_giving": "the full stop of a giving sentence",
    "thankful": "the person named after 'Then': the one who was given something",
    "thanked_person": "the person who is thanked",
    "has_again": "'has' in 'Now Ben has the ball'",
    "the_before_gift_again": "'the' that the thing given must follow once more",
    "new_owner": "the person named after 'Now': the one who was given something",
    # people, things and places of a story
    "name_again": "a person already named in this document",
    "object_again": "an object already mentioned in this document",
    "to_place": "'to' after a verb of going: a place must follow",
    "the_before_place": "'the' that a room or an outdoor place must follow",
    "in_before_place": "'in' that a room or an outdoor place must follow, after 'the'",
    "in_before_new_container": "'in' that any container must follow, after 'the'",
    "the_before_new_container": "'the' that any container must follow",
    "container_new": "the container in which a thing lies, told for the first time",
    "in_before_known_container": "'in' that the container must follow, after 'the', in which the thing was put",
    "the_before_known_container": "'the' that the container must follow in which the thing was put",
    "container_again": "the container in which the thing is found",
    "the_before_found": "'the' that a hidden thing must follow",
    "found_object": "the thing that is found where it was put",
    "place_of_outing": "the place of an outing, which says whether one is inside or outside",
    "outdoors_now": "an outing has reached a place outdoors and is not over",
    "indoors_now": "an outing has reached a room and is not over",
    "outside_next": "a staying verb in an outing outdoors: 'outside' must follow",
    "inside_next": "a staying verb in an outing to a room: 'inside' must follow",
    "she_next": "a full stop that 'She' must follow",
    "he_next": "a full stop that 'He' must follow",
    "a_before_seen": "'a' that an adjective and an animal must follow",
    "quality_of_seen": "the adjective of an animal that somebody saw",
    "animal_seen": "the animal that somebody saw",
    "a_before_owned": "'a' that the colour of a thing somebody has must follow",
    "owned_colour": "the colour of a thing somebody has, told for the first time",
    "owned_object": "the thing somebody has, after its colour",
    "and_of_clauses": "'and' between two clauses: the other owner must follow",
    "second_owner": "the owner in the second clause",
    "is_before_known_colour": "'is' after a thing whose colour was told: that colour must follow",
    "known_colour": "the colour of a thing, told before and said again after 'is'",
    "colour_of_known_thing": "the colour of a thing, told before and said again before its noun",
    "to_owner": "'to' in 'belongs to': the owner must follow",
    "owner": "the person something belongs to, told before",
    "is_before_where": "'is' after a thing of which nothing is known: where it lies must follow",
    "the_before_day_part": "'the' that a part of the day must follow",
    "it_of_weather": "'it' that stands for nothing: the weather will follow",
    "was_before_weather": "'was' that the weather must follow",
    "by_before_vehicle": "'by' that a vehicle must follow",
    "the_before_instrument": "'the' that an instrument must follow",
    # capitals
    "geography": "inside a sentence about a country, a city or a continent",
    "in_before_country": "'in' that the country must follow where somebody lives",
    "to_before_country": "'to' that the country must follow where somebody flew",
    "of_before_any_country": "'of' in 'The capital of': some country must follow",
    "city_next": "the country was named and its capital must follow",
    "country_next": "the city was named and its country must follow",
    "continent_next": "a place was named and its continent must follow",
    "city_told": "a capital named after its country",
    "country_told": "a country named after its capital",
    "and_before_saw": "'and' between two verbs: 'saw' must follow",
    "saw_verb": "'saw' as the past of 'see', not the tool",
    "tool": "a tool ('saw' only where it is one)",
    # agreement
    "plural_subject": "a plural subject still waits for its verb",
    "singular_subject": "a singular subject still waits for its verb",
    "the_before_noun_between": "'the' after a preposition between a subject and its verb: a noun must follow",
    "noun_between": "a noun between a subject and its verb",
    "singular_between_plural": "a singular noun between a plural subject and its verb",
    "plural_between_singular": "a plural noun between a singular subject and its verb",
    "relative_person": "the person in a relative clause",
    "colour_predicate": "a colour after is, are, was or were, not told before",
    "quality_predicate": "an adjective after is, are, was or were in a sentence without a denial",
    # lists
    "counting_up": "counting up",
    "counting_down": "counting down",
    "counting_by_two": "counting by two",
    "counting_comma": "the comma between two numbers",
    "number_counted": "a number in a count",
    "number_of_coins": "a number that tells a price",
    "coins_of_price": "'coins' as money, not as objects",
    "list_first_time": "a word of a list that will have to be repeated",
    "list_repeated": "a word of a list that is being repeated",
    "list_complete": "the last word of a repeated list: a full stop must follow",
    "stop_before_repeat": "the full stop after which a list must be repeated",
    # definitions
    "like_comma": "the comma before 'like'",
    "a_before_compared": "'a' after 'like'",
    "is_after_comparison": "'is' after 'A dog, like a cat,'",
    "compared": "the noun that another is likened to",
    "a_before_kind": "'a' that the kind of the thing must follow",
    "a_before_job": "'a' that a job must follow",
    "of_before_material": "'of' that a material must follow",
    "of_before_quality": "'of' in 'The opposite of': an adjective must follow",
    "negated": "an adjective that is denied",
    "denial_comma": "the comma after a denial: 'it is' must follow",
    "it_of_denial": "'it' that stands for the subject of a denial",
    "opposite_next": "'is' that the opposite of the adjective named before must follow",
    "opposite_told": "an adjective, told after its opposite",
    # document
    "stop_in_story": "a full stop in a story",
    "stop_in_lesson": "a full stop in a lesson",
}

CONCEPTS: tuple[Concept, ...] = (
    *(Concept(name, description, False) for name, (description, _) in _WORDS.items()),
    *(Concept(name, description, True) for name, description in _CONTEXT.items()),
)
"""All concepts, in the order of the columns of `Labelled.labels`."""
CORE = 0.9
"""A concept is core if its own direction detects it with an F1 over this (``direction_f1`` in ``card.json``)."""
_COLUMN = {concept.name: i for i, concept in enumerate(CONCEPTS)}


class Labelled(NamedTuple):
    """Documents with their ground truth, one document a row, cut to no more than `CONTEXT` tokens by construction."""

    tokens: np.ndarray  # [rows, CONTEXT] int32: begin mark, words, end mark, padding
    labels: np.ndarray  # [rows, CONTEXT, concepts] bool; no concept holds on a mark or padding
    valid: np.ndarray  # [rows, CONTEXT] bool: the words, neither marks nor padding


class _Reader:
    """Reads one document word by word and says which context concepts each word carries."""

    def __init__(self) -> None:
        self.sentence: list[str] = []
        self.kind = ""  # of this sentence, as soon as it shows
        self.last_kind = ""  # of the sentence before
        self.named: set[str] = set()
        self.mentioned: set[str] = set()
        self.colour_of: dict[str, str] = {}
        self.subject = ""  # a noun that waits for its verb
        self.place = ""  # of the outing under way
        self.visitor = ""
        self.pronoun_due = ""
        self.list: list[str] = []

    def read(self, word: str) -> set[str]:
        previous = self.sentence[-1] if self.sentence else ""
        carried: set[str] = set()
        self._recognise(word, previous)
        if rule := getattr(self, "_" + self.kind, None):
            rule(word, previous, carried)
        self._anywhere(word, previous, carried)
        self.sentence.append(word)
        if word == ".":
            self._end(carried)
        return carried

    def _recognise(self, word: str, previous: str) -> None:
        """Settle the kind of the sentence as soon as its words allow."""
        match len(self.sentence):
            case 0:
                self.kind = _FIRST_WORD.get(word, "") if self.last_kind != "say" else "repeat"
                if self.kind == "pronoun" and not self.place:
                    self.kind = "opposite"
            case 1 if previous in w.PEOPLE:
                self.kind = _SECOND_WORD.get(word, "geography")
            case 1 if previous == "The":
                self.kind = "owning" if word in w.COLOURS else _AFTER_THE.get(word, "")
            case 2 if self.sentence[0] == "The" and not self.kind:
                if word in w.PREPOSITIONS or word == "that":
                    self.kind = "agreement"
                elif word == "cost":
                    self.kind = "price"
                elif word == "is":
                    told = previous in self.colour_of
                    self.kind = "opposite" if previous in w.ANIMALS else "colour" if told else "hiding"
            case 2 if self.kind == "definition" and word == "costs":
                self.kind = "price"
            case 3 if self.kind == "definition" and word == "made":
                self.kind = "stuff"
            case 2 if self.kind == "opposite" and self.sentence[0] in w.PEOPLE and word == "a":
                self.kind = "job"

    def _anywhere(self, word: str, previous: str, carried: set[str]) -> None:
        """Concepts that do not belong to one kind of sentence."""
        if word in w.PEOPLE:
            if word in self.named:
                carried.add("name_again")
            self.named.add(word)
            if not self.sentence and self.last_kind == "meeting":
                carried.add("giver")
        if word in w.OBJECTS and self.kind in _STORIES:
            if word in self.mentioned:
                carried.add("object_again")
            self.mentioned.add(word)
        if word == "saw" and self.kind in ("geography", "pronoun"):
            carried.add("saw_verb")
        elif word in w.TOOLS:
            carried.add("tool")
        verb = word in w.AGREEING_VERBS or word in w.AGREEING_VERBS.values() or word in ("belongs", "cost")
        if (previous == "The" or self.kind == "owning") and (word in w.PLURALS or word in w.PLURALS.values()):
            self.subject = word
        elif verb:
            self.subject = ""
        if self.subject:
            carried.add("singular_subject" if self.subject in w.PLURALS else "plural_subject")

    # ---- one method for each kind of sentence

    def _frame(self, word: str, previous: str, carried: set[str]) -> None:
        if word == ",":
            carried.add("frame_comma")
            self.kind = "giving"
        elif previous in w.FRAME_WORDS:
            carried.add("first_of_pair")
        else:
            self._pair(word, previous, carried)

    def _meeting(self, word: str, previous: str, carried: set[str]) -> None:
        self._pair(word, previous, carried)
        if word == ".":
            carried.add("stop_after_meeting")

    def _pair(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "and":
            carried.add("and_of_people")
        elif previous == "and":
            carried.add("second_of_pair")
        elif word in w.PLACES:
            carried.add("place_of_pair")
        elif word == "were":
            carried.add("were_of_pair")
        else:
            self._going(word, carried)

    def _going(self, word: str, carried: set[str]) -> None:
        if word == "to":
            carried.add("to_place")
        elif word == "in":
            carried.add("in_before_place")
        elif word == "the":
            carried.add("the_before_place")

    def _giving(self, word: str, previous: str, carried: set[str]) -> None:
        if previous == ",":
            carried.add("giver")
        elif word == "the":
            carried.add("the_before_gift")
        elif word == "to":
            carried.add("to_recipient")
        elif previous == "to":
            carried.add("recipient")
        elif word in w.OBJECTS:
            carried.add("gift")
        elif word == ".":
            carried.add("stop_after_giving")

    def _thanks(self, word: str, previous: str, carried: set[str]) -> None:
        if previous == "Then":
            carried.add("thankful")
        elif previous == "thanked":
            carried.add("thanked_person")

    def _possession(self, word: str, previous: str, carried: set[str]) -> None:
        if previous == "Now":
            carried.add("new_owner")
        elif word == "has":
            carried.add("has_again")
        elif word == "the":
            carried.add("the_before_gift_again")

    def _belongings(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "a":
            carried.add("a_before_owned")
        elif word in w.COLOURS:
            carried.add("owned_colour")
        elif word in w.OBJECTS:
            carried.add("owned_object")
            self.colour_of[word] = previous
        elif word == "and":
            carried.add("and_of_clauses")
        elif previous == "and":
            carried.add("second_owner")

    def _colour(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "is":
            carried.add("is_before_known_colour")
        elif word in w.COLOURS:
            carried.add("known_colour")

    def _owning(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "to":
            carried.add("to_owner")
        elif previous == "to":
            carried.add("owner")
        elif word in w.COLOURS:
            carried.add("colour_of_known_thing")

    def _hiding(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "is":
            carried.add("is_before_where")
        elif word == "in":
            carried.add("in_before_new_container")
        elif word == "the":
            carried.add("the_before_new_container")
        elif word in w.CONTAINERS:
            carried.add("container_new")

    def _finding(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "the":
            carried.add("the_before_found" if previous == "found" else "the_before_known_container")
        elif word == "in":
            carried.add("in_before_known_container")
        elif word in w.OBJECTS:
            carried.add("found_object")
        elif word in w.CONTAINERS:
            carried.add("container_again")

    def _outing(self, word: str, previous: str, carried: set[str]) -> None:
        self._going(word, carried)
        if word in w.PLACES:
            carried.add("place_of_outing")
            self.place, self.visitor = word, self.sentence[0]
        self._whereabouts(carried)

    def _pronoun(self, word: str, previous: str, carried: set[str]) -> None:
        self._whereabouts(carried)
        if word in w.STAYING_VERBS:
            carried.add("inside_next" if self.place in w.INDOORS else "outside_next")
        elif previous in w.STAYING_VERBS:
            self.place = ""
        elif word == "a":
            carried.add("a_before_seen")
        elif word in w.ADJECTIVES:
            carried.add("quality_of_seen")
        elif word in w.ANIMALS:
            carried.add("animal_seen")

    def _whereabouts(self, carried: set[str]) -> None:
        if self.place:
            carried.add("indoors_now" if self.place in w.INDOORS else "outdoors_now")

    def _weather(self, word: str, previous: str, carried: set[str]) -> None:
        match word:
            case "the":
                carried.add("the_before_day_part")
            case "it":
                carried.add("it_of_weather")
            case "was":
                carried.add("was_before_weather")

    def _trip(self, word: str, previous: str, carried: set[str]) -> None:
        self._going(word, carried)
        if word == "by":
            carried.add("by_before_vehicle")

    def _music(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "the":
            carried.add("the_before_instrument")

    def _geography(self, word: str, previous: str, carried: set[str]) -> None:
        carried.add("geography")
        first = next((place for place in self.sentence if place in w.CONTINENT_OF), "")
        if first in w.CAPITALS:
            about_it = self.sentence[:3] == ["The", "capital", "of"]
            if word in w.COUNTRY_OF:
                carried.add("city_told")
            elif word == "saw" or (word == "of" and previous == "city") or (word == "is" and about_it):
                carried.add("city_next")
            elif word == "and":
                carried.add("and_before_saw")
        elif first:
            if word in w.CAPITALS:
                carried.add("country_told")
            elif word == "of":
                carried.add("country_next")
        elif word == "of":
            carried.add("of_before_any_country")
        elif word in ("in", "to"):
            carried.add(f"{word}_before_country")
        if word == "in" and previous in ("is", "city", "country"):
            carried.add("continent_next")

    def _agreement(self, word: str, previous: str, carried: set[str]) -> None:
        if not self.subject:
            self._going(word, carried)
            if previous in w.COPULAS or previous in w.COPULAS.values():
                carried.add("colour_predicate" if word in w.COLOURS else "quality_predicate")
        elif word == "the":
            carried.add("the_before_noun_between")
        elif previous == "that":
            carried.add("relative_person")
        elif word in w.PLURALS or word in w.PLURALS.values():
            carried.add("noun_between")
            if (word in w.PLURALS) != (self.subject in w.PLURALS):
                carried.add("singular_between_plural" if word in w.PLURALS else "plural_between_singular")

    def _counting(self, word: str, previous: str, carried: set[str]) -> None:
        ways = {"up": "counting_up", "down": "counting_down", "by": "counting_by_two"}
        way = ways.get((*self.sentence, word)[1] if self.sentence else "")
        if way and word != ".":
            carried.add(way)
            if word == ",":
                carried.add("counting_comma")
            elif word in w.NUMBERS and previous != "by":
                carried.add("number_counted")

    def _price(self, word: str, previous: str, carried: set[str]) -> None:
        if word in w.NUMBERS:
            carried.add("number_of_coins")
        elif previous in w.NUMBERS:
            carried.add("coins_of_price")

    def _say(self, word: str, previous: str, carried: set[str]) -> None:
        if word == ".":
            self.list = self.sentence[2:]
            carried.add("stop_before_repeat")
        elif len(self.sentence) > 1:
            carried.add("list_first_time")

    def _repeat(self, word: str, previous: str, carried: set[str]) -> None:
        if word != ".":
            carried.add("list_repeated")
            if len(self.sentence) + 1 == len(self.list):
                carried.add("list_complete")

    def _definition(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "," and len(self.sentence) == 2:
            carried.add("like_comma")
        elif word == "a":
            carried.add("a_before_kind" if previous == "is" else "a_before_compared")
        elif word == "is" and previous == ",":
            carried.add("is_after_comparison")
        elif self.sentence[-2:] == ["like", "a"]:
            carried.add("compared")

    def _stuff(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "of":
            carried.add("of_before_material")

    def _job(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "a":
            carried.add("a_before_job")

    def _opposite(self, word: str, previous: str, carried: set[str]) -> None:
        pronoun = self.sentence[:1] in (["He"], ["She"])
        asked = pronoun or any(quality in w.OPPOSITES for quality in self.sentence)
        if previous == "not":
            carried.add("negated")
        elif word == ",":
            carried.add("denial_comma")
        elif word == "of":
            carried.add("of_before_quality")
        elif word == "it":
            carried.add("it_of_denial")
        elif word == "is" and asked:
            carried.add("opposite_next")
        elif word in w.OPPOSITES and previous == "is":
            carried.add("opposite_told")

    def _end(self, carried: set[str]) -> None:
        """Close a sentence at its full stop."""
        first = self.sentence[0]
        carried.add("stop_in_story" if self.kind in _STORIES else "stop_in_lesson")
        if self.kind == "outing" or (self.kind == "pronoun" and self.place):
            carried.add("she_next" if self.visitor in w.WOMEN else "he_next")
        elif self.kind == "opposite" and first in w.PEOPLE:
            carried.add("she_next" if first in w.WOMEN else "he_next")
        self.last_kind, self.kind, self.subject, self.sentence = self.kind, "", "", []


# kinds of sentence by their first words; a sentence that begins with a person shows its kind one word later
_FIRST_WORD = {
    **dict.fromkeys(w.FRAME_WORDS, "frame"),
    **dict.fromkeys(w.CONTINENT_OF, "geography"),
    **dict.fromkeys(("He", "She"), "pronoun"),
    **dict.fromkeys(("On", "In"), "weather"),
    "A": "definition", "Then": "thanks", "Now": "possession", "Count": "counting", "Say": "say",
}  # fmt: skip
_SECOND_WORD = {
    **dict.fromkeys(w.GIVING_VERBS, "giving"),
    **dict.fromkeys(w.COOKING_VERBS, "meal"),
    "and": "meeting", "has": "belongings", "found": "finding", "went": "outing", "travelled": "trip",
    "practised": "music", "felt": "feeling", "is": "opposite",
}  # fmt: skip
_AFTER_THE = {"capital": "geography", "opposite": "opposite"}
_STORIES = frozenset(
    (
        "frame", "meeting", "giving", "thanks", "possession", "belongings", "colour", "owning", "hiding", "finding",
        "outing", "pronoun", "weather", "meal", "trip", "music", "feeling",
    )
)  # fmt: skip


def label(words: Sequence[str]) -> np.ndarray:
    """Concepts of each word of one document: bool [words, concepts]. Row i depends on ``words[: i + 1]`` only."""
    labels = np.zeros((len(words), len(CONCEPTS)), bool)
    reader = _Reader()
    for row, word in zip(labels, words, strict=True):
        row[: len(_WORDS)] = _WORD_TABLE.get(word, False)
        row[[_COLUMN[name] for name in reader.read(word)]] = True
    return labels


_WORD_TABLE = {
    word: np.array([word in set(members) for _, members in _WORDS.values()]) for word in w.VOCABULARY
}


def labelled(n_tokens: int, seed: int, split: Split = "train") -> Labelled:
    """Documents with at least `n_tokens` words in all, and their labels."""
    if n_tokens <= 0:
        raise ValueError(f"[tiny.labelled] n_tokens must be positive but got {n_tokens}.")
    texts: list[list[str]] = []
    n = 0
    for words in documents(n_tokens, seed, split):
        texts.append(words)
        n += len(words)
        if n >= n_tokens:
            break
    tokens = token_rows(texts)
    labels = np.zeros((*tokens.shape, len(CONCEPTS)), bool)
    for row, words in zip(labels, texts, strict=True):
        row[1 : len(words) + 1] = label(words)
    marks = [w.TOKEN_ID[mark] for mark in w.SPECIALS]
    return Labelled(tokens, labels, ~np.isin(tokens, marks))
