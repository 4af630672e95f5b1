"""The bundled tiny language model: laws of its language and labels, and that the shipped weights do what the card says."""

from __future__ import annotations

import functools
import itertools
import json
import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxsae.lm import tiny
from mlxsae.lm.tiny import concepts, evaluation, language, world
from mlxsae.lm.tiny import train as training
from mlxsae.lm.tiny.tokenizer import write_tokenizer

SPLITS = ("train", "held_out")


@pytest.fixture(scope="module")
def bundled():
    from mlx_lm.utils import load

    model, tokenizer = load(str(tiny.folder()))[:2]
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture(scope="module")
def labelled() -> concepts.Labelled:
    return concepts.labelled(100_000, seed=3)


# ---- the language


@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_same_text(split):
    assert language.texts(50, 7, split) == language.texts(50, 7, split)
    assert language.texts(50, 7, split) != language.texts(50, 8, split)


def test_the_splits_share_no_document():
    assert not set(language.texts(3000, 0, "train")) & set(language.texts(3000, 0, "held_out"))


@pytest.mark.parametrize("split", SPLITS)
def test_documents_fit_the_context_and_the_vocabulary(split):
    for words in language.documents(2000, 1, split):
        assert 0 < len(words) <= language.CONTEXT - 2
        assert set(words) <= set(world.VOCABULARY)
        assert words[-1] == "."


def test_every_word_is_used():
    seen = {word for words in language.documents(3000, 2) for word in words}
    assert set(world.VOCABULARY) - seen == set(world.SPECIALS)


def test_training_text_never_shows_a_held_out_combination():
    """Read off the text itself, not off the generator."""
    checked = dict.fromkeys(("giving", "hiding", "colour", "outing", "copying", "capital", "agreement"), 0)

    def check(kind: str, held: bool) -> None:
        checked[kind] += 1
        assert not held, s

    for words in language.documents(5000, 4, "train"):
        sentences = [
            s.replace(",", "").replace(":", "").strip(".").split()
            for s in world.detokenize(words).split(". ")
        ]
        for before, s in itertools.pairwise([[], *sentences]):
            if s[0] in world.FRAME_WORDS or s[1] == "and":
                pair = [name for name in s if name in world.PEOPLE][:2]
                check(
                    "giving", world.held_out(*sorted(pair), next(word for word in s if word in world.PLACES))
                )
            elif s[2:4] == before[2:4] == ["is", "in"]:
                check("hiding", world.held_out("hiding", before[1], before[-1], s[1], s[-1]))
            elif s[1] == "has" and "and" in s:
                check("colour", world.held_out("colour", s[4], s[3], s[10], s[9]))
            elif s[1] == "went":
                check("outing", world.held_out(s[0], s[-1]))
            elif s[0] == "Say":
                for a, b in itertools.pairwise(s[1:]):
                    check("copying", world.held_out("copy", a, b))
            elif s[:3] == ["The", "capital", "of"]:
                check("capital", world.held_phrasing(s[3], "abc") == "a")
            elif s[0] == "The" and s[2] in world.PREPOSITIONS:
                singular = {plural: noun for noun, plural in world.PLURALS.items()}
                check("agreement", world.held_out("agreement", *(singular.get(s[n], s[n]) for n in (1, 4))))
    assert min(checked.values()) > 200, checked


def test_about_an_eighth_is_held_out():
    combinations = [
        (a, b, place) for a in world.PEOPLE for b in world.PEOPLE if a < b for place in world.PLACES
    ]
    assert 0.1 < np.mean([world.held_out(*combination) for combination in combinations]) < 0.15


@pytest.mark.parametrize(
    ("facts", "phrasings"), [(world.CAPITALS, "abc"), (world.COUNTRY_OF, "de"), (world.CONTINENT_OF, "fg")]
)
def test_some_facts_lack_one_phrasing_and_no_fact_all(facts, phrasings):
    held = [world.held_phrasing(fact, phrasings) for fact in facts]
    assert set(held) <= {*phrasings, None}
    assert 0.2 < np.mean([phrasing is not None for phrasing in held]) < 0.8


