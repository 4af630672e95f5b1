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
from .language import CONTEXT, Split, documents


class Concept(NamedTuple):
    name: str
    description: str
    contextual: bool


_WORDS: dict[str, tuple[str, Iterable[str]]] = {
    "woman": ("a woman's name", w.WOMEN),
    "man": ("a man's name", w.MEN),
    "country": ("a country", w.CAPITALS),
    "city": ("a capital city", w.COUNTRY_OF),
    "in_europe": ("a country or city of Europe", [p for p, c in w.CONTINENT_OF.items() if c == "Europe"]),
    "in_asia": ("a country or city of Asia", [p for p, c in w.CONTINENT_OF.items() if c == "Asia"]),
    "in_africa": ("a country or city of Africa", [p for p, c in w.CONTINENT_OF.items() if c == "Africa"]),
    "in_america": ("a country or city of America", [p for p, c in w.CONTINENT_OF.items() if c == "America"]),
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
    "kind": ("the word for a kind of thing: creature, fruit, tool, thing", set(w.CATEGORIES.values())),
    "number": ("a number", w.NUMBERS),
    "giving_verb": ("a verb that hands something over", w.GIVING_VERBS),
    "place_preposition": ("near, behind, under, beside, above", w.PREPOSITIONS),
    "plural_verb": ("a verb in the plural", w.AGREEING_VERBS.values()),
    "ordinary_plural_verb": (
        "a plural verb other than are and were",
        [*w.ANIMAL_VERBS.values(), *w.OBJECT_VERBS.values()],
    ),
    "staying_verb": ("what people do in a place: played, sang, rested", w.STAYING_VERBS),
}

_CONTEXT: dict[str, str] = {
    # giving
    "frame_clause": "inside the clause that When, After or While opens",
    "frame_comma": "the comma that ends such a clause: the giver's name must follow",
    "and_of_people": "'and' between two people who act together",
    "second_of_pair": "the second name of two people who act together",
    "giver": "the person who gives, as subject of the giving sentence",
    "giving_phrase": "from the verb of giving to the thing given",
    "gift": "the thing given",
    "to_recipient": "'to' in a giving sentence: the other person must follow",
    "recipient": "the person given to",
    "stop_after_meeting": "the full stop after 'A and B met in the park'",
    "stop_after_giving": "the full stop of a giving sentence",
    "thankful": "the person named after 'Then': the one who was given something",
    "thanked_person": "the person who is thanked",
    "new_owner": "the person named after 'Now': the one who was given something",
    # people, things and places of the story
    "name_again": "a person already named in this document",
    "name_new": "a person named for the first time in this document",
    "object_again": "an object already mentioned in this document",
    "to_place": "'to' after a verb of going: a place must follow",
    "the_before_place": "'the' that a room or an outdoor place must follow",
    "the_before_container": "'the' that a container must follow",
    "the_before_known_container": "'the' that the container must follow in which the thing was put",
    "container_again": "the container in which the thing is found",
    "found_object": "the thing that is found where it was put",
    "outdoors_now": "an outing has reached a place outdoors and is not over",
    "indoors_now": "an outing has reached a room and is not over",
    "outside_next": "a staying verb in an outing outdoors: 'outside' must follow",
    "inside_next": "a staying verb in an outing to a room: 'inside' must follow",
    "she_next": "a full stop that 'She' must follow",
    "he_next": "a full stop that 'He' must follow",
    "belongings": "inside the sentence that says who has which coloured thing",
    "and_of_clauses": "'and' between two clauses",
    "is_before_known_colour": "'is' after a thing whose colour was told: that colour must follow",
    "known_colour": "the colour of a thing, told before and said again",
    "to_owner": "'to' in 'belongs to': the owner must follow",
    "owner": "the person something belongs to, told before",
    "is_before_where": "'is' after a thing of which nothing is known: where it lies must follow",
    # capitals
    "geography": "inside a sentence about a country, a city or a continent",
    "city_next": "the country was named and its capital must follow",
    "country_next": "the city was named and its country must follow",
    "continent_next": "a place was named and its continent must follow",
    "city_told": "a capital named after its country",
    "country_told": "a country named after its capital",
    "saw_verb": "'saw' as the past of 'see', not the tool",
    "tool": "a tool ('saw' only where it is one)",
    # agreement
    "plural_subject": "a plural subject still waits for its verb",
    "singular_subject": "a singular subject still waits for its verb",
    "noun_between": "a noun between a subject and its verb",
    "singular_between_plural": "a singular noun between a plural subject and its verb",
    "plural_between_singular": "a plural noun between a singular subject and its verb",
    "relative_clause": "inside a relative clause",
    "colour_predicate": "a colour after is, are, was or were",
    "colour_attribute": "a colour before its noun",
    # lists
    "counting_up": "counting up",
    "counting_down": "counting down",
    "counting_by_two": "counting by two",
    "counting_comma": "the comma between two numbers",
    "list_first_time": "a word of a list that will have to be repeated",
    "list_repeated": "a word of a list that is being repeated",
    "list_complete": "the last word of a repeated list: a full stop must follow",
    "stop_before_repeat": "the full stop after which a list must be repeated",
    # definitions
    "kind_next": "'a' that the kind of the thing must follow",
    "compared": "the noun that another is likened to",
    "negated": "a quality that is denied",
    "opposite_next": "'is' that the opposite of a quality named before must follow",
    "opposite_told": "a quality, told after its opposite",
    # document
    "first_sentence": "the first sentence of the document",
    "stop_in_story": "a full stop in a story",
    "stop_in_lesson": "a full stop in a lesson",
}

