"""Reports: escaping, plots, the demo's page, and a look at it in a real browser."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
import xml.etree.ElementTree as ET
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mlxsae.cli import terminal
from mlxsae.report import (
    ConceptRow,
    DemoResults,
    FeatureCard,
    ShownExample,
    SteeredText,
    bar_chart,
    demo_page,
    feature_card,
    highlighted,
    histogram,
    line_plot,
    share_detected,
)
from mlxsae.report.html import Markup, element, page, table

EVIL = "<script>alert('x')</script>\"&"


def svg(markup: str) -> ET.Element:
    return ET.fromstring(markup)


def results(note: str = "a note") -> DemoResults:
    history = [
        {"tokens": 1000 * i, "fvu": 1 / i, "dead_fraction": 0.01 * i, "loss": 1 / i, "step": i}
        for i in range(1, 30)
    ]
    example = ShownExample(["Anna", " gave", " the", " ball", "."], [0.0, 2.0, 0.5, 0.0, 0.0])
    cards = [FeatureCard(i, note, [f"Fact {note}"], [(note, 1.5)], [example] * 3, 2.0) for i in range(10)]
    concepts = [ConceptRow(f"concept_{i}", note, i, 0.5, 1 - i / 50, 0.9, 0.8, 100) for i in range(45)]
    concepts.append(ConceptRow("rare", note, None, 0, 0, 0, 0, 2))
    metrics = {
        "fvu": 0.0123,
        "loss_recovered_mean": 0.987,
        "loss_recovered_zero": 0.99,
        "l0": 8.0,
        "dead_fraction": 0.001,
        "n_tokens": 60000,
    }
    steered = SteeredText(7, note, 3.0, 1.5, "here", "Cairo is", " the capital", " in Africa")
    rates = np.random.default_rng(0).lognormal(-5, 1.5, 1024)
    return DemoResults(
        "tiny", "blocks.1", metrics, history, rates, cards, concepts, steered, [("seed", note)]
    )


class _Checker(HTMLParser):
    """Well-formedness, ids, and everything that a browser would fetch."""

    VOID = frozenset(("meta", "br", "hr"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.links.append(value)
            assert not name.startswith("on"), name

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_everything_is_escaped() -> None:
    text = demo_page(results(EVIL))
    assert "<script" not in text
    assert EVIL not in text
    assert "&lt;script&gt;" in text
    assert element("p", EVIL, title=EVIL) == (
        '<p title="&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;">'
        "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;</p>"
    )
    assert element("p", Markup("<b>"), element("i"), hidden=True, id=None, class_="a") == (
        '<p hidden class="a"><b><i></i></p>'
    )
    assert "<script" not in bar_chart([(EVIL, 0.5)], title=EVIL)
    assert "<script" not in line_plot({EVIL: ([1, 2], [1, 2])}, title=EVIL, x_label=EVIL)


def test_the_page_is_whole_and_asks_for_nothing() -> None:
    text = demo_page(results())
    checker = _Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert "script" not in checker.tags
    assert all(link.startswith("#") and link[1:] in checker.ids for link in checker.links)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    assert text.startswith("<!doctype html>")
    assert '<html lang="en">' in text
    for figure in ("0.0123", "0.9870", "0.9900", "0.10%", "11% of 46", "60,000", "too rare"):
        assert figure in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_share_counts_what_is_too_rare_as_not_detected() -> None:
    concepts = results().concepts
    assert share_detected(concepts) == sum(c.f1 > 0.9 for c in concepts) / 46
    assert share_detected([]) == 0


def test_no_steering_is_said() -> None:
    assert "No feature was found" in demo_page(results()._replace(steered=None))


def test_highlighting_is_as_strong_as_the_activation() -> None:
    example = ShownExample(["a", " b", " c", "d"], [0.0, 1.0, 4.0, 9.0])
    html = highlighted(example, 4.0)
    assert re.findall(r"--a:([\d.]+)", html) == ["0.25", "1.00", "1.00"]
    assert re.sub(r"<[^>]+>", "", html) == "a b cd"
    assert html.count('class="peak"') == 1
    assert highlighted(ShownExample(["x"], [1.0]), 0.0) == "<span><span>x</span></span>"
    assert 'id="feature-5"' in feature_card(FeatureCard(5, "t", [], [], [], 1.0))


def test_tokens_of_which_nothing_shows_are_marked_all_the_same() -> None:
    """A browser draws no mark around a line break, and runs spaces together."""
    pieces = ["a", "\n", " ", "\t", "\u200b", "  b", "\n", " c"]
    example = ShownExample(pieces, [0.0, 4.0, 1.0, 1.0, 1.0, 1.0, 0.0, float("nan")])
    html = highlighted(example, 4.0)
    marked = [unescape(m) for m in re.findall(r"<mark[^>]*>([^<]*)</mark>", html)]
    assert marked == [r"'\n'", "' '", r"'\t'", r"'\u200b'", "b", "c"]
    assert re.findall(r"--a:([^\"]+)", html) == ["1.00", "0.25", "0.25", "0.25", "0.25", "1.00"]
    assert html.count('class="peak"') == 1
    assert '<mark style="--a:1.00" title="4.00" class="peak">' in html
    assert "<span>\n</span>" in html
    card = feature_card(FeatureCard(5, "t", [], [("\u05d0", 1.5), ("\n", 0.5), (" x", -0.1)], [example], 4.0))
    chips = re.findall(r'class="chip"><bdi>([^<]*)</bdi>([^<]*)<', card)  # a number stays behind Hebrew
    assert [(unescape(token), gain) for token, gain in chips] == [
        ("\u05d0", " +1.5"),
        (r"'\n'", " +0.5"),
        ("x", " -0.1"),
    ]
    assert '<li dir="auto">' in card


def test_a_line_plot_goes_through_its_points() -> None:
    root = svg(line_plot({"a": ([0, 1, 2, 3], [0.0, 1.0, float("nan"), 3.0])}, title="T", x_label="x"))
    (line,) = root.findall("polyline")
    points = np.array([[float(v) for v in p.split(",")] for p in line.attrib["points"].split()])
    assert len(points) == 3  # NaN is left out
    np.testing.assert_allclose(
        np.diff(points[:, 0]), np.diff([0, 1, 3]) * (points[1, 0] - points[0, 0]), atol=0.2
    )
    assert (np.diff(points[:, 1]) < 0).all()  # up is less in SVG
    title = root.find("title")
    assert title is not None
    assert title.text == "T"
    assert root.attrib["aria-labelledby"] == title.attrib["id"]
    log = svg(line_plot({"a": ([1, 2, 3], [1e-3, 1e-2, 1e-1])}, title="T", x_label="x", log_y=True))
    ys = [float(p.split(",")[1]) for p in log.findall("polyline")[0].attrib["points"].split()]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    two = svg(line_plot({"a": ([1, 2], [1, 2]), "b": ([1, 2], [2, 1])}, title="T", x_label="x"))
    assert len(two.findall("polyline")) == 2
    assert "no data" in line_plot({"a": ([], [])}, title="T", x_label="x")
    assert "no data" in line_plot({"a": ([1], [-1])}, title="T", x_label="x", log_y=True)
    assert svg(line_plot({"a": ([5], [7])}, title="T", x_label="x")) is not None
    with pytest.raises(ValueError, match="one or two"):
        line_plot({}, title="T", x_label="x")


def ticks(root: ET.Element, anchor: str, across: str) -> list[tuple[float, float]]:
    """Value and place of each label along an axis, read off the plot."""
    size = {"k": 1e3, "M": 1e6, "G": 1e9}
    found = []
    for text in root.findall("text"):
        if text.attrib["text-anchor"] == anchor and (label := text.text or "")[-1:].isdigit() | (
            label[-1:] in size
        ):
            value = float(label[:-1]) * size[label[-1]] if label[-1] in size else float(label)
            found.append((value, float(text.attrib[across])))
    return found


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 1.0),
        (0.991, 0.9935),
        (0.1152, 0.1205),
        (1001.0, 1004.0),
        (10_000_000.0, 10_050_000.0),
        (-0.0013, 0.002),
        (0.9, 9.1),
        (7.0, 7.0),
        (1e17, 1e17),
        (0.0, 1e300),
    ],
)
def test_ticks_tell_values_apart(low: float, high: float) -> None:
    """Read off the plot, a label is the value at its place."""
    root = svg(line_plot({"a": ([low, high], [high, low])}, title="T", x_label="x"))
    for found in (ticks(root, "middle", "x"), ticks(root, "end", "y")):
        values, places = np.array(found).T
        assert len(values) == len(set(values)) >= 2
        value, place = values[0], places[0]
        scale = (places[-1] - place) / (values[-1] / 1e10 - value / 1e10)
        np.testing.assert_allclose(places, place + (values / 1e10 - value / 1e10) * scale, atol=0.2)
    (line,) = root.findall("polyline")
    if low < high:
        left, right = (float(p.split(",")[0]) for p in line.attrib["points"].split())
        values, places = np.array(ticks(root, "middle", "x")).T
        scale = (right - left) / (high / 1e10 - low / 1e10)
        np.testing.assert_allclose(places, left + (values / 1e10 - low / 1e10) * scale, atol=0.2)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0105, 0.0195), (0.011, 0.013), (1e-3, 0.5), (1e-8, 1e3), (0.5, 0.5)]
)
def test_logarithmic_ticks_are_never_missing(low: float, high: float) -> None:
    root = svg(line_plot({"a": ([1, 2], [low, high])}, title="T", x_label="x", log_y=True))
    values, places = np.array(ticks(root, "end", "y")).T
    assert len(values) == len(set(values)) >= 2
    if low < high:
        (line,) = root.findall("polyline")
        first, last = (float(p.split(",")[1]) for p in line.attrib["points"].split())
        scale = (last - first) / np.log10(high / low)
        np.testing.assert_allclose(
            places - 4, first + np.log10(values / low) * scale, atol=0.2
        )  # below its line
    assert len(ticks(svg(histogram([low, high], title="T", x_label="x", log_x=True)), "middle", "x")) >= 2


def test_one_point_is_drawn() -> None:
    """A run with one record: a line of one point shows nothing."""
    root = svg(line_plot({"a": ([1, 2], [5, float("nan")]), "b": ([1, 2], [4, 6])}, title="T", x_label="x"))
    (dot,) = root.findall("circle")
    (line,) = root.findall("polyline")
    begin, end = (tuple(map(float, p.split(","))) for p in line.attrib["points"].split())
    assert float(dot.attrib["cx"]) == begin[0]
    assert float(dot.attrib["cy"]) == pytest.approx((begin[1] + end[1]) / 2, abs=0.1)
    assert dot.attrib["class"] == "line s0"


def test_a_histogram_counts() -> None:
    values = [1.0] * 3 + [10.0] * 6 + [0.0, float("inf")]
    root = svg(histogram(values, title="T", x_label="x", bins=2, log_x=True))
    low, high = (float(r.attrib["height"]) for r in root.findall("rect"))
    assert high == pytest.approx(2 * low, rel=0.02)
    assert "no data" in histogram([], title="T", x_label="x")
    assert svg(histogram([2.0, 2.0], title="T", x_label="x")) is not None
    for equal in ([1.0, 1 + 2.3e-16, 1.0], [1e17] * 3):  # but for rounding
        (bar,) = svg(histogram(equal, title="T", x_label="x")).findall("rect")
        assert float(bar.attrib["height"]) == 260 - 12 - 34


def test_bars_are_as_long_as_their_values() -> None:
    root = svg(bar_chart([("good", 1.0), ("half", 0.5), ("none", 0.0)], title="T", mark=0.9))
    full, half, none = root.findall("rect")
    assert float(half.attrib["width"]) == pytest.approx(float(full.attrib["width"]) / 2, abs=0.1)
    assert float(none.attrib["width"]) == 0
    assert full.attrib["class"] == "bar"
    assert half.attrib["class"] == "bar low"
    long = svg(bar_chart([("w" * 60, 0.5), ("v" * 30, 0.5)], title="T")).findall("text[@class='name']")
    assert [text.text for text in long] == ["w" * 29 + "…", "v" * 30]
    with pytest.raises(ValueError, match=r"\[bar_chart\] upper must be positive but got 0"):
        bar_chart([("none", 0.0)], title="T", upper=0.0)


def test_tables_name_their_rows() -> None:
    html = table(("name", "n"), [("a", 1)], caption="C", numeric=(1,))
    assert '<th scope="row">a</th><td class="num">1</td>' in html
    assert 'tabindex="0"' in html
    assert "<title>T</title>" in page("T")


def test_terminal_highlighting_fits_and_cannot_steer_the_terminal() -> None:
    pieces = [" word"] * 50
    activations = [0.0] * 50
    activations[25] = 3.0
    plain = terminal.highlight(pieces, activations, 3.0, False, around=25, room=40)
    assert "«word»" in plain
    assert plain.startswith("…")
    assert plain.endswith("…")
    assert len(plain) <= 40 + 2
    coloured = terminal.highlight(pieces, activations, 3.0, True, around=25, room=40)
    assert "\x1b[48;5;" in coloured
    evil = terminal.highlight(["\x1b[2J\a", "\n"], [0.0, 0.0], 1.0, False, around=0, room=40)
    assert "\x1b" not in evil
    assert "\a" not in evil
    assert "\x1b" not in terminal.table([("\x1b[31mred", 1)])


def test_colour_respects_the_user(monkeypatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.has_colour(Terminal())  # type: ignore[arg-type]
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.has_colour(Terminal())  # type: ignore[arg-type]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert terminal.has_colour(Terminal())  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.has_colour(Terminal())  # type: ignore[arg-type]


def _browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium here to look at the page with")


def _browse(profile: Path, *arguments: str) -> str:
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
    )
    command = [_browser(), *quiet.split(), f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_in_a_real_browser(tmp_path: Path) -> None:
    """The page draws, fits a phone without sideways scrolling, and makes no request but for itself."""
    _browser()
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "report.html").write_text(demo_page(results()), encoding="utf-8")
    # A page of the same origin looks into the report, which itself runs no script.
    (folder / "look.html").write_text(
        "<!doctype html><iframe id=f src=report.html style='width:360px;height:700px;border:0'></iframe>"
        "<pre id=out></pre><script>f.onload=()=>{const d=f.contentDocument,r=d.documentElement;"
        "const b=[...d.querySelectorAll('svg')].map(s=>s.getBoundingClientRect());"
        "out.textContent=JSON.stringify({wide:r.scrollWidth,plots:b.length,"
        "drawn:b.every(q=>q.width>100&&q.height>50),cards:d.querySelectorAll('article').length,"
        "ground:getComputedStyle(d.body).backgroundColor,fetched:performance.getEntriesByType('resource').length,"
        "inner:f.contentWindow.performance.getEntriesByType('resource').length})}</script>"
    )
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}/look.html"
        dom = _browse(tmp_path / "p1", "--virtual-time-budget=5000", "--dump-dom", at)
        server.shutdown()
    found = re.search(r'<pre id="out">(\{.*?\})</pre>', dom)
    assert found, dom[-2000:]
    facts = json.loads(found[1])
    assert facts["wide"] <= 360
    assert facts["plots"] == 4
    assert facts["drawn"]
    assert facts["cards"] == 10
    assert facts["inner"] == 0
    assert facts["ground"] == "rgb(251, 250, 247)"  # the style sheet took effect
    assert set(asked) <= {"/look.html", "/report.html", "/favicon.ico"}