# ---- prompts


def _solve(task: str, text: str) -> str | None:
    """The answer that the words of a prompt settle, worked out from the text alone."""
    s = text.replace(",", " ,").replace(".", " .").replace(":", " :").split()
    names = [word for word in s if word in world.PEOPLE]
    match task:
        case "indirect_object":
            return next(name for name in names[:2] if name != names[2])
        case "thanks":
            return names[2] if s[-1] == "thanked" else next(name for name in names[:2] if name != names[2])
        case "capital":
            return world.CAPITALS[next(word for word in s if word in world.CAPITALS)]
        case "country":
            return world.COUNTRY_OF[next(word for word in s if word in world.COUNTRY_OF)]
        case "continent":
            return world.CONTINENT_OF[next(word for word in s if word in world.CONTINENT_OF)]
        case "copying":
            stop = s.index(".")
            return s[2:stop][len(s) - stop - 1]
        case "location_recall":
            thing = s[-3]
            return s[s.index(thing) + 4]
        case "colour_recall":
            return s[s.index(s[-2]) - 1]
        case "possession" if s[-1] == "Now":
            return next(name for name in names[:2] if name != names[2])
        case "possession":
            return s[s.index(s[-3]) - 4]
        case "pronoun":
            return "She" if names[0] in world.WOMEN else "He"
        case "whereabouts":
            return "inside" if set(s) & set(world.INDOORS) else "outside"
        case "category":
            return world.CATEGORIES[s[1]]
        case "opposite":
            return world.OPPOSITES[next(word for word in s if word in world.OPPOSITES)]
        case "counting":
            step = {"up": 1, "down": -1, "by": 2}[s[1]]
            return world.NUMBERS[world.NUMBERS.index(s[-2]) + step]
    return None


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", language.TASKS)
def test_the_text_settles_the_answer(task, split):
    asked = language.prompts(task, split, n=100)
    assert len(asked) >= 10
    assert len({prompt.text for prompt in asked}) == len(asked)
    for prompt in asked:
        assert prompt.answer != prompt.wrong
        if task == "agreement":
            subject_is_plural = prompt.text.split()[1] in world.PLURALS.values()
            assert (prompt.answer in world.AGREEING_VERBS.values()) == subject_is_plural
            assert (prompt.wrong in world.AGREEING_VERBS) == subject_is_plural
        else:
            assert prompt.answer == _solve(task, prompt.text)


@pytest.mark.parametrize("task", language.TASKS)
def test_no_training_text_contains_a_held_out_prompt_with_its_answer(task):
    text = "\n".join(language.texts(5000, 11, "train"))
    for prompt in language.prompts(task, "held_out", n=50):
        assert f"{prompt.text} {prompt.answer}" not in text


def test_bad_requests_say_what_was_wrong():
    with pytest.raises(ValueError, match=r"\[tiny.prompts\] task must be one of .* but got 'chess'"):
        language.prompts("chess")
    with pytest.raises(ValueError, match=r"split must be 'train' or 'held_out' but got 'test'"):
        language.texts(1, 0, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"n_tokens must be positive but got 0"):
        concepts.labelled(0, 0)


# ---- labels


def test_labels_do_not_change_with_what_follows():
    """Cut every document anywhere and go on with another document's words: the labels before the cut stay."""
    rng = random.Random(0)
    texts = list(language.documents(300, 5))
    for words in texts:
        cut = rng.randrange(1, len(words))
        other = rng.choice(texts)
        grafted = words[:cut] + other[rng.randrange(len(other)) :]
        full = concepts.label(words)
        np.testing.assert_array_equal(concepts.label(words[:cut]), full[:cut])
        np.testing.assert_array_equal(concepts.label(grafted)[:cut], full[:cut])


def test_any_words_can_be_labelled():
    """A model's own text need not be grammatical."""
    rng = random.Random(1)
    for _ in range(300):
        words = rng.choices(world.VOCABULARY, k=40)
        concepts.label([word for word in words if word not in world.SPECIALS])


