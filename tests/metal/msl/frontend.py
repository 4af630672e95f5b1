"""From preprocessed MSL to C++ that a CPU compiler takes, and the signatures of its kernels.

Rewritten: kernel attributes, address spaces, threadgroup variables, function constants, instantiations by host_name, literals
without suffix (float in MSL). Definitions that differ in address spaces only become one. Lines keep their numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import FrontEndError
from .tokens import Token, Tokens, spell

ADDRESS_SPACES = frozenset(
    {"device", "threadgroup", "constant", "thread", "threadgroup_imageblock", "ray_data"}
)
_BUILTINS = """
thread_position_in_grid thread_position_in_threadgroup threadgroup_position_in_grid threads_per_threadgroup
dispatch_threads_per_threadgroup threadgroups_per_grid threads_per_grid thread_index_in_threadgroup
thread_index_in_simdgroup simdgroup_index_in_threadgroup simdgroups_per_threadgroup
dispatch_simdgroups_per_threadgroup threads_per_simdgroup thread_index_in_quadgroup
quadgroup_index_in_threadgroup quadgroups_per_threadgroup
"""
BUILTINS = frozenset(_BUILTINS.split())
_COMPONENTS = ("x", "y", "z", "w")
_SWIZZLE = re.compile(r"[xyzw]{2,4}")
_REAL = re.compile(r"(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+")
_SHORT_REAL = re.compile(r"((?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)([hH]|bf|BF)")


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter. `source` is 'buffer', 'threadgroup' or the name of a builtin attribute."""

    name: str
    source: str
    index: int  # of a buffer or threadgroup argument
    space: str  # 'device', 'constant', 'threadgroup' or ''
    constant: bool
    reference: bool
    optional_by: str | None  # the function constant that decides whether it exists
    text: str


@dataclass(frozen=True)
class KernelSource:
    """A kernel function, template or not."""

    name: str
    parameters: tuple[Parameter, ...]
    template: bool
    line: int
    most_threads: int | None  # max_total_threads_per_threadgroup, where it is a number


@dataclass(frozen=True)
class FunctionConstant:
    name: str
    type: str
    index: int


@dataclass
class Program:
    """What the front end makes of a source."""

    text: str
    kernels: dict[str, KernelSource] = field(default_factory=dict)
    entries: dict[str, str] = field(default_factory=dict)  # host name -> expression that names the function
    constants: dict[str, FunctionConstant] = field(default_factory=dict)
    defaulted: frozenset[str] = frozenset()  # constants that the source asks is_function_constant_defined of
    uses: dict[str, frozenset[str]] = field(
        default_factory=dict
    )  # name -> names that its definition mentions


