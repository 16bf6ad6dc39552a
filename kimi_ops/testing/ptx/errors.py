"""What the emulator reports. Every report is an exception; nothing is a warning."""

from __future__ import annotations


class PtxError(Exception):
    """Base of all reports.

    Attributes:
        message: what is wrong.
        where: kernel, source line, CTA, warp, lane and instruction, as far as they are known.
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(f"{message}\n  at {where}" if where else message)
        self.message = message
        self.where = where


class PtxSyntaxError(PtxError):
    """Text that is not PTX, or PTX that the parser does not know; names the line."""


class UnsupportedPtx(PtxError):  # noqa: N818  (named for what it says about the text)
    """An opcode, modifier, type, directive or operand that no instruction family implements."""


class LaunchError(PtxError, ValueError):
    """Arguments, grid or block that do not fit the kernel."""


class OutOfBounds(PtxError):  # noqa: N818
    """An access outside the memory that the launch owns."""


class Misaligned(PtxError):  # noqa: N818
    """An address that is no multiple of the access size."""


class Uninitialised(PtxError):  # noqa: N818
    """A read of a register or of memory that nothing has written."""


class Race(PtxError):  # noqa: N818
    """Two accesses that no synchronisation orders, one of them a write."""


class MissingWait(PtxError):  # noqa: N818
    """A use of memory while an asynchronous copy into it is in flight."""


class MissingFence(PtxError):  # noqa: N818
    """An asynchronous use of what the generic proxy wrote, without a proxy fence in between."""


class MbarrierError(PtxError):
    """An mbarrier that is used against its rules: not initialised, too many arrivals, ..."""


class Divergence(PtxError):  # noqa: N818
    """A barrier or warp collective that not all the threads it names execute."""


class Deadlock(PtxError):  # noqa: N818
    """Nothing can run any more, or a loop makes no progress."""


class DivisionByZero(PtxError):  # noqa: N818
    """An integer division by zero: a machine-specific value (PTX ISA: div)."""