def test_concepts_are_many_named_once_and_mostly_contextual():
    names = [concept.name for concept in concepts.CONCEPTS]
    assert len(names) == len(set(names)) >= 60
    assert all(concept.description for concept in concepts.CONCEPTS)
    assert sum(concept.contextual for concept in concepts.CONCEPTS) >= len(names) / 3


def test_every_concept_occurs_neither_rarely_nor_nearly_always(labelled):
    rates = labelled.labels[labelled.valid].mean(0)
    for concept, rate in zip(concepts.CONCEPTS, rates, strict=True):
        assert 0.001 < rate < 0.25, (concept.name, rate)


def test_no_concept_is_another(labelled):
    columns = labelled.labels[labelled.valid].T
    assert len({column.tobytes() for column in columns}) == len(columns)


def test_context_concepts_are_not_word_lists(labelled):
    """Each context concept is missing somewhere on a word that carries it elsewhere, or it would be a word concept."""
    words, labels = labelled.tokens[labelled.valid], labelled.labels[labelled.valid]
    for i, concept in enumerate(concepts.CONCEPTS):
        carriers = np.unique(words[labels[:, i]])
        always = labels[np.isin(words, carriers), i].all()
        assert always != concept.contextual, concept.name


def test_labels_by_hand():
    text = "When Anna and Ben went to the park , Anna gave the ball to Ben . Then Ben thanked Anna ."
    marks = concepts.label(text.split())
    columns = {concept.name: i for i, concept in enumerate(concepts.CONCEPTS)}

    def where(name: str) -> list[int]:
        return np.flatnonzero(marks[:, columns[name]]).tolist()

    assert where("woman") == [1, 9, 19]
    assert where("giver") == [9]
    assert where("recipient") == [14]
    assert where("to_place") == [5]
    assert where("to_recipient") == [13]
    assert where("the_before_place") == [6]
    assert where("frame_word") == [0]
    assert where("first_of_pair") == [1]
    assert where("second_of_pair") == [3]
    assert where("frame_comma") == [8]
    assert where("name_again") == [9, 14, 17, 19]
    assert where("thankful") == [17]


def test_labelled_rows(labelled):
    assert labelled.tokens.shape == labelled.valid.shape == labelled.labels.shape[:2]
    assert labelled.valid.sum() >= 100_000
    assert not labelled.labels[~labelled.valid].any()
    assert (labelled.tokens[:, 0] == world.TOKEN_ID[world.BOS]).all()
    again = concepts.labelled(100_000, seed=3)
    np.testing.assert_array_equal(again.tokens, labelled.tokens)
    np.testing.assert_array_equal(again.labels, labelled.labels)


# ---- the tokenizer


@pytest.mark.parametrize("split", SPLITS)
def test_tokenizer_agrees_with_the_generator_and_round_trips(bundled, split):
    _, tokenizer = bundled
    for words in language.documents(300, 6, split):
        text = world.detokenize(words)
        ids = tokenizer.encode(text)
        assert ids == [world.TOKEN_ID[word] for word in (world.BOS, *words)]
        assert tokenizer.decode(ids[1:]) == text


def test_tokenizer_knows_its_marks(bundled):
    _, tokenizer = bundled
    assert tokenizer.bos_token_id == world.TOKEN_ID[world.BOS]
    assert tokenizer.eos_token_id == world.TOKEN_ID[world.EOS]
    assert tokenizer.encode("Ben", add_special_tokens=False) == [world.TOKEN_ID["Ben"]]
    assert tokenizer.encode("Ben zebra", add_special_tokens=False)[1] == world.TOKEN_ID[world.UNKNOWN]


