"""C++ tokens of preprocessed MSL: each carries the blank text before it, so that text and line numbers survive rewriting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import FrontEndError

_TOKEN = re.compile(
    r"""(?P<blank>\s+|^\#[^\n]*|//[^\n]*|/\*.*?\*/)
      | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<name>[A-Za-z_]\w*)
      | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
      | (?P<mark>::|->|<<=|<<|[-+*/%&|^!=<>]=|&&|\|\||\+\+|--|.)""",
    re.S | re.M | re.X,
)
_MARKER = re.compile(r'#\s*(?:line\s+)?(\d+)\s+"([^"]*)"')
_PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass(slots=True)
class Token:
    """`text` as it is written out; `kind` is string, name, number or mark; `lead` is what stands before it."""

    text: str
    kind: str
    lead: str
    file: str
    line: int

    def blank(self) -> None:
        """Removes the token but keeps line breaks and directives, so that lines keep their numbers."""
        self.text = ""
        self.lead = _line_structure(self.lead)


def _line_structure(lead: str) -> str:
    kept = [part if part.lstrip().startswith("#") else "" for part in lead.split("\n")]
    return "\n".join(kept)


class Tokens:
    """A token list with the matching bracket of each bracket in `match`."""

    def __init__(self, text: str) -> None:
        self.list: list[Token] = []
        self.tail = ""
        lead, file, line = "", "", 1
        for found in _TOKEN.finditer(text):
            piece = found.group()
            if found.lastgroup == "blank":
                lead += piece
                if marker := _MARKER.match(piece):
                    line, file = int(marker[1]) - 1, marker[2]
                line += piece.count("\n")
                continue
            self.list.append(Token(piece, found.lastgroup or "mark", lead, file, line))
            lead = ""
            line += piece.count("\n")
        self.tail = lead
        self.match = self._matches()

    def _matches(self) -> dict[int, int]:
        match: dict[int, int] = {}
        opened: list[int] = []
        for i, t in enumerate(self.list):
            if t.text in _PAIRS:
                opened.append(i)
            elif t.text in _PAIRS.values() and t.kind == "mark":
                if not opened or _PAIRS[self.list[opened[-1]].text] != t.text:
                    raise FrontEndError(f"{t.file}:{t.line}: unbalanced '{t.text}'")
                j = opened.pop()
                match[j], match[i] = i, j
        if opened:
            t = self.list[opened[-1]]
            raise FrontEndError(f"{t.file}:{t.line}: '{t.text}' is never closed")
        return match

    def __len__(self) -> int:
        return len(self.list)

    def __getitem__(self, i: int) -> Token:
        return self.list[i]

    def text(self, i: int) -> str:
        """Text of token i, or '' beyond either end."""
        return self.list[i].text if 0 <= i < len(self.list) else ""

    def blank(self, i: int, j: int) -> None:
        """Removes tokens i to j - 1."""
        for t in self.list[i:j]:
            t.blank()

    def after_angles(self, i: int) -> int:
        """Index after the '>' that closes the '<' at i."""
        depth = 0
        while i < len(self.list):
            t = self.list[i].text
            if t in _PAIRS:
                i = self.match[i]
            elif t == "<":
                depth += 1
            elif t == ">":
                depth -= 1
                if depth == 0:
                    return i + 1
            elif t == ";":
                break
            i += 1
        raise FrontEndError(f"{self.list[i - 1].file}:{self.list[i - 1].line}: '<' is never closed")

    def where(self, i: int) -> str:
        t = self.list[min(i, len(self.list) - 1)]
        return f"{t.file}:{t.line}"

    def render(self) -> str:
        return "".join(t.lead + t.text for t in self.list) + self.tail


def spell(tokens: Sequence[Token]) -> str:
    """The tokens as one line of source."""
    out = ""
    for t in tokens:
        if not t.text:
            continue
        glue = (
            out
            and (out[-1].isalnum() or out[-1] == "_" or out[-1] == ">")
            and (t.text[0].isalnum() or t.text[0] == "_")
        )
        out += (" " if glue else "") + t.text
    return out
