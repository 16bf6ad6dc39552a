"""Reads PTX text into a `Module`.

A recursive descent over tokens. Inner ``{ }`` scopes, which inline assembly and call sequences
make, are flattened: what they declare gets a name of its own.

Source: PTX ISA, "Syntax", "Variables", "Directives".
"""

from __future__ import annotations

import dataclasses
import re

from kimi_ops.testing.ptx.declarations import SPACES, Declarations
from kimi_ops.testing.ptx.errors import UnsupportedPtx
from kimi_ops.testing.ptx.syntax import (
    Address,
    Function,
    Immediate,
    Instruction,
    Module,
    Name,
    Operand,
    Pair,
    Variable,
    Vector,
)
from kimi_ops.testing.ptx.tokens import literal

# Words before a declaration that change nothing inside one module.
_LINKING = (".visible", ".extern", ".weak", ".common", ".managed")
# Hints to ptxas, each with the words and numbers that follow it.
_KERNEL_HINTS = (
    ".maxnctapersm",
    ".noreturn",
    ".maxclusterrank",
    ".reqnctapercluster",
    ".explicitcluster",
    ".blocksareclusters",
    ".abi_preserve",
)
_BRANCHES = ("bra", "brx")


class _Scope:
    """Names that one ``{ }`` declares, and where its instructions start."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.names: dict[str, str] = {}
        self.labels: dict[str, str] = {}


class _Parser(Declarations):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.scopes: list[_Scope] = []
        self.scope_count = 0

    # Module level

    def parse(self) -> Module:
        while self.kind != "end":
            word = self.text
            if word == ".version":
                self.take()
                self.module.version = self.take()
            elif word == ".target":
                self.take()
                self.module.target = self.take()
                while self.accept(","):
                    self.take()
            elif word == ".address_size":
                self.take()
                if self.integer() != 64:
                    raise self.fail("only 64-bit addresses")
            elif word in (".file", ".loc"):
                self.debug_line()
            elif word == ".section":
                while not self.accept("{"):
                    self.take()
                while not self.accept("}"):
                    self.take()
            elif word == ".pragma":
                self.skip_statement()
            elif word in _LINKING:
                self.take()
            elif word == ".attribute":
                self.skip_parentheses()
            elif word in (".entry", ".func"):
                self.function()
            elif word == ".alias":
                raise self.fail("unsupported directive .alias")
            elif word[1:] in SPACES:
                for variable in self.declaration():
                    self.module.variables[variable.name] = variable
            else:
                raise self.fail("unknown directive")
        return self.module

    # Functions

    def parameters(self) -> list[Variable]:
        self.expect("(")
        params = []
        while not self.accept(")"):
            if not self.accept(".param"):
                raise self.fail("parameters in registers (.reg) are not supported")
            params.append(self.declared("param"))
            self.accept(",")
        return params

    def function(self) -> None:
        entry = self.take() == ".entry"
        results = self.parameters() if self.text == "(" else []
        function = Function(self.take(), entry, results=results)
        if self.text == "(":
            function.params = self.parameters()
        while self.text not in ("{", ";"):
            word = self.take()
            sizes: list[int] = []
            while self.kind == "number":
                sizes.append(self.integer())
                self.accept(",")
            if word == ".reqntid":
                function.required_block = tuple(sizes)
            elif word == ".maxntid":
                function.max_block = tuple(sizes)
            elif word == ".maxnreg":
                (function.max_registers,) = sizes
            elif word == ".minnctapersm":
                (function.min_ctas,) = sizes
            elif word == ".reqnctapercluster" and any(size != 1 for size in sizes):
                cluster = ", ".join(map(str, sizes))
                raise UnsupportedPtx(f"unsupported: .reqnctapercluster {cluster}", function.name)
            elif word not in _KERNEL_HINTS:
                raise self.fail(f"unknown directive {word!r} of a function")
        if self.accept(";"):
            self.module.functions.setdefault(function.name, function)
            return
        self.body(function)
        function.defined = True
        self.module.functions[function.name] = function

    def body(self, function: Function) -> None:
        self.loc = (0, 0)
        self.expect("{")
        self.scopes = [_Scope(0)]
        while self.scopes:
            word = self.text
            if self.accept("{"):
                self.scopes.append(_Scope(len(function.body)))
                self.scope_count += 1
            elif self.accept("}"):
                self.close_scope(function)
            elif word in (".loc", ".file"):
                self.debug_line()
            elif word == ".pragma":
                self.skip_statement()
            elif word == ".reg":
                self.registers(function)
            elif word[1:] in SPACES:
                for variable in self.declaration():
                    name = self.local_name(variable.name)
                    function.variables.append(dataclasses.replace(variable, name=name))
            elif self.kind == "end":
                raise self.fail("unexpected end of the text")
            elif self.tokens[self.at + 1][1] == ":":
                label = self.take()
                self.take()
                if self.accept(".branchtargets"):
                    function.branch_tables[label] = self.names_to_semicolon()
                elif self.text in (".callprototype", ".calltargets"):
                    raise self.fail(f"unsupported directive {self.text}")
                else:
                    unique = label
                    if len(self.scopes) > 1:
                        unique = f"{label}#{self.scope_count}"
                        self.scopes[-1].labels[label] = unique
                    function.labels[unique] = len(function.body)
            else:
                function.body.append(self.instruction())

    def names_to_semicolon(self) -> tuple[str, ...]:
        names = [self.take()]
        while self.accept(","):
            names.append(self.take())
        self.expect(";")
        return tuple(names)

    def local_name(self, name: str) -> str:
        """A declared name; unique if an inner scope declares it."""
        if len(self.scopes) == 1:
            return name
        unique = f"{name}#{self.scope_count}"
        self.scopes[-1].names[name] = unique
        return unique

    def close_scope(self, function: Function) -> None:
        """Gives branches inside the scope the unique names of its labels."""
        scope = self.scopes.pop()
        for index in range(scope.start, len(function.body)) if scope.labels else ():
            instruction = function.body[index]
            if instruction.parts[0] in _BRANCHES:
                operands = tuple(
                    Name(scope.labels[o.name])
                    if isinstance(o, Name) and o.name in scope.labels
                    else o
                    for o in instruction.operands
                )
                function.body[index] = dataclasses.replace(instruction, operands=operands)

    def registers(self, function: Function) -> None:
        """``.reg .type a, %r<10>;`` ("Register State Space")."""
        self.take()
        lanes = self.take() if self.text in (".v2", ".v4") else ""
        if lanes:
            raise self.fail("vector registers are not supported")
        scalar = self.scalar_type()
        while True:
            name = self.take()
            if self.accept("<"):
                for number in range(self.integer()):
                    function.registers[self.local_name(f"{name}{number}")] = scalar
                self.expect(">")
            else:
                function.registers[self.local_name(name)] = scalar
            if not self.accept(","):
                break
        self.expect(";")

    # Instructions

    def instruction(self) -> Instruction:
        line = self.tokens[self.at][2]
        guard = None
        if self.accept("@"):
            negated = self.accept("!")
            guard = Name(self.resolve(self.take()), negated)
        opcode = self.take()
        if not re.match(r"[a-z]", opcode):
            raise self.fail(f"expected an instruction, not {opcode!r}")
        operands: list[Operand] = []
        while not self.accept(";"):
            operands.append(self.operand())
            if self.text != ";":
                self.expect(",")
        loc = (self.module.files.get(self.loc[0], str(self.loc[0])), self.loc[1])
        return Instruction(opcode, tuple(operands), guard, line, loc)

    def resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope.names:
                return scope.names[name]
        return name

    def operand(self) -> Operand:
        if self.accept("{"):
            return Vector(self.list_until("}"))
        if self.accept("("):
            return Vector(self.list_until(")"))
        if self.accept("["):
            return self.address()
        if self.accept("!"):
            return Name(self.resolve(self.take()), negated=True)
        if self.kind == "number" or self.text in ("-", "+"):
            return self.immediate()
        if self.kind != "word":
            raise self.fail("expected an operand")
        first = Name(self.resolve(self.take()))
        if self.accept("|"):
            return Pair(first, Name(self.resolve(self.take())))
        return first

    def immediate(self) -> Immediate:
        negative = self.take() == "-" if self.text in ("-", "+") else False
        constant = literal(self.take())
        if not negative:
            return constant
        if constant.bits is None:
            return Immediate(-constant.value)
        return Immediate(
            -constant.value, constant.bits ^ (1 << (8 * constant.size - 1)), constant.size
        )

    def list_until(self, end: str) -> tuple[Operand, ...]:
        items: list[Operand] = []
        while not self.accept(end):
            items.append(self.operand())
            if self.text != end:
                self.expect(",")
        return tuple(items)

    def address(self) -> Address:
        base = self.operand()
        if not isinstance(base, Name | Immediate):
            raise self.fail("expected the base of an address")
        offset = 0
        coords: tuple[Operand, ...] = ()
        while not self.accept("]"):
            if self.accept(","):
                self.expect("{")
                coords = self.list_until("}")
            elif self.accept("+") or self.text == "-":
                offset += self.integer()
            else:
                raise self.fail("expected an offset")
        return Address(base, offset, coords)


def parse(text: str) -> Module:
    """Parses a PTX module.

    Raises:
        PtxSyntaxError: with the line, for what is no PTX or is not supported by the parser.
    """
    module = _Parser(text).parse()
    # Debug information names its files at the end of the text in Triton's output.
    for function in module.functions.values():
        function.body = [
            dataclasses.replace(i, loc=(module.files.get(int(i.loc[0]), ""), i.loc[1]))
            if i.loc[0].isdigit()
            else i
            for i in function.body
        ]
    return module
