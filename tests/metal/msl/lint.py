"""What a CPU compiler takes and Apple's does not, found in the tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import FrontEndError
from .frontend import ADDRESS_SPACES, FrontEnd
from .library import expand, source_of
from .tokens import Token, Tokens, spell

_WORDS = {
    "double": "MSL has no double",
    "goto": "MSL has no goto",
    "asm": "MSL has no asm",
    "throw": "MSL has no exceptions",
    "try": "MSL has no exceptions",
    "catch": "MSL has no exceptions",
    "virtual": "MSL has no virtual functions",
    "dynamic_cast": "MSL has no run-time types",
    "typeid": "MSL has no run-time types",
    "new": "MSL has no heap",
    "delete": "MSL has no heap",
    "malloc": "MSL has no heap",
    "free": "MSL has no heap",
    "thread_local": "MSL has no thread_local",
    "register": "MSL has no register",
    "printf": "MSL has no printf",
    "assert": "MSL has no assert",
    "atomic_ulong": "64-bit atomics have only min and max, on newer GPUs",
    "atomic_long": "MSL has no signed 64-bit atomics",
    "memory_order_acquire": "device atomics are relaxed",
    "memory_order_release": "device atomics are relaxed",
    "memory_order_acq_rel": "device atomics are relaxed",
    "memory_order_seq_cst": "device atomics are relaxed",
}
_RULE_OF = {"new": "heap", "delete": "heap", "malloc": "heap", "free": "heap"} | dict.fromkeys(
    ("throw", "try", "catch"), "exceptions"
)
_CONTROL_WORDS = "if for while switch return do else case default break continue sizeof alignof decltype"
_CONTROL = frozenset(_CONTROL_WORDS.split())


@dataclass(frozen=True)
class Finding:
    """One place that Apple's compiler refuses, or is likely to."""

    file: str
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}: {self.text} [{self.rule}]"


