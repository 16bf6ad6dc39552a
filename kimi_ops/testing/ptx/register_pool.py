"""Registers that the warpgroups of a CTA hand to each other (`setmaxnreg`).

A CTA starts with as many registers per thread as ptxas gives it, all of them held. ``.dec`` puts
registers into the CTA's pool; ``.inc`` waits until the pool has enough. How many a kernel starts
with, as ptxas 13.0 was seen to decide: ``.maxnreg``; or else what ``.maxntid`` (``.reqntid``)
threads times ``.minnctapersm`` leave of 65,536, but no more than the largest ``.inc`` asks for;
both in units of 8. Without either ptxas ignores the instruction, with a remark.

Source: PTX ISA, "Miscellaneous Instructions: setmaxnreg".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kimi_ops.testing.ptx.errors import LaunchError, PtxError, Race
from kimi_ops.testing.ptx.syntax import Immediate
from kimi_ops.testing.ptx.types import WARP, Array
from kimi_ops.testing.ptx.wgmma import GROUP, Groups

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Site
    from kimi_ops.testing.ptx.machine import Machine
    from kimi_ops.testing.ptx.program import Program

_REGISTERS = 65536
_MOST = 256


def launch_registers(program: Program) -> int:
    """Registers per thread, a multiple of 8, that a kernel with ``setmaxnreg`` starts with.

    Raises:
        LaunchError: no directive says it.
    """
    threads = int(np.prod(program.required_block or program.max_block or (0,)))
    if program.max_registers:
        return -(-program.max_registers // 8) * 8
    if not threads or not program.min_ctas:
        raise LaunchError(
            f"{program.name}: ptxas ignores setmaxnreg in a kernel without .maxnreg, or .maxntid "
            "(.reqntid) and .minnctapersm: the registers at its start are unknown"
        )
    wanted = [
        int(operand.value)
        for ins in program.code
        if ins.parts[:2] == ("setmaxnreg", "inc")
        for operand in ins.operands
        if isinstance(operand, Immediate)
    ]
    share = _REGISTERS // (threads * program.min_ctas) // 8 * 8
    return min(share, _MOST, max(wanted, default=_MOST))


class RegisterPool:
    """The pools of the CTAs of a batch.

    Attributes:
        waiting: (site, first warp numbered over the batch, registers per thread) of warpgroups that
            wait for registers.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        code = machine.launch.program.code
        self._used = any(ins.parts[0] == "setmaxnreg" for ins in code)
        self._start = launch_registers(machine.launch.program) if self._used else 0
        self.reset()

    def reset(self) -> None:
        """All registers are held again, for a new batch."""
        machine = self.machine
        warps = machine.ctas * machine.warps
        self.waiting: list[tuple[Site, int, int]] = []
        # In registers per thread, over warps.
        self._free = np.zeros(machine.ctas, np.int64)
        self._held = np.full(warps, self._start, np.int64)
        self._changed = np.zeros(warps, np.int64)

    def change(self, site: Site, lanes: Array, count: int, *, more: bool) -> Groups:
        """Warpgroups, all of whose lanes are given, ask for ``count`` registers per thread.

        One that has as many already goes on: Triton gives registers back twice in a row.

        Raises:
            PtxError: fewer on ``.inc`` or more on ``.dec`` than they have.
            Race: their warps have not synchronised since the last time.
        """
        machine = self.machine
        after = site.index + 1
        go = np.zeros(machine.lanes, bool)
        for first in (lanes[:: GROUP * WARP] // WARP).tolist():
            held = int(self._held[first])
            if (count < held) if more else (count > held):
                which = "inc" if more else "dec"
                raise site.fail(
                    PtxError,
                    f"setmaxnreg.{which} to {count} registers by a warpgroup that has {held}",
                    first * WARP,
                )
            if count == held:
                go[first * WARP : (first + GROUP) * WARP] = True
                continue
            self._require_synchronised(site, first)
            if more:
                self.waiting.append((site, first, count))
            else:
                self._grant(first, count)
                go[first * WARP : (first + GROUP) * WARP] = True
        go |= self._serve(site)
        return [(after, go)] if go.any() else []

    def _grant(self, first: int, count: int) -> None:
        machine = self.machine
        own = slice(first, first + GROUP)
        self._free[first // machine.warps] -= GROUP * (count - int(self._held[first]))
        self._held[own] = count
        cta, warp = divmod(first, machine.warps)
        clock = machine.shared.races.clock
        for w in range(warp, warp + GROUP):
            self._changed[cta * machine.warps + w] = clock[cta, w, w]

    def _require_synchronised(self, site: Site, first: int) -> None:
        machine = self.machine
        cta, warp = divmod(first, machine.warps)
        own = np.arange(warp, warp + GROUP)
        seen = machine.shared.races.clock[cta][own[:, None], own]
        if (seen < self._changed[first : first + GROUP]).any():
            raise site.fail(
                Race,
                "setmaxnreg, not ordered after the last one by a barrier of the warpgroup",
                first * WARP,
            )

    def _serve(self, here: Site) -> Array:
        """Grants what can be granted; returns the lanes that go on from ``here``."""
        machine = self.machine
        go = np.zeros(machine.lanes, bool)
        left = []
        for site, first, count in self.waiting:
            needed = GROUP * (count - int(self._held[first]))
            if needed > self._free[first // machine.warps]:
                left.append((site, first, count))
                continue
            self._grant(first, count)
            lanes = np.zeros(machine.lanes, bool)
            lanes[first * WARP : (first + GROUP) * WARP] = True
            if site is here:
                go |= lanes
            else:
                machine.enter(site.index + 1, lanes)
        self.waiting = left
        return go

    def stuck(self) -> tuple[str, str]:
        """What a deadlock here is: (message, where)."""
        machine = self.machine
        site, first, count = self.waiting[0]
        cta = first // machine.warps
        held = self._held[cta * machine.warps : (cta + 1) * machine.warps : GROUP].tolist()
        message = (
            f"deadlock: setmaxnreg.inc to {count} registers waits for registers that no warpgroup "
            f"gives back: they hold {held} a thread, the pool has "
            f"{int(self._free[cta]) // GROUP}"
        )
        return message, machine.where(site.ins, first * WARP)