def test_shipped_tokenizer_is_the_one_the_code_writes(tmp_path: Path):
    write_tokenizer(tmp_path, language.CONTEXT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text("utf-8") == (tiny.folder() / name).read_text("utf-8")


# ---- the model


def test_package_data_is_small():
    assert sum(file.stat().st_size for file in tiny.folder().iterdir()) < 4e6


def test_shipped_weights_reach_the_card(bundled):
    card = json.loads((tiny.folder() / "card.json").read_text("utf-8"))["held_out"]
    scores = evaluation.evaluate(*bundled)
    assert scores.keys() == card.keys()
    for task, score in scores.items():
        # another machine's rounding may tip a near tie, no more
        assert score == pytest.approx(card[task], abs=0.015), task
    assert min(scores[task] for task in ("indirect_object", "agreement", "country", "copying")) > 0.95
    assert scores["capital"] > 0.9


def test_core_concepts_are_measured_on_the_model(bundled):
    """The figures in the card, taken again on other documents; many concepts of both sorts are core."""
    card = json.loads((tiny.folder() / "card.json").read_text("utf-8"))
    layer = int(card["hook_point"].split(".")[1])
    again = evaluation.how_held(bundled[0], layer, n_tokens=12_000, seed=5, steps=1)
    for name, held in card["concepts"].items():
        assert again[name].common == pytest.approx(held["common"], abs=0.1), name
        if held["direction_f1"] > 0.95:
            assert again[name].direction_f1 > 0.85, name
    core = [concept for concept in concepts.CONCEPTS if concept.name in tiny.core_concepts()]
    assert len(core) >= 40
    assert sum(concept.contextual for concept in core) >= len(core) / 3
    # one direction and readability are different things: what the model knows, it need not hold as one direction
    assert (
        card["concepts"]["recipient"]["probe_f1"]
        > 0.95
        > 0.85
        > card["concepts"]["recipient"]["direction_f1"]
    )


def test_evaluation_can_tell_an_untrained_model(bundled):
    model = training.Model(training.ModelArgs.from_dict(training.Recipe().config()))
    scores = evaluation.evaluate(model, bundled[1], n=50)
    assert all(scores[task] < 0.3 for task in language.FORCED)
    assert 0.2 < scores["agreement"] < 0.8


def test_it_writes_its_language(bundled):
    from mlx_lm import generate

    said = generate(
        *bundled, prompt="When Anna and Ben went to the park, Anna gave the ball to", max_tokens=2
    )
    assert said.strip() == "Ben."


def test_a_short_training_learns_and_repeats_itself():
    recipe = training.Recipe(
        seed=1, steps=12, batch=8, warm_up=4, d_model=32, layers=2, heads=2, d_mlp=64, learning_rate=3e-2
    )

    def run() -> list[float]:
        losses: list[float] = []
        training.train(recipe, lambda _, loss: losses.append(loss))
        return losses

    first = run()
    assert first == run()
    assert first[0] > 4.5
    assert first[-1] < first[0] - 1


def test_the_command_writes_a_model_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from mlx_lm.utils import load

    quick = functools.partial(evaluation.how_held, n_tokens=2000, steps=5)
    monkeypatch.setattr(training, "how_held", quick)
    training.main(
        f"--out {tmp_path / 'm'} --steps 2 --batch 2 --d-model 32 --layers 2 --heads 2 --d-mlp 32".split()
    )
    assert "held-out documents" in capsys.readouterr().out
    model, tokenizer = load(str(tmp_path / "m"))[:2]
    weights = mx.load(str(tmp_path / "m" / "model.safetensors"))
    assert {str(weight.dtype) for weight in weights.values()} == {"mlx.core.float16"}
    assert model(mx.array([tokenizer.encode("Anna has a red ball")])).shape == (1, 6, len(world.VOCABULARY))
    card = json.loads((tmp_path / "m" / "card.json").read_text("utf-8"))
    assert card["recipe"]["steps"] == 2
    assert set(card["held_out"]) == {*language.TASKS, "loss"}
    assert set(card["concepts"]) == {concept.name for concept in concepts.CONCEPTS}
    assert (tmp_path / "m" / "MODEL_CARD.md").read_text("utf-8").startswith("# The tiny language model")
