"""Variable declarations and debug lines of PTX.

Source: PTX ISA, "Variables", "Debugging Directives".
"""

from __future__ import annotations

from kimi_ops.testing.ptx.syntax import Module, Variable
from kimi_ops.testing.ptx.tokens import Tokens, literal
from kimi_ops.testing.ptx.types import TYPES, ScalarType

SPACES = ("shared", "global", "const", "local", "param")


class Declarations(Tokens):
    """What both a module and a function body may hold."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.module = Module()
        self.loc: tuple[int, int] = (0, 0)

    def skip_statement(self) -> None:
        """Passes over everything up to the next semicolon."""
        while not self.accept(";"):
            if self.kind == "end":
                raise self.fail("unfinished statement")
            self.take()

    def skip_parentheses(self) -> None:
        """Passes over a word and its parentheses."""
        self.take()
        self.expect("(")
        while not self.accept(")"):
            self.take()

    def debug_line(self) -> None:
        """``.file n "name" [, time, size]`` and ``.loc f line column [, ...]``."""
        if self.take() == ".file":
            number = self.integer()
            self.module.files[number] = self.take().strip('"')
            while self.accept(","):
                self.integer()
            return
        file = self.integer()
        self.loc = (file, self.integer())
        self.integer()
        while self.accept(","):
            word = self.take()
            if word == "function_name":
                self.take()
                if self.accept("+"):
                    self.integer()
            elif word == "inlined_at":
                for _ in range(3):
                    self.integer()
            else:
                raise self.fail(f"unknown word {word!r} in .loc")

    def scalar_type(self) -> ScalarType:
        """A type with its dot."""
        name = self.take().removeprefix(".")
        if name not in TYPES:
            raise self.fail(f"unknown type {name!r}")
        return TYPES[name]

    def declaration(self) -> list[Variable]:
        """``.space [.align n] [.v4] .type name[n] [= init] {, ...} ;``."""
        space = self.take().removeprefix(".")
        variables = [self.declared(space)]
        while self.accept(","):
            variables.append(self.declared(space, variables[0].type))
        self.expect(";")
        return variables

    def declared(self, space: str, scalar: ScalarType | None = None) -> Variable:
        """One variable of a declaration; ``scalar`` is the type that an earlier one gave."""
        align, lanes = 0, 1
        while scalar is None:
            if self.accept(".align"):
                align = self.integer()
            elif self.accept(".ptr"):
                # What the pointer points at: an assumption of the compiler, no property of the
                # parameter itself.
                if self.text[1:] in SPACES:
                    self.take()
                if self.accept(".align"):
                    self.integer()
            elif self.text in (".v2", ".v4"):
                lanes = int(self.take()[2:])
            elif self.text == ".attribute":
                self.skip_parentheses()
            else:
                scalar = self.scalar_type()
        while self.text == ".ptr":
            self.take()
            if self.text[1:] in SPACES:
                self.take()
            if self.accept(".align"):
                self.integer()
        name = self.take()
        count = lanes
        while self.accept("["):
            if self.accept("]"):
                count = 0
            else:
                count *= self.integer()
                self.expect("]")
        size = scalar.size * count
        data: bytes | None = None
        pointers: list[tuple[int, str]] = []
        if self.accept("="):
            data = self.initialiser(scalar, size, pointers)
        return Variable(
            name, space, size, align or scalar.size * lanes, scalar, data, tuple(pointers)
        )

    def initialiser(self, scalar: ScalarType, size: int, pointers: list[tuple[int, str]]) -> bytes:
        """Bytes after ``=``; offsets of addresses go to ``pointers``."""
        out = bytearray()
        depth = 0
        while True:
            if self.accept("{"):
                depth += 1
                continue
            if self.kind == "word":
                word = self.take()
                if word == "generic":
                    self.expect("(")
                    word = self.take()
                    self.expect(")")
                pointers.append((len(out), word))
                out += bytes(scalar.size)
            else:
                negative = self.accept("-")
                constant = literal(self.take())
                if scalar.kind == "f" and constant.bits is not None:
                    if constant.size != scalar.size or negative:
                        raise self.fail("float initialiser of another size")
                    out += constant.bits.to_bytes(scalar.size, "little")
                elif isinstance(constant.value, int):
                    value = -constant.value if negative else constant.value
                    out += (value & ((1 << 8 * scalar.size) - 1)).to_bytes(scalar.size, "little")
                else:
                    raise self.fail("initialiser of another type")
            while depth and self.accept("}"):
                depth -= 1
            if depth == 0:
                return bytes(out).ljust(size, b"\0")
            self.expect(",")
