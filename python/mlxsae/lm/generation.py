"""Generate text, edits included, by mlx-lm's own loop and KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from .hook_point import HookPoint
from .hooks import Edit, Edits, splice
from .language_model import LanguageModel

Positions = str | Sequence[int]


class GeneratedToken(NamedTuple):
    """One step of `stream_generate`."""

    text: str  # what it adds to the text; may be empty while a character is incomplete
    token: int
    logprobs: mx.array  # [vocab], natural log, before temperature


def _chosen(positions: Positions, n_prompt: int) -> Callable[[int], bool]:
    """Whether the token at a position (counted from 0, BOS included) is to be edited."""
    if isinstance(positions, str):
        match positions:
            case "all":
                return lambda position: True
            case "prompt":
                return lambda position: position < n_prompt
            case "generated":
                return lambda position: position >= n_prompt
        raise ValueError(
            "[generate] positions must be 'all', 'prompt', 'generated' or a list of int "
            f"but got {positions!r}."
        )
    wanted = set()
    for position in positions:
        if isinstance(position, bool) or not isinstance(position, int) or position < -n_prompt:
            raise ValueError(
                f"[generate] a position must be an int >= {-n_prompt} (the prompt has {n_prompt} tokens) "
                f"but got {position!r}."
            )
        wanted.add(position if position >= 0 else n_prompt + position)
    return lambda position: position in wanted


def _positioned(edit: Edit, chosen: Callable[[int], bool]) -> Edit:
    """`edit` at the chosen positions of a sequence that arrives in chunks [b, t, d], call after call."""
    seen = 0

    def fn(x: mx.array) -> mx.array:
        nonlocal seen
        here = [chosen(seen + i) for i in range(x.shape[1])]
        seen += x.shape[1]
        if not any(here):
            return x
        if all(here):
            return edit(x)
        return mx.where(mx.array(here)[None, :, None], edit(x).astype(x.dtype), x)

    return fn


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
        At which tokens the edits act. "generated" are the tokens that the model wrote itself, so the first
        new token is still chosen without the edit; [-1] is the last token of the prompt.
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
        An empty prompt, max_tokens < 1, a negative temperature, unknown positions or hook points.
    """
    ids = lm.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = ids if isinstance(ids, mx.array) else mx.array(list(ids), dtype=mx.int32)
    if tokens.ndim != 1 or tokens.size == 0:
        raise ValueError(f"[generate] prompt must hold at least one token but has shape {tokens.shape}.")
    if max_tokens < 1:
        raise ValueError(f"[generate] max_tokens must be at least 1 but got {max_tokens}.")
    if not temperature >= 0:
        raise ValueError(f"[generate] temperature must be >= 0 but got {temperature}.")
    chosen = _chosen(positions, tokens.size)
    parsed = {lm.hook_point(spec): edit for spec, edit in (edits or {}).items()}
    if len(parsed) < len(edits or {}):
        raise ValueError("[generate] each hook point must be given once in edits.")
    return _stream(
        lm,
        tokens,
        max_tokens,
        {hook_point: _positioned(edit, chosen) for hook_point, edit in parsed.items()},
        _sampler(temperature, seed),
        prefill_step_size,
    )


def _stream(
    lm: LanguageModel,
    tokens: mx.array,
    max_tokens: int,
    edits: dict[HookPoint, Edit],
    sampler: Callable[[mx.array], mx.array],
    prefill_step_size: int,
) -> Iterator[GeneratedToken]:
    from mlx_lm.generate import generate_step

    steps = generate_step(
        tokens, lm.model, max_tokens=max_tokens, sampler=sampler, prefill_step_size=prefill_step_size
    )
    detokenizer, eos = lm.tokenizer.detokenizer, lm.eos_ids
    pending: tuple[int, mx.array] | None = None
    try:
        while True:
            with splice(lm.model, edits):  # only while the loop itself runs, never across a yield
                step = next(steps, None)
            if step is None or int(step[0]) in eos:
                break
            if pending is not None:
                yield GeneratedToken(detokenizer.last_segment, *pending)
            pending = (int(step[0]), step[1])
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
        )
    )
