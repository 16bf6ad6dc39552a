"""Claims about a compiled kernel as plain asserts; each message shows the figures."""

from __future__ import annotations

from collections.abc import Mapping

from kimi_ops.testing.static.instructions import Mix
from kimi_ops.testing.static.report import KernelReport

_LOADS = ("load", "async load", "bulk load")


def assert_no_spills(report: KernelReport) -> None:
    """No register is spilled to memory.

    Scalar registers that AMD's compiler keeps in vector ones, and vector ones that it keeps in
    accumulation registers, are not in memory. Arrays that are indexed at run time live in local
    memory too but are no spills: see `assert_no_local_memory`.

    Raises:
        AssertionError: with bytes and the whole report.
    """
    amd = report.amd
    # Without scratch memory, what AMD's compiler counts went to accumulation registers.
    hidden = amd.vgpr_spills if amd and report.stack_bytes else 0
    spilled = (report.spill_store_bytes, report.spill_load_bytes, hidden)
    assert not any(spilled), (
        f"{report.case} for {report.arch} spills: {report.spill_store_bytes} B of stores, "
        f"{report.spill_load_bytes} B of loads per thread"
        f"{f', {amd.vgpr_spills} vector registers' if amd else ''}\n{report}"
    )


def assert_no_local_memory(report: KernelReport) -> None:
    """Nothing lives in local memory: no spills, no arrays, no stack.

    Raises:
        AssertionError: with bytes and the whole report.
    """
    instructions = report.mix.classes.get("local", 0)
    clean = report.stack_bytes == 0 and instructions == 0
    assert clean, (
        f"{report.case} for {report.arch} uses {report.stack_bytes} B of local memory per thread "
        f"in {instructions} instructions\n{report}"
    )


def assert_shared_memory_fits(report: KernelReport, *, blocks: int = 1) -> None:
    """Static and dynamic shared memory are within what the device gives to one block.

    Args:
        blocks: so many blocks must be resident on one SM by all limits together.

    Raises:
        AssertionError: with bytes and the whole report.
    """
    used, limit = report.shared_bytes, report.shared_limit_bytes
    assert used <= limit, (
        f"{report.case} for {report.arch} needs {used} B of shared memory per block "
        f"({report.static_shared_bytes} static, {report.dynamic_shared_bytes} dynamic), "
        f"{used - limit} B above the limit of {limit} B\n{report}"
    )
    if blocks > 1:
        _assert_resident(report, blocks, "blocks")


def assert_occupancy(report: KernelReport, *, warps: int = 0, blocks: int = 1) -> None:
    """At least so many warps (AMD: waves) and blocks can be resident on one SM.

    Raises:
        AssertionError: with figures, limit and the whole report; also where the threads per
            block are not known.
    """
    _assert_resident(report, blocks, "blocks")
    _assert_resident(report, warps, "warps")


def _assert_resident(report: KernelReport, wanted: int, what: str) -> None:
    assert report.occupancy is not None, (
        f"{report.case} for {report.arch}: threads per block not known, so no occupancy; give "
        f"threads_per_block or __launch_bounds__\n{report}"
    )
    found = getattr(report.occupancy, what)
    assert found >= wanted, (
        f"{report.case} for {report.arch}: {found} {what} per SM, wanted {wanted}; limited by "
        f"{report.occupancy.limited_by}\n{report}"
    )


def assert_registers_at_most(report: KernelReport, registers: int) -> None:
    """At most so many registers per thread.

    Raises:
        AssertionError: with figures and the whole report.
    """
    assert report.registers <= registers, (
        f"{report.case} for {report.arch}: {report.registers} registers per thread, at most "
        f"{registers} wanted\n{report}"
    )


