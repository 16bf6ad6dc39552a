"""Tokens of PTX text, and number literals.

Source: PTX ISA, "Comments", "Identifiers", "Constants".
"""

from __future__ import annotations

import re
import struct

from kimi_ops.testing.ptx.errors import PtxSyntaxError
from kimi_ops.testing.ptx.syntax import Immediate

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<string>"[^"]*")
      | (?P<number>0[fF][0-9a-fA-F]{8}(?!\w) | 0[dD][0-9a-fA-F]{16}(?!\w) | 0[xX][0-9a-fA-F]+U?
          | 0[bB][01]+U? | \d+\.\d*(?:[eE][+-]?\d+)? | \d+[eE][+-]?\d+ | \d+U?)
      | (?P<word>[%$_A-Za-z.][\w$%.]*(?:::\w[\w.$]*)*)
      | (?P<sign>[{}()\[\];:,=+\-|!@<>])""",
    re.X | re.S,
)


def literal(text: str) -> Immediate:
    """A number token as its value (PTX ISA, "Constants")."""
    kind = text[:2].lower()
    if kind == "0f":
        bits = int(text[2:], 16)
        return Immediate(struct.unpack("<f", bits.to_bytes(4, "little"))[0], bits, 4)
    if kind == "0d":
        bits = int(text[2:], 16)
        return Immediate(struct.unpack("<d", bits.to_bytes(8, "little"))[0], bits, 8)
    text = text.rstrip("U")
    if kind in ("0x", "0b"):
        return Immediate(int(text, 0))
    if re.search(r"[.eE]", text):
        value = float(text)
        return Immediate(value, struct.unpack("<Q", struct.pack("<d", value))[0], 8)
    return Immediate(int(text, 8) if text.startswith("0") and len(text) > 1 else int(text))


class Tokens:
    """A cursor over the tokens of a PTX text."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str, int]] = []
        self.at = 0
        position, line = 0, 1
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise PtxSyntaxError(f"line {line}: cannot read {text[position : position + 20]!r}")
            if match.lastgroup != "skip":
                self.tokens.append((str(match.lastgroup), match.group(), line))
            line += match.group().count("\n")
            position = match.end()
        self.tokens.append(("end", "", line))

    def fail(self, message: str) -> PtxSyntaxError:
        """An error at the current token."""
        _, text, line = self.tokens[self.at]
        return PtxSyntaxError(f"line {line}: {message} (at {text!r})")

    @property
    def text(self) -> str:
        """Of the current token."""
        return self.tokens[self.at][1]

    @property
    def kind(self) -> str:
        """Of the current token: "word", "number", "sign", "string" or "end"."""
        return self.tokens[self.at][0]

    def take(self) -> str:
        """Passes the current token and returns it."""
        if self.kind == "end":
            raise self.fail("unexpected end of the text")
        self.at += 1
        return self.tokens[self.at - 1][1]

    def accept(self, text: str) -> bool:
        """Passes the current token if it is this one."""
        if self.text == text and self.kind != "end":
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        """Passes this token; anything else is an error."""
        if not self.accept(text):
            raise self.fail(f"expected {text!r}")

    def integer(self) -> int:
        """Passes an integer with its sign."""
        negative = self.accept("-")
        if self.kind != "number":
            raise self.fail("expected a number")
        value = literal(self.take()).value
        if not isinstance(value, int):
            raise self.fail("expected an integer")
        return -value if negative else value
