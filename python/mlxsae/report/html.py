"""Small pieces of HTML. Every function takes values and returns a string; all text is escaped here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

# Nothing may be loaded from anywhere, and no script runs: the page is what the file holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Markup(str):
    """A string that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """``value`` as HTML: escaped, unless it is :class:`Markup`."""
    return value if isinstance(value, Markup) else Markup(escape(str(value), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Markup:
    return Markup(separator.join(text(part) for part in parts))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """``<tag ...>children</tag>``. ``_`` in names is ``-``, a last one is dropped (``class_``); None and False leave an
    attribute out, True gives it no value."""
    written = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        written.append(f" {name}" if value is True else f' {name}="{escape(str(value), quote=True)}"')
    opening = f"<{tag}{''.join(written)}>"
    return Markup(opening if tag in ("meta", "br", "hr") else f"{opening}{join(children)}</{tag}>")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str,
    numeric: Sequence[int] = (),
) -> Markup:
    """A table whose first column names its rows; ``numeric`` columns are set flush right. Scrolls sideways by itself."""

    def of(i: int) -> str | None:
        return "num" if i in numeric else None

    head = element("tr", *(element("th", c, scope="col", class_=of(i)) for i, c in enumerate(columns)))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row", class_=of(0)),
            *(element("td", cell, class_=of(i)) for i, cell in enumerate(row[1:], 1)),
        )
        for row in rows
    ]
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    # Focusable, or a keyboard could not scroll it.
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def section(title: str, *children: object, anchor: str) -> Markup:
    heading = element("h2", title, id=f"{anchor}-title")
    return element("section", heading, *children, id=anchor, aria_labelledby=f"{anchor}-title")


def figure(image: Markup, caption: object, *, narrow: bool = False) -> Markup:
    return element("figure", image, element("figcaption", caption), class_="narrow" if narrow else None)


def details(summary: object, *children: object, open: bool = False) -> Markup:
    return element("details", element("summary", summary), *children, open=open)


def page(title: str, *sections: Markup, contents: Sequence[tuple[str, str]] = ()) -> str:
    """A whole document: ``contents`` are (anchor, title) for the list of links at its head."""
    style = files("mlxsae.report").joinpath("style.css").read_text(encoding="utf-8")
    links = [element("li", element("a", name, href=f"#{anchor}")) for anchor, name in contents]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("h1", title), element("nav", element("ul", *links), aria_label="Contents")),
        element("main", *sections, id="content", tabindex=-1),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"