CONCEPTS: tuple[Concept, ...] = (
    *(Concept(name, description, False) for name, (description, _) in _WORDS.items()),
    *(Concept(name, description, True) for name, description in _CONTEXT.items()),
)
"""All concepts, in the order of the columns of `Labelled.labels`."""
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
        self.sentences = 0
        self.story = False
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
        before = self.sentence[-2] if len(self.sentence) > 1 else ""
        carried: set[str] = set()
        self._recognise(word, previous)
        getattr(self, "_" + self.kind, self._nothing)(word, previous, before, carried)
        self._anywhere(word, previous, before, carried)
        self.sentence.append(word)
        if word == ".":
            self._end(carried)
        return carried

    def _nothing(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        pass

    def _recognise(self, word: str, previous: str) -> None:
        """Settle the kind of the sentence as soon as its words allow."""
        match len(self.sentence):
            case 0 if self.last_kind == "say":
                self.kind = "repeat"
            case 0:
                self.kind = (
                    "frame" if word in w.FRAME_WORDS
                    else "geography" if word in w.CONTINENT_OF
                    else {"Count": "counting", "Say": "say", "A": "definition", "Then": "thanks", "Now": "possession",
                          "He": "pronoun", "She": "pronoun"}.get(word, "")
                )  # fmt: skip
                if self.kind == "pronoun" and not self.place:
                    self.kind = "opposite"
            case 1 if previous in w.PEOPLE and not self.kind:
                self.kind = (
                    "giving" if word in w.GIVING_VERBS
                    else {"and": "meeting", "has": "belongings", "went": "outing", "found": "finding",
                          "is": "opposite"}.get(word, "geography")
                )  # fmt: skip
            case 1 if previous == "The":
                self.kind = (
                    "owning"
                    if word in w.COLOURS
                    else {"capital": "geography", "opposite": "opposite"}.get(word, "")
                )
            case 2 if not self.kind:
                if word in w.PREPOSITIONS or word == "that":
                    self.kind = "agreement"
                elif word == "is":
                    self.kind = (
                        "opposite"
                        if previous in w.ANIMALS
                        else "colour"
                        if previous in self.colour_of
                        else "hiding"
                    )

    def _anywhere(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if self.sentences == 0:
            carried.add("first_sentence")
        if word in w.PEOPLE:
            carried.add("name_again" if word in self.named else "name_new")
            self.named.add(word)
            if not self.sentence and self.last_kind == "meeting":
                carried.add("giver")
        if word in w.OBJECTS and self.kind not in ("say", "repeat", "definition", "agreement"):
            if word in self.mentioned:
                carried.add("object_again")
            self.mentioned.add(word)
        if word in w.COLOURS:
            if previous in ("a", "the", "The"):
                carried.add("colour_attribute")
            elif previous in w.COPULAS or previous in w.COPULAS.values():
                carried.add("colour_predicate")
        if word in w.TOOLS and not (word == "saw" and self.kind in ("geography", "pronoun")):
            carried.add("tool")
        elif word == "saw":
            carried.add("saw_verb")
        opens = previous == "The" or self.kind == "owning"
        if opens and (word in w.PLURALS or word in w.PLURALS.values()):
            self.subject = word
        elif word in w.AGREEING_VERBS or word in w.AGREEING_VERBS.values() or word == "belongs":
            self.subject = ""
        if self.subject:
            carried.add("singular_subject" if self.subject in w.PLURALS else "plural_subject")

    def _frame(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if word == ",":
            carried.add("frame_comma")
            self.kind = "giving"
            return
        carried.add("frame_clause")
        self._pair(word, previous, carried)

    def _meeting(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        self._pair(word, previous, carried)
        if word == ".":
            carried.add("stop_after_meeting")

    def _pair(self, word: str, previous: str, carried: set[str]) -> None:
        if word == "and":
            carried.add("and_of_people")
        elif previous == "and":
            carried.add("second_of_pair")
        elif word == "to":
            carried.add("to_place")
        elif word == "the":
            carried.add("the_before_place")

    def _giving(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if previous == ",":
            carried.add("giver")
        elif word == "to":
            carried.add("to_recipient")
        elif previous == "to":
            carried.add("recipient")
        elif word == ".":
            carried.add("stop_after_giving")
        else:
            carried.add("giving_phrase")
            if word in w.OBJECTS:
                carried.add("gift")

    def _thanks(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if previous == "Then":
            carried.add("thankful")
        elif previous == "thanked":
            carried.add("thanked_person")

    def _possession(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if previous == "Now":
            carried.add("new_owner")

    def _belongings(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        carried.add("belongings")
        if word == "and":
            carried.add("and_of_clauses")
        elif word in w.OBJECTS:
            self.colour_of[word] = previous

    def _colour(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if word == "is":
            carried.add("is_before_known_colour")
        elif word in w.COLOURS:
            carried.add("known_colour")

    def _owning(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if word == "to":
            carried.add("to_owner")
        elif previous == "to":
            carried.add("owner")
        elif word in w.COLOURS:
            carried.add("known_colour")

    def _hiding(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if word == "is":
            carried.add("is_before_where")
        elif word == "the":
            carried.add("the_before_container")

    def _finding(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if word in w.OBJECTS:
            carried.add("found_object")
        elif word == "the" and previous == "in":
            carried |= {"the_before_container", "the_before_known_container"}
        elif word in w.CONTAINERS:
            carried.add("container_again")

    def _outing(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if word == "to":
            carried.add("to_place")
        elif word == "the":
            carried.add("the_before_place")
        elif word in w.PLACES:
            self.place, self.visitor = word, self.sentence[0]
        if self.place:
            carried.add("indoors_now" if self.place in w.INDOORS else "outdoors_now")

    def _pronoun(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        indoors = self.place in w.INDOORS
        if self.place:
            carried.add("indoors_now" if indoors else "outdoors_now")
        if word in w.STAYING_VERBS:
            carried.add("inside_next" if indoors else "outside_next")
        elif previous in w.STAYING_VERBS:
            self.place = ""

    def _geography(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        carried.add("geography")
        told = [place for place in self.sentence if place in w.CONTINENT_OF]
        if told and told[0] in w.CAPITALS:
            if word in w.COUNTRY_OF:
                carried.add("city_told")
            elif (
                word == "saw"
                or (word == "of" and previous == "city")
                or (word == "is" and previous == told[0] != self.sentence[0])
            ):
                carried.add("city_next")
        elif told:
            if word in w.CAPITALS:
                carried.add("country_told")
            elif word == "of":
                carried.add("country_next")
        if word == "in" and previous in ("is", "city", "country"):
            carried.add("continent_next")

    def _agreement(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if not self.subject:
            if word == "the":
                carried.add("the_before_place")
        elif word in w.PLURALS or word in w.PLURALS.values():
            carried.add("noun_between")
            if (word in w.PLURALS) != (self.subject in w.PLURALS):
                carried.add("singular_between_plural" if word in w.PLURALS else "plural_between_singular")
        elif "that" in (word, previous, before):
            carried.add("relative_clause")

    def _counting(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        way = {"up": "counting_up", "down": "counting_down", "by": "counting_by_two"}.get(
            " ".join((*self.sentence, word)[1:2])
        )
        if way and word != ".":
            carried.add(way)
            if word == ",":
                carried.add("counting_comma")

    def _say(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if word == ".":
            self.list = self.sentence[2:]
            carried.add("stop_before_repeat")
        elif len(self.sentence) > 1:
            carried.add("list_first_time")

    def _repeat(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if word != ".":
            carried.add("list_repeated")
            if len(self.sentence) + 1 == len(self.list):
                carried.add("list_complete")

    def _definition(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        if word == "a":
            if previous == "is":
                carried.add("kind_next")
        elif before == "like":
            carried.add("compared")

    def _opposite(self, word: str, previous: str, before: str, carried: set[str]) -> None:
        qualities = [quality for quality in self.sentence if quality in w.OPPOSITES]
        asked = (
            bool(qualities)
            or self.sentence[:1] in (["He"], ["She"])
            or (not self.sentence and word in ("He", "She"))
        )
        if previous == "not":
            carried.add("negated")
        elif word == "is" and asked:
            carried.add("opposite_next")
        elif word in w.OPPOSITES and previous == "is":
            carried.add("opposite_told")

    def _end(self, carried: set[str]) -> None:
        """Close a sentence at its full stop."""
        first = self.sentence[0]
        carried.add("stop_in_story" if self.kind in _STORY_SENTENCES else "stop_in_lesson")
        if self.kind == "outing" or (self.kind == "pronoun" and self.place):
            carried.add("she_next" if self.visitor in w.WOMEN else "he_next")
        elif self.kind == "opposite" and first in w.PEOPLE:
            carried.add("she_next" if first in w.WOMEN else "he_next")
        self.last_kind, self.kind, self.subject, self.sentence = self.kind, "", "", []
        self.sentences += 1


_STORY_SENTENCES = frozenset(
    (
        "giving",
        "meeting",
        "thanks",
        "possession",
        "belongings",
        "colour",
        "owning",
        "hiding",
        "finding",
        "outing",
        "pronoun",
    )
)


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
    tokens = np.full((len(texts), CONTEXT), w.TOKEN_ID[w.PAD], np.int32)
    labels = np.zeros((len(texts), CONTEXT, len(CONCEPTS)), bool)
    valid = np.zeros((len(texts), CONTEXT), bool)
    for i, words in enumerate(texts):
        tokens[i, : len(words) + 2] = [w.TOKEN_ID[word] for word in (w.BOS, *words, w.EOS)]
        labels[i, 1 : len(words) + 1] = label(words)
        valid[i, 1 : len(words) + 1] = True
    return Labelled(tokens, labels, valid)