class _Linter:
    def __init__(self, text: str) -> None:
        self.front = FrontEnd(text)
        self.t = self.front.tokens
        self.bodies: list[
            tuple[int, int, int, str, bool]
        ] = []  # header start, opening, closing, name, is a kernel
        self.found: list[Finding] = []

    def add(self, i: int, rule: str, text: str) -> None:
        token = self.t[i]
        self.found.append(Finding(token.file, token.line, rule, text))

    def run(self) -> list[Finding]:
        self._words()
        self._scope(0, len(self.t), "namespace")
        self._recursion()
        return self.found

    def _words(self) -> None:
        t = self.t
        for i, token in enumerate(t.list):
            if token.kind != "name":
                continue
            member = t.text(i - 1) in (".", "->") or (token.text == "delete" and t.text(i - 1) == "=")
            if token.text in _WORDS and not member:
                if token.text in ("printf", "assert", "malloc", "free") and t.text(i + 1) != "(":
                    continue
                self.add(i, _RULE_OF.get(token.text, token.text), _WORDS[token.text])
            elif token.text == "std" and t.text(i + 1) == "::":
                self.add(i, "std", "MSL has no C++ standard library")
            elif token.text == "long" and t.text(i + 1) in ("long", "double"):
                self.add(i, "long long", f"MSL has no long {t.text(i + 1)}")
            elif token.text in ("atomic", "_atomic") and t.text(i + 1) == "<":
                kind = spell(t.list[i + 2 : t.after_angles(i + 1) - 1])
                if kind in ("long", "int64_t", "ulong", "uint64_t", "size_t"):
                    self.add(i, "64-bit atomic", "64-bit atomics have only min and max, on newer GPUs")
            elif token.text == "threadgroup" and t.text(i + 1) in ("atomic_float", "atomic") and "float" in (
                t.text(i + 1)[7:], t.text(i + 3)
            ):  # fmt: skip
                self.add(i, "threadgroup float atomic", "float atomics exist on device memory only")

    # ------------------------------------------------------------------ declarations

    def _scope(self, i: int, end: int, kind: str) -> None:
        """Checks the declarations of a namespace or class and descends into functions."""
        t, start = self.t, i
        while i < end:
            text = t.text(i)
            if text in ("(", "["):
                i = t.match[i] + 1
                continue
            if text == ";":
                self._declaration(start, i, kind)
                start = i + 1
            elif text == "{":
                header = t.list[start:i]
                closing = t.match[i]
                inner = self.front.scope_of(header)
                if inner in ("namespace", "class"):
                    self._scope(i + 1, closing, inner)
                    start = closing + 1
                elif inner == "function" and "=" not in [x.text for x in self._outside_brackets(start, i)]:
                    texts = [x.text for x in header]
                    name = self.front.defined_name(start, i)
                    self._parameters(start, i)
                    self.bodies.append((start, i, closing, name, "kernel" in texts))
                    self._body(i + 1, closing, "kernel" in texts)
                    start = closing + 1
                i = closing
            elif text == ":" and t.text(i - 1) in ("public", "private", "protected"):
                start = i + 1
            i += 1

    def _outside_brackets(self, i: int, end: int) -> Iterator[Token]:
        t = self.t
        while i < end:
            if t.text(i) in ("(", "[", "{"):
                i = t.match[i] + 1
                continue
            yield t[i]
            i += 1

    def _declaration(self, start: int, end: int, kind: str) -> None:
        texts = [x.text for x in self.t.list[start:end]]
        outside = [x.text for x in self._outside_brackets(start, end)]
        skip = {
            "using",
            "typedef",
            "struct",
            "class",
            "union",
            "enum",
            "template",
            "static_assert",
            "friend",
            "extern",
        }
        if not texts or skip & set(texts[:1]) or "operator" in texts:
            return
        before_value = outside[: outside.index("=")] if "=" in outside else outside
        plain = self.t.list[start:end]
        has_call = any(
            x.text == "("
            for k, x in enumerate(plain)
            if x.text == "(" and "=" not in [y.text for y in plain[:k]]
        )
        if has_call or "constant" in texts or len(before_value) < 2:
            return
        if kind == "namespace":
            self.add(start, "global", "a variable at namespace scope must be `constant`")
        elif "static" in texts:
            self.add(start, "global", "a static member must be `constant`")

    def _parameters(self, start: int, opening: int) -> None:
        t = self.t
        i = start
        while i < opening and t.text(i) != "(":
            if (after := self.front.attribute_at(i)) is not None:
                i = after
            else:
                i = t.after_angles(i) if t.text(i) == "<" else i + 1
        if i >= opening or t.text(i - 1) == "operator":
            i = t.match[i] + 1 if i < opening and t.text(i + 2) == "(" else i
        if i >= opening or t.text(i) != "(":
            return
        for a, b in self.front.split_commas(i + 1, t.match[i]):
            texts = [x.text for x in t.list[a:b]]
            head = texts[: texts.index("=")] if "=" in texts else texts
            bare = "*" in head or "&" in head
            if (
                bare
                and not ADDRESS_SPACES & set(head)
                and "auto" not in head
                and "&&" not in head
                and "(" not in head
            ):
                self.add(
                    a,
                    "address space",
                    f"'{spell(t.list[a:b])}' needs device, constant, threadgroup or thread",
                )

    def _body(self, i: int, end: int, kernel: bool) -> None:
        """Statements of a function: local declarations."""
        t = self.t
        at_start = True
        while i < end:
            text = t.text(i)
            if at_start:
                self._statement(i, end, kernel)
            at_start = text in (";", "{", "}") or (
                text == ")" and t.text(t.match[i] - 1) in ("if", "for", "while")
            )
            if text == "(" and t.text(i - 1) == "for":
                self._statement(i + 1, end, kernel)
            i += 1

    def _statement(self, i: int, end: int, kernel: bool) -> None:
        t = self.t
        if t.text(i) == "static" and "constant" not in [x.text for x in t.list[i : i + 5]]:
            self.add(i, "static", "a function has no static variables but constant ones")
        if t.text(i) == "threadgroup" and not kernel and self._is_variable(i):
            self.add(i, "threadgroup variable", "threadgroup variables are declared in kernel functions only")
        j = i
        while t.text(j) in ("const", "volatile"):
            j += 1
        if (
            t[j].kind != "name"
            or t.text(j) in _CONTROL
            or t.text(j) in ADDRESS_SPACES
            or t.text(j) in ("auto", "using")
        ):
            return
        j += 1
        while t.text(j) == "::" or t.text(j - 1) == "::":
            j += 1
        if t.text(j) == "<":
            try:
                j = t.after_angles(j)
            except FrontEndError:
                return
        marks = j
        while t.text(j) in ("*", "&", "const"):
            j += 1
        declares = j > marks and t[j].kind == "name" and t.text(j + 1) in ("=", ";") and j < end
        if declares and t.text(i) != "delete":
            self.add(
                i,
                "address space",
                f"'{spell(t.list[i : j + 1])}' needs device, constant, threadgroup or thread",
            )

    def _is_variable(self, i: int) -> bool:
        t = self.t
        while t.text(i) not in (";", "=", "*", "&", "(", ""):
            i = t.after_angles(i) if t.text(i) == "<" else i + 1
        return t.text(i) == ";"

    # ------------------------------------------------------------------ recursion

    def _recursion(self) -> None:
        t = self.t
        count: dict[str, int] = {}
        for _, _, _, name, _ in self.bodies:
            count[name] = count.get(name, 0) + 1
        unique = {
            name: (start, opening, closing)
            for start, opening, closing, name, _ in self.bodies
            if name and name != "operator" and count[name] == 1 and t.text(start) != "template"
        }
        calls = {
            name: {
                t[i].text
                for i in range(opening, closing)
                if t[i].text in unique and t.text(i + 1) == "(" and t.text(i - 1) not in (".", "->")
            }
            for name, (_, opening, closing) in unique.items()
        }
        for name, (start, _, _) in unique.items():
            reached, todo = set(), set(calls[name])
            while todo:
                n = todo.pop()
                reached.add(n)
                todo |= calls[n] - reached
            if name in reached:
                self.add(start, "recursion", f"'{name}' calls itself, which MSL does not allow")


_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<([^>]+)>", re.M)


def lint(
    path_or_text: str | os.PathLike,
    *,
    include: Sequence[str | os.PathLike] = (),
    defines: Mapping[str, object] | None = None,
    compiler: str | None = None,
    headers: bool = True,
) -> list[Finding]:
    """What Apple's compiler would refuse in a source, and with `headers` in what it includes; sorted by place.

    Heap, exceptions, run-time types, double, the C++ library, mutable globals and statics, pointers and references without an
    address space, threadgroup variables outside of kernels, recursion, unsupported atomics, foreign includes.
    What needs types (mixed address spaces, VLAs, conversions) is found by `strict`.
    """
    text, name, _ = source_of(path_or_text)
    expanded = expand(path_or_text, include=include, defines=defines, compiler=compiler)
    found = _Linter(expanded).run()
    files = {name} | {x.file for x in Tokens(expanded).list}
    for file in files:
        try:
            raw = text if file == name else Path(file).read_text()
        except OSError:
            continue
        for match in _INCLUDE.finditer(raw):
            if not match[1].startswith("metal_"):
                line = raw[: match.start()].count("\n") + 1
                found.append(Finding(file, line, "include", f"<{match[1]}> is no header of Metal"))
    if not headers:
        found = [f for f in found if f.file == name]
    return sorted(set(found), key=lambda f: (f.file, f.line, f.rule))
