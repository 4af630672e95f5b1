"""The closed world of the tiny language: its words, its facts and which facts are kept out of training."""

from __future__ import annotations

from functools import cache
from hashlib import sha256

WOMEN = ("Anna", "Clara", "Emma", "Julia", "Lucy", "Nora")
MEN = ("Ben", "David", "Felix", "Hugo", "Max", "Tom")
PEOPLE = WOMEN + MEN

# continent -> country -> capital
CONTINENTS: dict[str, dict[str, str]] = {
    "Europe": {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"},
    "Asia": {"Japan": "Tokyo", "India": "Delhi", "China": "Beijing"},
    "Africa": {"Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra"},
    "America": {"Peru": "Lima", "Cuba": "Havana", "Canada": "Ottawa"},
}
CAPITALS = {country: city for countries in CONTINENTS.values() for country, city in countries.items()}
COUNTRY_OF = {city: country for country, city in CAPITALS.items()}
CONTINENT_OF = {
    place: continent
    for continent, countries in CONTINENTS.items()
    for pair in countries.items()
    for place in pair
}

COLOURS = ("red", "blue", "green", "yellow", "black", "white")
OPPOSITES = {"big": "small", "hot": "cold", "old": "young", "happy": "sad", "fast": "slow", "wet": "dry"}
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
ADJECTIVES = tuple(OPPOSITES)

# singular -> plural
OBJECTS = {noun: noun + "s" for noun in ("ball", "cup", "lamp", "book", "key", "coin", "hat", "ring")}
ANIMALS = {noun: noun + "s" for noun in ("dog", "cat", "horse", "cow", "bird", "pig")}
PLURALS = OBJECTS | ANIMALS
FRUITS = ("pear", "plum", "lemon", "peach", "grape")
TOOLS = ("saw", "drill", "spade", "rake", "hammer")
CATEGORIES: dict[str, str] = {
    **dict.fromkeys(ANIMALS, "creature"),
    **dict.fromkeys(FRUITS, "fruit"),
    **dict.fromkeys(TOOLS, "tool"),
    **dict.fromkeys(OBJECTS, "thing"),
}
CONTAINERS = ("box", "bag", "drawer", "basket", "chest")
INDOORS = ("kitchen", "attic", "library", "office", "bedroom", "cellar")
OUTDOORS = ("park", "garden", "forest", "yard", "meadow", "street")
PLACES = INDOORS + OUTDOORS
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

GIVING_VERBS = ("gave", "showed", "sold", "handed", "lent")
PREPOSITIONS = ("near", "behind", "under", "beside", "above")
# singular -> plural form of the present-tense or auxiliary verbs that agree with their subject
COPULAS = {"is": "are", "was": "were"}
ANIMAL_VERBS = {"sleeps": "sleep", "runs": "run", "waits": "wait"}
OBJECT_VERBS = {"falls": "fall", "shines": "shine"}
AGREEING_VERBS = COPULAS | ANIMAL_VERBS | OBJECT_VERBS
RELATIVE_VERBS = ("likes", "sees")
STAYING_VERBS = ("played", "sang", "rested")
FRAME_WORDS = ("When", "After", "While")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Sunday")
DAY_PARTS = ("morning", "afternoon", "evening", "night")
WEATHER = ("sunny", "rainy", "windy", "cloudy", "foggy")
JOBS = ("doctor", "teacher", "baker", "farmer", "pilot", "painter")
FOODS = ("bread", "soup", "cheese", "rice", "fish", "salad")
MEALS = ("breakfast", "lunch", "dinner")
COOKING_VERBS = ("ate", "cooked", "bought")
FEELINGS = ("glad", "angry", "tired", "proud", "lonely")
VEHICLES = ("train", "bus", "car", "boat", "bike")
INSTRUMENTS = ("piano", "violin", "flute", "drum", "guitar")
MANNERS = ("slowly", "quickly", "quietly", "loudly")
MATERIALS = ("wood", "metal", "glass", "paper", "stone")

PUNCTUATION = (".", ",", ":")
FUNCTION_WORDS = (
    "The", "the", "A", "a", "and", "to", "in", "of", "from", "not", "that", "it", "like", "by", "for", "On", "In",
    "He", "She", "Then", "Now", "Count", "Say", "up", "down", "has", "went", "walked", "met", "flew", "lives",
    "comes", "thanked", "saw", "found", "belongs", "felt", "practised", "travelled", "made", "costs", "cost",
    "capital", "city", "country", "opposite", "inside", "outside",
)  # fmt: skip

PAD, BOS, EOS, UNKNOWN = SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


def _vocabulary() -> tuple[str, ...]:
    groups = (
        SPECIALS, PUNCTUATION, FUNCTION_WORDS, WOMEN, MEN, CONTINENTS, CAPITALS, COUNTRY_OF, COLOURS, ADJECTIVES,
        OBJECTS, OBJECTS.values(), ANIMALS, ANIMALS.values(), FRUITS, TOOLS, CATEGORIES.values(),
        CONTAINERS, PLACES, NUMBERS, GIVING_VERBS, PREPOSITIONS, AGREEING_VERBS, AGREEING_VERBS.values(),
        RELATIVE_VERBS, STAYING_VERBS, FRAME_WORDS, DAYS, DAY_PARTS, WEATHER, JOBS, FOODS, MEALS, COOKING_VERBS,
        FEELINGS, VEHICLES, INSTRUMENTS, MANNERS, MATERIALS,
    )  # fmt: skip
    return tuple(dict.fromkeys(word for group in groups for word in group))


VOCABULARY: tuple[str, ...] = _vocabulary()
"""Every word and sign; the position is the token id."""
TOKEN_ID: dict[str, int] = {word: i for i, word in enumerate(VOCABULARY)}


@cache
def _hash(*words: str) -> int:
    return sha256("+".join(words).encode()).digest()[0]


def held_out(*combination: str) -> bool:
    """Whether a combination (two people and a place, a subject and a noun, ...) is kept out of training: one in eight.

    A hash decides, not a seed: every training run, whatever its seed, has never seen the same combinations.
    """
    return _hash(*combination) % 8 == 0


def held_phrasing(fact: str, phrasings: str) -> str | None:
    """The phrasing (one letter of `phrasings`) in which training never tells a fact; every other fact has one.

    The fact is always told in the other phrasings, so it can be known, but its use in this one must be worked out.
    """
    return (phrasings + "-" * len(phrasings))[_hash(fact, phrasings) % (2 * len(phrasings))].replace(
        "-", ""
    ) or None


def detokenize(words: list[str]) -> str:
    """The text of a list of words: one space between words, none before a sign."""
    return "".join(word if word in PUNCTUATION else " " + word for word in words)[1:]
