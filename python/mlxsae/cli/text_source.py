"""Text of a dataset as token batches, the same ones each time they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlxsae.lm import Documents, LanguageModel, TokenBatch, token_batches

DEFAULT_CONTEXT = 256


@dataclass(frozen=True)
class TextSource:
    """Documents cut into rows of ``context_size``, a share of them held out by a hash of their text."""

    lm: LanguageModel
    texts: Documents
    context_size: int
    batch_size: int
    heldout_fraction: float

    def train(self, max_tokens: int, seed: int) -> Iterator[TokenBatch]:
        """Exactly ``max_tokens`` tokens, walking through the documents as often as it takes, shuffled anew each time."""
        return token_batches(
            self.lm,
            self.texts,
            context_size=self.context_size,
            batch_size=self.batch_size,
            max_tokens=max_tokens,
            split="train",
            heldout_fraction=self.heldout_fraction,
            seed=seed,
            epochs=None,
        )

    def heldout(self, max_tokens: int, *, split: str | None = "heldout") -> Iterator[TokenBatch]:
        """At most ``max_tokens`` tokens of the documents held out (of all with ``split=None``), in their order."""
        return token_batches(
            self.lm,
            self.texts,
            context_size=self.context_size,
            batch_size=self.batch_size,
            max_tokens=max_tokens,
            split=split,
            heldout_fraction=self.heldout_fraction,
        )


def default_context(lm: LanguageModel) -> int:
    """The model's context where its config states one, at most 256 tokens."""
    return min(DEFAULT_CONTEXT, lm.context_size or DEFAULT_CONTEXT)
