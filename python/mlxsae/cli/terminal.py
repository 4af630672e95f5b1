"""Text for terminals: tables, and tokens coloured by activation."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TextIO

# Light to strong, as 256-colour backgrounds with a foreground that reads on each.
_HEAT = ((223, 16), (216, 16), (209, 16), (202, 16), (166, 231))


def has_colour(stream: TextIO | None = None) -> bool:
    """Whether to colour: a terminal that can, and no ``NO_COLOR`` (no-color.org); ``FORCE_COLOR`` overrules a pipe."""
    out = stream or sys.stdout
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return out.isatty() and os.environ.get("TERM") != "dumb"


def bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def dim(text: str, colour: bool) -> str:
    return f"\x1b[2m{text}\x1b[0m" if colour else text


def width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def clean(text: str) -> str:
    """``text`` without control characters: what a model or a file says must not steer the terminal."""
    return "".join(
        "\N{RETURN SYMBOL}"
        if c == "\n"
        else "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) == "Cc"
        else c
        for c in text
    )


def table(rows: Iterable[Sequence[object]], *, head: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Rows in aligned columns, a rule under the head, the columns ``right`` flush right."""
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    every = ([list(head)] if head else []) + cells
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))]
    lines = [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in every
    ]
    if head:
        lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def highlight(
    pieces: Sequence[str],
    activations: Sequence[float],
    maximum: float,
    colour: bool,
    *,
    around: int,
    room: int,
) -> str:
    """The tokens near position ``around``, each on a background as strong as its activation, in at most ``room``
    columns; without colour, «quoted» where the feature fires."""
    marks = [0.0 if maximum <= 0 else min(float(a) / maximum, 1.0) for a in activations]
    shown = [clean(p) for p in pieces]

    def size(i: int) -> int:
        return len(shown[i]) + (0 if colour or marks[i] <= 0 else 2)

    first, last = around, around + 1
    taken = size(around)
    # Two tokens to the left for one to the right: what a feature reads stands before it.
    while first > 0 or last < len(shown):
        left = first > 0 and ((around - first) <= 2 * (last - around) or last == len(shown))
        i = first - 1 if left else last
        if taken + size(i) > room:
            break
        taken += size(i)
        first, last = (first - 1, last) if left else (first, last + 1)
    parts = []
    for i in range(first, last):
        if marks[i] <= 0:
            parts.append(shown[i])
        elif colour:
            back, fore = _HEAT[min(int(marks[i] * len(_HEAT)), len(_HEAT) - 1)]
            parts.append(f"\x1b[48;5;{back}m\x1b[38;5;{fore}m{shown[i]}\x1b[0m")
        else:
            space = shown[i][: len(shown[i]) - len(shown[i].lstrip(" "))]
            parts.append(f"{space}«{shown[i].lstrip(' ')}»")
    return ("…" if first else "") + "".join(parts).strip() + ("…" if last < len(shown) else "")


def metrics_table(metrics: dict[str, float]) -> str:
    """The final table: what was measured, how much, in what unit."""
    rows = [
        (label, shown(metrics[key]))
        for key, label, shown in (
            ("l0", "L0 (latents that fire per token)", "{:.2f}".format),
            ("fvu", "FVU (fraction of variance unexplained)", "{:.5f}".format),
            ("explained_variance", "explained variance", "{:.5f}".format),
            ("dead_fraction", "dead latents (never fired on these tokens)", "{:.2%}".format),
            ("loss_recovered_zero", "loss recovered, against zero ablation", "{:.4f}".format),
            ("loss_recovered_mean", "loss recovered, against mean ablation", "{:.4f}".format),
            ("ce_clean", "cross entropy, clean (nats per token)", "{:.4f}".format),
            ("ce_sae", "cross entropy, SAE spliced in", "{:.4f}".format),
            ("ce_zero", "cross entropy, zero ablation", "{:.4f}".format),
            ("ce_mean", "cross entropy, mean ablation", "{:.4f}".format),
            ("n_tokens", "held-out tokens", "{:,}".format),
            ("train_tokens", "training tokens", "{:,}".format),
            ("train_seconds", "training time (s)", "{:.1f}".format),
            ("tokens_per_s", "training tokens per second", "{:,.0f}".format),
        )
        if key in metrics
    ]
    return table(rows, head=("metric", "value"), right=(1,))