class FrontEnd:
    """One pass over the tokens for each construct; `target` is 'exec' (C++) or 'strict' (OpenCL C++ address spaces)."""

    def __init__(self, preprocessed: str | Tokens, target: str = "exec") -> None:
        self.tokens = Tokens(preprocessed) if isinstance(preprocessed, str) else preprocessed
        self.target = target
        self.program = Program("")
        self.slots = 0

    def run(self) -> Program:
        t = self.tokens
        self.program.defaulted = frozenset(
            t[i + 2].text for i in range(len(t) - 2) if t[i].text == "is_function_constant_defined"
        )
        self._instantiations()
        self._function_constants()
        self._kernels()
        self._uses()
        self._remove_attributes()
        self._derived_constants()
        if self.target == "exec":
            self._merge_overloads()
        self._threadgroup_variables()
        self._literals()
        if self.target == "exec":
            self._components_of_swizzles()
            self._address_spaces()
        self.program.text = t.render()
        return self.program

    # ------------------------------------------------------------------ attributes

    def attribute_at(self, i: int) -> int | None:
        """Index after the attribute list that starts at i, or None where there is none."""
        t = self.tokens
        if t.text(i) == "[" and t.text(i + 1) == "[" and not t[i + 1].lead:
            return t.match[i] + 1
        return None

    def _after_attributes(self, i: int) -> int:
        while (end := self.attribute_at(i)) is not None:
            i = end
        return i

    def _remove_attributes(self) -> None:
        t = self.tokens
        i = 0
        while i < len(t):
            end = self.attribute_at(i)
            if end is None:
                i += 1
                continue
            t.blank(i, end)
            i = end

    def _statement_start(self, i: int) -> int:
        """Index of the first token of the statement or declaration that holds token i."""
        t = self.tokens
        while i > 0:
            before = t[i - 1].text
            if before in (";", "{", "}"):
                break
            if before in (")", "]"):
                i = t.match[i - 1]
                continue
            i -= 1
        return i

    # ------------------------------------------------------------------ kernels and their instantiations

    def _instantiations(self) -> None:
        """`template [[host_name("n")]] [[kernel]] decltype(f<T>) f<T>;` and the form that repeats the signature."""
        t = self.tokens
        for i in range(len(t)):
            if t[i].text != "template" or self.attribute_at(i + 1) is None:
                continue
            end = i
            while t.text(end) != ";":
                end = t.match.get(end, end) + 1 if t.text(end) in ("(", "[", "{") else end + 1
            j, name = i + 1, None
            while (k := self.attribute_at(j)) is not None:
                texts = [x.text for x in t.list[j:k]]
                if "host_name" in texts:
                    name = "".join(x.text[1:-1] for x in t.list[j:k] if x.kind == "string")
                j = k
            rest = [x for x in range(j, end) if t[x].text not in ("kernel", "void")]
            if t.text(rest[0]) == "decltype":
                first, last = t.match[rest[0] + 1] + 1, end
            else:
                first = last = rest[0]
                while t.text(last) != "(":
                    last = t.after_angles(last) if t.text(last) == "<" else last + 1
            expression = spell(t.list[first:last])
            self.program.entries[name or expression] = expression
            t.blank(i, end + 1)

    def _kernels(self) -> None:
        t = self.tokens
        i = 0
        while i < len(t):
            if t[i].text == "kernel" and t[i].kind == "name":
                after = i + 1
                if self._inside_attribute(i):
                    after = self._attribute_end(i)
                i = self._kernel(i, after)
            else:
                i += 1
        for kernel in self.program.kernels.values():
            if not kernel.template:
                self.program.entries.setdefault(kernel.name, kernel.name)

    def _inside_attribute(self, i: int) -> bool:
        t = self.tokens
        while i > 0 and t[i].text not in ("[", ";", "{", "}"):
            i -= 1
        return t[i].text == "["

    def _attribute_end(self, i: int) -> int:
        t = self.tokens
        while t[i].text != "[":
            i -= 1
        return t.match[i - 1] + 1

    def _kernel(self, at: int, i: int) -> int:
        t = self.tokens
        i = self._after_attributes(i)
        opening = i
        while t.text(opening) not in ("(", ";", "{", ""):
            opening = self._after_attributes(opening + 1)
        if t.text(opening) != "(" or t.text(i) != "void":
            raise FrontEndError(f"{t.where(at)}: 'kernel' must stand before `void name(...)`")
        name = t[opening - 1].text
        closing = t.match[opening]
        parameters = self._parameters(name, opening + 1, closing)
        start = self._statement_start(at)
        template = t.text(start) == "template"
        header = [x.text for x in t.list[start:opening]]
        most = None
        if "max_total_threads_per_threadgroup" in header:
            value = header[header.index("max_total_threads_per_threadgroup") + 2 :]
            most = int(value[0]) if value[0].isdigit() and value[1] == ")" else None
        self.program.kernels[name] = KernelSource(name, parameters, template, t[at].line, most)
        if not self._inside_attribute(at):
            t[at].blank()
        return closing + 1

    def split_commas(self, i: int, end: int) -> list[tuple[int, int]]:
        t = self.tokens
        parts, first = [], i
        while i < end:
            text = t[i].text
            if text in ("(", "[", "{"):
                i = t.match[i]
            elif text == "<":
                i = t.after_angles(i) - 1
            elif text == ",":
                parts.append((first, i))
                first = i + 1
            i += 1
        if first < end:
            parts.append((first, end))
        return parts

    def _parameters(self, kernel: str, first: int, end: int) -> tuple[Parameter, ...]:
        t = self.tokens
        result: list[Parameter] = []
        next_buffer = 0
        for i, j in self.split_commas(first, end):
            attributes: list[tuple[str, str]] = []
            plain: list[Token] = []
            k = i
            while k < j:
                if (after := self.attribute_at(k)) is not None:
                    for a, b in self.split_commas(k + 2, after - 2):
                        argument = spell(t.list[a + 2 : b - 1]) if t.text(a + 1) == "(" else ""
                        attributes.append((t[a].text, argument))
                    t.blank(k, after)
                    k = after
                else:
                    plain.append(t[k])
                    k += 1
            texts = [x.text for x in plain]
            extent = texts.index("[") if "[" in texts else len(texts)
            text, name = spell(plain), texts[extent - 1]
            space = next((x for x in texts if x in ADDRESS_SPACES), "")
            pointer, reference = "*" in texts or extent < len(texts), "&" in texts
            constant = (
                space == "constant" or "const" in texts[: texts.index("*") if "*" in texts else len(texts)]
            )
            optional = next((a for n, a in attributes if n == "function_constant"), None)
            source, index = "", -1
            for attribute, argument in attributes:
                if attribute in ("buffer", "threadgroup"):
                    source, index = attribute, int(argument, 0)
                elif attribute in BUILTINS:
                    source = attribute
            if not source and (pointer or reference):
                source = "threadgroup" if space == "threadgroup" else "buffer"
                index = next_buffer if source == "buffer" else sum(p.source == "threadgroup" for p in result)
            if not source:
                named = ", ".join(n for n, _ in attributes)
                raise FrontEndError(
                    f"{t.where(i)}: parameter '{text}' of kernel {kernel} needs an attribute that a CPU can serve"
                    + (f"; [[{named}]] is not one" if named else "")
                )
            if source == "buffer":
                if index > 30:
                    raise FrontEndError(
                        f"{t.where(i)}: buffer({index}) of kernel {kernel}: Metal has buffers 0 to 30"
                    )
                next_buffer = index + 1
            result.append(Parameter(name, source, index, space, constant, reference, optional, text))
        return tuple(result)

    # ------------------------------------------------------------------ function constants

    def _function_constants(self) -> None:
        """`constant T name [[function_constant(i)]];` becomes a variable that each launch fills."""
        t = self.tokens
        for i in range(len(t)):
            if t[i].text != "function_constant" or t.text(i - 1) != "[" or self.attribute_at(i - 2) is None:
                continue
            start = self._statement_start(i - 2)
            name = t[i - 3].text
            words = {"constant", "const", "static", "constexpr"}
            kind = spell([x for x in t.list[start : i - 3] if x.text not in words])
            index = int(t[i + 2].text, 0)
            if name in self.program.constants:
                raise FrontEndError(f"{t.where(i)}: function constant '{name}' is declared twice")
            self.program.constants[name] = FunctionConstant(name, kind, index)
            end = t.match[i - 2]
            lead = t[start].lead
            t.blank(start, end + 1)
            if self.target == "exec":
                t[start].text = (
                    f"static {kind} {name}; "
                    f"static msl::RegisterConstant msl_constant_{name}{{&{name}, (int)sizeof({kind}), {index}}}"
                )
            else:
                t[start].text = f"__constant const {kind} {name} = ({kind})0"
            t[start].lead = lead

    def _derived_constants(self) -> None:
        """`constant T name = expression of function constants;` is evaluated anew at each launch."""
        if self.target != "exec":
            return
        t = self.tokens
        dynamic = set(self.program.constants)
        i = 0
        while i < len(t):
            if t[i].text == "{" and not self._opens_namespace(i):
                i = t.match[i]
            elif t[i].text == "constant":
                start, end, equals = self._statement_start(i), i, 0
                while t.text(end) not in (";", "{", ""):
                    equals = equals or (end if t[end].text == "=" else 0)
                    end = t.match[end] + 1 if t.text(end) in ("(", "[") else end + 1
                mentioned = {x.text for x in t.list[equals:end]} if equals else set()
                if equals and mentioned & (dynamic | {"is_function_constant_defined"}) and t.text(end) == ";":
                    name = t[equals - 1].text
                    words = {"constant", "const", "static", "constexpr"}
                    kind = spell([x for x in t.list[start : equals - 1] if x.text not in words])
                    value = spell(t.list[equals + 1 : end])
                    dynamic.add(name)
                    t.blank(start, end)
                    t[
                        start
                    ].text = f"static {kind} {name}; static msl::RegisterDerived msl_derived_{name}{{[] {{ {name} = {value}; }}}}"
                i = end
            i += 1

    def _opens_namespace(self, i: int) -> bool:
        header = [x.text for x in self.tokens.list[self._statement_start(i) : i]]
        return "namespace" in header or "extern" in header

    # ------------------------------------------------------------------ threadgroup variables

    def _threadgroup_variables(self) -> None:
        """A statement `threadgroup T a[N], b;` becomes references into the threadgroup's memory."""
        t = self.tokens
        for i in range(len(t)):
            if t[i].text != "threadgroup" or t.text(i - 1) not in (";", "{", "}", ":", ")"):
                continue
            names = self._declarators(i)
            if names is None:
                continue
            first, end = names[0], names[-1]
            kind = spell(t.list[i + 1 : first])
            parts = self.split_commas(first, end)
            lines = []
            for a, b in parts:
                name, extents = t[a].text, spell(t.list[a + 1 : b])
                reference = f"(&{name}){extents}" if extents else f"&{name}"
                if self.target == "exec":
                    lines.append(f"{kind} {reference} = msl::Slot<{self.slots}>()")
                else:
                    pointer = f"(__local {kind} (*){extents})" if extents else f"(__local {kind} *)"
                    lines.append(f"__local {kind} {reference} = *{pointer}0")
                self.slots += 1
            lead = t[i].lead
            t.blank(i, end)
            t[i].lead, t[i].text = lead, "; ".join(lines)

    def _declarators(self, i: int) -> tuple[int, int] | None:
        """(index of the first declared name, index of ';') of the threadgroup variable declared at i; None for a pointer."""
        t = self.tokens
        j, last = i + 1, 0
        while t.text(j) not in ("[", ",", ";", "=", "*", "&", "(", "{", ")", ""):
            if t.text(j) == "<":
                j = t.after_angles(j)
                continue
            if t[j].kind == "name":
                last = j
            j += 1
        if t.text(j) in ("*", "&"):
            return None
        if t.text(j) not in ("[", ",", ";") or not last:
            raise FrontEndError(f"{t.where(i)}: a threadgroup variable takes no initialiser")
        end = j
        while t.text(end) != ";":
            if t.text(end) in ("", "=", "{", "}"):
                raise FrontEndError(f"{t.where(i)}: a threadgroup variable takes no initialiser")
            end = t.match[end] + 1 if t.text(end) in ("[", "(") else end + 1
        return last, end

    # ------------------------------------------------------------------ what C++ sees as one

    def _merge_overloads(self) -> None:
        """Drops all but the first of the functions, methods and specialisations that differ in address spaces only."""
        t = self.tokens
        seen: list[tuple[str, set[str]]] = [("namespace", set())]
        namespaces: dict[str, set[str]] = {}
        start = i = 0
        while i < len(t):
            text = t[i].text
            if text in ("(", "["):
                i = t.match[i] + 1
                continue
            if text == "}":
                if len(seen) > 1:
                    seen.pop()
                start = i + 1
            elif text in (";", "{"):
                header = t.list[start:i]
                if text == "{" and header and header[-1].text in ("=", ",", "return"):
                    i = t.match[i] + 1
                    continue
                kind = self.scope_of(header) if text == "{" else "declaration"
                body_end = t.match[i] if text == "{" else i
                key = self._overload_key(header)
                if key and kind != "namespace" and (text == "{" or seen[-1][0] == "class"):
                    if key in seen[-1][1]:
                        last = body_end + 1
                        if kind == "class" and t.text(last) == ";":
                            last += 1
                        t.blank(start, last)
                        start = i = last
                        continue
                    seen[-1][1].add(key)
                if text == "{":
                    if kind in ("namespace", "class"):
                        known = namespaces.setdefault(spell(header), set()) if kind == "namespace" else set()
                        seen.append((kind, known))
                        start = i + 1
                    else:
                        i = body_end
                        start = body_end + 1
                else:
                    start = i + 1
            elif (
                text == ":" and seen[-1][0] == "class" and t.text(i - 1) in ("public", "private", "protected")
            ):
                start = i + 1
            i += 1

    @staticmethod
    def scope_of(header: list[Token]) -> str:
        texts = [x.text for x in header if x.text]
        if "namespace" in texts or texts[:1] == ["extern"]:
            return "namespace"
        depth = 0
        for x in texts:
            depth += (x == "<") - (x == ">")
            if depth == 0 and x == "(":
                return "function"
            if depth == 0 and x in ("struct", "class", "union"):
                return "class"
        return "other"

    @staticmethod
    def _overload_key(header: list[Token]) -> str:
        texts = [x.text for x in header if x.text]
        if not any(x in ADDRESS_SPACES for x in texts):
            return ""
        if "(" not in texts and not {"struct", "class"} & set(texts):
            return ""
        depth, end = 0, len(texts)
        for k, x in enumerate(texts):  # a constructor's initialisers are not part of its type
            depth += (x in ("(", "<")) - (x in (")", ">"))
            if x == ":" and depth == 0 and ")" in texts[:k]:
                end = k
                break
        key: list[str] = []
        for x in texts[:end]:
            if (
                x == "constant"
            ):  # behind a parameter list it says where the object lives, before it that it does not change
                x = "" if key[-1:] == [")"] else "const"
            if not x:
                continue
            if (
                x in ADDRESS_SPACES
                or x in ("METAL_FUNC", "inline")
                or (x == "const" and key[-1:] == ["const"])
            ):
                continue
            key.append(x)
        return " ".join(key)

    # ------------------------------------------------------------------ spelling

    def _literals(self) -> None:
        for t in self.tokens.list:
            if t.kind != "number" or t.text[:2] in ("0x", "0X"):
                continue
            if _REAL.fullmatch(t.text):
                t.text += "f"
            elif short := _SHORT_REAL.fullmatch(t.text):
                digits = short[1] if re.search(r"[.eE]", short[1]) else short[1] + "."
                t.text = f"{'half' if short[2] in 'hH' else 'bfloat'}({digits}f)"

    def _components_of_swizzles(self) -> None:
        """`v.wzy.x` becomes `v.wzy[0]`: a swizzle has no members, and what has them has [] too."""
        t = self.tokens
        for i in range(len(t) - 3):
            if (
                t[i].text == "."
                and t[i + 2].text == "."
                and _SWIZZLE.fullmatch(t[i + 1].text)
                and t[i + 3].text in _COMPONENTS
            ):
                t[i + 2].text, t[i + 3].text = "", f"[{'xyzw'.index(t[i + 3].text)}]"

    def _address_spaces(self) -> None:
        """`constant` reads const unless a const stands beside it; the others vanish."""
        t = self.tokens
        specifiers = {
            "const",
            "constant",
            "constexpr",
            "static",
            "inline",
            "device",
            "thread",
            "threadgroup",
            "volatile",
        }
        for i in range(len(t)):
            token = t[i]
            if token.kind != "name" or token.text not in ADDRESS_SPACES:
                continue
            if token.text != "constant" or t.text(i - 1) == ")":
                token.text = ""
                continue
            a = b = i
            while t.text(a - 1) in specifiers:
                a -= 1
            while t.text(b + 1) in specifiers:
                b += 1
            others = [t[k].text for k in range(a, b + 1) if k != i]
            token.text = "" if "const" in others else "const"

    # ------------------------------------------------------------------ who uses what

    def _uses(self) -> None:
        """For every name defined at namespace scope, the names that its definition mentions."""
        t = self.tokens
        uses: dict[str, set[str]] = {}
        i = 0
        while i < len(t):
            if t[i].text == "{":
                if self._opens_namespace(i):
                    i += 1
                    continue
                start, end = self._statement_start(i), t.match[i]
                mentioned = {x.text for x in t.list[start:end] if x.kind == "name"}
                uses.setdefault(self.defined_name(start, i), set()).update(mentioned)
                i = end
            elif t[i].text == "constant" and self.program.constants:
                end = i
                while t.text(end) not in (";", "{", ""):
                    end += 1
                names = [x.text for x in t.list[i:end] if x.kind == "name"]
                if "=" in [x.text for x in t.list[i:end]]:
                    k = [x.text for x in t.list[i:end]].index("=")
                    uses.setdefault(t[i + k - 1].text, set()).update(names)
            i += 1
        self.program.uses = {k: frozenset(v) for k, v in uses.items()}

    def defined_name(self, start: int, end: int) -> str:
        """The name that the definition with header start..end - 1 gives to a function or class."""
        t = self.tokens
        i = start
        while i < end:
            if (after := self.attribute_at(i)) is not None:
                i = after
            elif t.text(i) == "operator":
                return "operator"
            elif t.text(i) == "<":
                i = t.after_angles(i)
            elif t.text(i) == "(":
                return t.text(i - 1)
            elif t.text(i) in ("struct", "class", "union", "enum"):
                return t.text(self._after_attributes(i + 1))
            else:
                i += 1
        return ""


def rewrite(preprocessed: str | Tokens, target: str = "exec") -> Program:
    """The front end on preprocessed text."""
    return FrontEnd(preprocessed, target).run()
