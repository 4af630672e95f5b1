"""Plots as inline SVG: lines, histograms, bars. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np

from mlxsae.report.html import Markup, element

_WIDTH, _HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34
_ids = count()


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    log_y: bool = False,
) -> Markup:
    """Curves ``{name: (x, y)}``, two at most, over one pair of axes. Points that are not finite (or, with ``log_y``, not
    positive) are left out."""
    if not 0 < len(series) <= 2:
        raise ValueError(f"[line_plot] series must be one or two but got {len(series)}.")
    curves = {}
    for name, (x, y) in series.items():
        xs, ys = np.asarray(x, float), np.asarray(y, float)
        keep = np.isfinite(xs) & np.isfinite(ys) & ((ys > 0) | (not log_y))
        curves[name] = xs[keep], np.log10(ys[keep]) if log_y else ys[keep]
    everything = [np.concatenate([c[i] for c in curves.values()]) for i in (0, 1)]
    if not len(everything[0]):
        return _frame(title, [_label(_WIDTH / 2, _HEIGHT / 2, "no data", "middle")])
    to_x, x_ticks = _axis(everything[0], _LEFT, _WIDTH - _RIGHT, log=False)
    to_y, y_ticks = _axis(everything[1], _HEIGHT - _BOTTOM, _TOP, log=log_y)
    parts = [*_grid(to_x, x_ticks, to_y, y_ticks, x_label)]
    for i, (name, (x, y)) in enumerate(curves.items()):
        places = [(f"{to_x(a):.1f}", f"{to_y(b):.1f}") for a, b in zip(x, y, strict=True)]
        if len(places) == 1:  # a line of one point is not drawn
            parts.append(element("circle", cx=places[0][0], cy=places[0][1], r=2, class_=f"line s{i}"))
        else:
            points = " ".join(map(",".join, places))
            parts.append(element("polyline", points=points, class_=f"line s{i}"))
        if len(curves) > 1:
            y0 = _TOP + 8 + 16 * i
            parts.append(element("line", x1=_WIDTH - 150, x2=_WIDTH - 130, y1=y0, y2=y0, class_=f"line s{i}"))
            parts.append(_label(_WIDTH - 124, y0 + 4, _cut(name, 20)))
    return _frame(title, parts)


def histogram(
    values: Sequence[float] | np.ndarray, *, title: str, x_label: str, bins: int = 40, log_x: bool = False
) -> Markup:
    """How many of ``values`` fall into each of ``bins`` equal intervals (of their log10 with ``log_x``, which leaves out
    what is not positive)."""
    v = np.asarray(values, float)
    v = v[np.isfinite(v) & ((v > 0) | (not log_x))]
    if not len(v):
        return _frame(title, [_label(_WIDTH / 2, _HEIGHT / 2, "no data", "middle")])
    v = np.log10(v) if log_x else v
    counts, edges = np.histogram(v, bins=bins, range=_extent(v, log_x))
    to_x, x_ticks = _axis(edges, _LEFT, _WIDTH - _RIGHT, log=log_x)
    to_y, y_ticks = _axis(np.array([0, counts.max()]), _HEIGHT - _BOTTOM, _TOP, log=False)
    bars = [
        element(
            "rect",
            x=f"{to_x(a):.1f}",
            y=f"{to_y(c):.1f}",
            width=f"{max(to_x(b) - to_x(a) - 1, 0.5):.1f}",
            height=f"{to_y(0) - to_y(c):.1f}",
            class_="bar",
        )
        for c, a, b in zip(counts, edges[:-1], edges[1:], strict=True)
        if c
    ]
    return _frame(title, [*_grid(to_x, x_ticks, to_y, y_ticks, x_label), *bars])


def bar_chart(
    bars: Sequence[tuple[str, float]], *, title: str, mark: float | None = None, upper: float = 1.0
) -> Markup:
    """Horizontal bars from 0 to ``upper``, a name before each; those below ``mark`` are drawn fainter."""
    if not upper > 0:
        raise ValueError(f"[bar_chart] upper must be positive but got {upper}.")
    row, left = 17, 190
    height = row * len(bars) + 30

    def to_x(value: float) -> float:
        return left + (_WIDTH - left - 40) * max(0.0, min(value / upper, 1.0))

    parts = []
    for tick in (0.0, upper / 2, upper):
        parts.append(element("line", x1=to_x(tick), x2=to_x(tick), y1=4, y2=height - 22, class_="grid"))
        parts.append(_label(to_x(tick), height - 8, f"{tick:g}", "middle"))
    for i, (name, value) in enumerate(bars):
        y = 6 + row * i
        low = mark is not None and value < mark
        parts.append(_label(left - 6, y + 10, _cut(name, 30), "end", class_="name"))
        parts.append(
            element(
                "rect",
                x=left,
                y=y,
                width=f"{to_x(value) - left:.1f}",
                height=row - 5,
                class_="bar low" if low else "bar",
            )
        )
        parts.append(_label(to_x(value) + 4, y + 10, f"{value:.2f}"))
    if mark is not None:
        parts.append(element("line", x1=to_x(mark), x2=to_x(mark), y1=0, y2=height - 20, class_="mark"))
    return _frame(title, parts, height)


def _frame(title: str, parts: Sequence[Markup], height: int = _HEIGHT) -> Markup:
    name = f"plot-{next(_ids)}"
    return element(
        "svg",
        element("title", title, id=name),
        *parts,
        viewBox=f"0 0 {_WIDTH} {height}",
        role="img",
        aria_labelledby=name,
    )


def _label(x: float, y: float, label: str, anchor: str = "start", class_: str | None = None) -> Markup:
    return element("text", label, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def _cut(name: str, most: int) -> str:
    """What there is room for: a plot's edge would cut it off as if that were all."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _grid(to_x, x_ticks, to_y, y_ticks, x_label: str) -> list[Markup]:  # type: ignore[no-untyped-def]
    parts = []
    for value, name in y_ticks:
        y = f"{to_y(value):.1f}"
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(_label(_LEFT - 6, to_y(value) + 4, name, "end"))
    parts += [_label(to_x(v), _HEIGHT - _BOTTOM + 15, name, "middle") for v, name in x_ticks]
    parts.append(_label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, x_label, "middle"))
    return parts