def occurrences(mix: Mix, instruction: str) -> int:
    """How many instructions are of a kind.

    Args:
        mix: counts.
        instruction: a SASS opcode with any of its modifiers in any order, ``HMMA``, ``LDG.128``
            (but ``HMMA`` is not ``HFMA2.MMA``); or the beginning of an AMD one up to an
            underscore, ``v_mfma``.
    """
    base, *modifiers = instruction.split(".")
    total = 0
    for opcode, number in mix.opcodes.items():
        own, *rest = opcode.split(".")
        if (own == base or own.startswith(f"{base}_")) and set(modifiers) <= set(rest):
            total += number
    return total


def _scope(report: KernelReport, in_hottest_loop: bool) -> Mix:
    if not in_hottest_loop:
        return report.mix
    loop = report.hottest_loop
    assert loop is not None, f"{report.case} for {report.arch} has no loop\n{report}"
    return loop.mix


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{n} x {name}" for name, n in numbers.items()) or "nothing"


def assert_uses(
    report: KernelReport,
    instruction: str,
    *,
    at_least: int = 1,
    in_hottest_loop: bool = False,
) -> None:
    """The code has an instruction.

    Args:
        report: of the kernel.
        instruction: as for `occurrences`.
        at_least: number of instructions in the code.
        in_hottest_loop: count only there.

    Raises:
        AssertionError: with the opcodes that are there and the whole report.
    """
    mix = _scope(report, in_hottest_loop)
    found = occurrences(mix, instruction)
    assert found >= at_least, (
        f"{report.case} for {report.arch} has {found} x {instruction}"
        f"{' in its hottest loop' if in_hottest_loop else ''}, wanted {at_least}; it has "
        f"{_listed(mix.opcodes)}\n{report}"
    )


def assert_avoids(report: KernelReport, instruction: str, *, in_hottest_loop: bool = False) -> None:
    """The code does not have an instruction; arguments as for `assert_uses`.

    Raises:
        AssertionError: with the number found and the whole report.
    """
    mix = _scope(report, in_hottest_loop)
    found = occurrences(mix, instruction)
    assert found == 0, (
        f"{report.case} for {report.arch} has {found} x {instruction}"
        f"{' in its hottest loop' if in_hottest_loop else ''}, wanted none\n{report}"
    )


def assert_wide_loads(
    report: KernelReport,
    min_bits: int = 128,
    *,
    narrow_allowed: int = 0,
    in_hottest_loop: bool = False,
) -> None:
    """Global memory is read in wide pieces: registers, asynchronous copies and bulk copies alike.

    At least one load is as wide as wanted, and no more than ``narrow_allowed`` are not.

    Args:
        report: of the kernel.
        min_bits: per thread; a bulk copy is wide enough for any.
        narrow_allowed: loads in the code that are meant to be narrow (lengths, page ids).
        in_hottest_loop: look only there.

    Raises:
        AssertionError: with all global loads by width and the whole report.
    """
    mix = _scope(report, in_hottest_loop)
    loads: dict[str, int] = {}
    wide = narrow = 0
    for what, number in mix.memory.items():
        space, _, rest = what.partition(" ")
        direction = rest.rstrip("0123456789 ")
        if space not in ("global", "generic") or direction not in _LOADS:
            continue
        loads[what] = number
        bits = rest.removeprefix(direction).strip()
        if not bits or int(bits) >= min_bits:
            wide += number
        else:
            narrow += number
    enough = wide > 0 and narrow <= narrow_allowed
    assert enough, (
        f"{report.case} for {report.arch} reads global memory"
        f"{' in its hottest loop' if in_hottest_loop else ''} with {wide} loads of {min_bits} bits "
        f"or more and {narrow} narrower ones, of which {narrow_allowed} are allowed: "
        f"{_listed(loads)}\n{report}"
    )


def assert_no_notes(report: KernelReport) -> None:
    """Neither the compilers nor the report itself had a reservation.

    ptxas says here, for one, that it made asynchronous matrix products wait for each other.

    Raises:
        AssertionError: with the notes.
    """
    assert not report.notes, f"{report.case} for {report.arch}:\n" + "\n".join(report.notes)
