"""Generate text, edits included, by mlx-lm's own loop and KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from .families import resolve
from .hook_point import ByPoint, Point
from .hooks import Edits, Hooks, checked
from .interventions import Positions, check_positions, place
from .language_model import LanguageModel


class GeneratedToken(NamedTuple):
    """One step of `stream_generate`."""

    text: str  # what it adds to the text; may be empty while a character is incomplete
    token: int
    logprobs: mx.array  # [vocab], natural log, before temperature
    recorded: ByPoint[Any] = ByPoint()  # what `record` asked for, at this token


def _sampler(temperature: float, seed: int | None) -> Callable[[mx.array], mx.array]:
    if temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    if seed is None:
        return lambda logprobs: mx.random.categorical(logprobs / temperature)
    key = mx.random.key(seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        return mx.random.categorical(logprobs / temperature, key=now)

    return sample


def stream_generate(
    lm: LanguageModel,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int,
    edits: Edits | None = None,
    positions: Positions = "all",
    record: Mapping[Any, Callable[[mx.array], Any]] | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    prefill_step_size: int = 2048,
) -> Iterator[GeneratedToken]:
    """Yield the continuation of `prompt` token by token.

    Parameters
    ----------
    lm : LanguageModel
    prompt : str or token ids [t]
        BOS is put before text where the tokenizer has one; ids are taken as they are.
    max_tokens : int
        Stop after so many tokens, or at an end-of-text token, which is not yielded.
    edits : {hook point: function}, optional
        As for `splice`. A function gets whole chunks of the prompt at first and single tokens later.
    positions : "all", "prompt", "generated" or list of int
        At which tokens the edits act, where an edit does not say so itself (`interventions.at`). "generated"
        are the tokens that the model wrote itself, so the first new token is still chosen without the edit;
        [-1] is the last token of the prompt.
    record : {hook point: function}, optional
        What to make of the (edited) activation [1, 1, d] of each new token, such as `sae.encode`: arrays in any
        tuples, lists and dicts, computed along with the next token. They come as `recorded` of that token.
    temperature : float
        0 takes the likeliest token; otherwise samples from softmax(logits / temperature).
    seed : int, optional
        Makes sampling repeatable without touching MLX's global random state.
    prefill_step_size : int
        Tokens of the prompt that go through the model at once.

    Between two tokens the model is unedited: the caller may use it for something else.

    Raises
    ------
    ValueError
        An empty prompt, max_tokens or prefill_step_size < 1, a negative temperature, unknown positions or hook
        points, a model without a tokenizer.
    """
    ids = lm.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = ids if isinstance(ids, mx.array) else mx.array([int(i) for i in ids], dtype=mx.int32)
    if tokens.ndim != 1 or tokens.size == 0:
        raise ValueError(f"[generate] prompt must hold at least one token but has shape {tokens.shape}.")
    if max_tokens < 1:
        raise ValueError(f"[generate] max_tokens must be at least 1 but got {max_tokens}.")
    if prefill_step_size < 1:
        raise ValueError(f"[generate] prefill_step_size must be at least 1 but got {prefill_step_size}.")
    if lm.tokenizer is None:
        raise ValueError(f"[generate] {lm.name or 'this model'} must have a tokenizer for text.")
    if not temperature >= 0:
        raise ValueError(f"[generate] temperature must be >= 0 but got {temperature}.")
    check_positions(positions, tokens.size)
    placed = {spec: place(edit, [tokens.size], positions) for spec, edit in (edits or {}).items()}
    edits = checked(lm.model, placed)
    parsed = {resolve(lm.model, spec): fn for spec, fn in (record or {}).items()}
    return _stream(lm, tokens, max_tokens, edits, parsed, _sampler(temperature, seed), prefill_step_size)


def _stream(
    lm: LanguageModel,
    tokens: mx.array,
    max_tokens: int,
    edits: Edits,
    record: dict[Point, Callable[[mx.array], Any]],
    sampler: Callable[[mx.array], mx.array],
    prefill_step_size: int,
) -> Iterator[GeneratedToken]:
    from mlx_lm.generate import generate_step

    recorded: dict[Point, Any] = {}

    def keep(point: Point, fn: Callable[[mx.array], Any], x: mx.array) -> mx.array:
        if x.shape[-2] == 1:  # a token at a time; the prompt comes in chunks
            recorded[point] = fn(x)
        return x

    edited = Hooks(lm.model, edits)
    watched = Hooks(lm.model, {point: partial(keep, point, fn) for point, fn in record.items()})
    steps = generate_step(
        tokens, lm.model, max_tokens=max_tokens, sampler=sampler, prefill_step_size=prefill_step_size
    )
    detokenizer, eos = lm.tokenizer.detokenizer, lm.eos_ids
    pending: tuple[int, mx.array, ByPoint[Any]] | None = None
    with edited.worn(), watched.worn():
        try:
            while True:
                with (
                    edited.active(),
                    watched.active(),
                ):  # only while the loop itself runs, never across a yield
                    step = next(steps, None)
                if step is None or int(step[0]) in eos:
                    break
                # The loop is one step ahead: it has just sent this very token through the model.
                here = ByPoint(recorded)
                if here:
                    mx.async_eval(list(here.values()))
                if pending is not None:
                    yield GeneratedToken(detokenizer.last_segment, *pending)
                pending = (int(step[0]), step[1], here)
                detokenizer.add_token(pending[0])
            if pending is not None:
                detokenizer.finalize()
                yield GeneratedToken(detokenizer.last_segment, *pending)
        finally:
            steps.close()


def generate(
    lm: LanguageModel,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int,
    edits: Edits | None = None,
    positions: Positions = "all",
    temperature: float = 0.0,
    seed: int | None = None,
    prefill_step_size: int = 2048,
) -> str:
    """The continuation of `prompt`, without the prompt. Arguments as for `stream_generate`."""
    return "".join(
        token.text
        for token in stream_generate(
            lm,
            prompt,
            max_tokens=max_tokens,
            edits=edits,
            positions=positions,
            temperature=temperature,
            seed=seed,
            prefill_step_size=prefill_step_size,
        )
    )