def _axis(values: np.ndarray, begin: float, end: float, *, log: bool):  # type: ignore[no-untyped-def]
    """A map from data to pixels and labelled ticks. With ``log`` the data are exponents of ten."""
    low, high = _extent(values, log)
    if log and high - low < 3:  # within three decades: 1, 2 and 5 of each
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [t for d in decades for m in (1, 2, 5) if low <= (t := d + math.log10(m)) <= high]
        if len(ticks) < 2:  # within one of these steps
            ticks = [math.log10(t) for t in _steps(10**low, 10**high)]
    elif log:
        ticks = _multiples(low, high, max(1.0, _nice((high - low) / 4)))
    else:
        ticks = _steps(low, high)
    named = list(zip(ticks, _names([10**t for t in ticks] if log else ticks), strict=True))

    def to(value: float) -> float:
        return begin + (end - begin) * (value - low) / (high - low)

    return to, named


def _extent(values: np.ndarray, log: bool) -> tuple[float, float]:
    """Lowest and highest, apart where the values are all but equal."""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-12 * max(abs(low), abs(high), 1.0):
        room = 0.5 if log else max(0.5, abs(high) / 2)
        low, high = low - room, high + room
    return low, high


def _multiples(low: float, high: float, step: float) -> list[float]:
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _steps(low: float, high: float) -> list[float]:
    """At least two ticks, about four."""
    few = _multiples(low, high, _nice((high - low) / 4))
    return few if len(few) > 1 else _multiples(low, high, _nice((high - low) / 8))


def _nice(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _names(values: Sequence[float]) -> list[str]:
    """Each in as few digits as tell them all apart."""
    each = ([_short(v, more) for v in values] for more in range(15))
    return next((names for names in each if len(set(names)) == len(names)), list(map(str, values)))


def _short(value: float, more: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:.{3 + more}g}{letter}"
    return f"{value:.{(2 if abs(value) < 1 else 3) + more}g}"
