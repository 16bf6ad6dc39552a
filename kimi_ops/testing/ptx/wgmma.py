"""What outlives a `wgmma` instruction: who is where, which registers and operands are in use.

A warpgroup is four warps of a CTA, the first a multiple of four. Its instructions are collective:
they are done when all four warps have come. A `wgmma.mma_async` is computed when it is issued; the
difference to computing it later cannot be seen, since from issue to wait

- no instruction may touch its accumulators or the registers that hold A, except another
  `wgmma.mma_async` of the same shape that accumulates into the same registers, or one that reads
  the same A;
- nothing may write to its matrices in shared memory (`proxies`).

Between an access to a register and a `wgmma.mma_async` that uses it there must be a `wgmma.fence`,
except between accumulations of one shape into the same registers; and one before the first.

A group of operations is the warpgroup's: whichever of its warps has waited knows that the reads of
all are over. Before an operation each of the four warps must be ordered after who wrote A and B,
all of them, though a warp multiplies its own 16 rows of A only.

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions":
"Warpgroup", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from kimi_ops.testing.ptx.errors import Divergence, MissingFence, MissingWait
from kimi_ops.testing.ptx.syntax import Instruction, Vector
from kimi_ops.testing.ptx.types import WARP, Array
from kimi_ops.testing.ptx.uses import names

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Active, Site, Step
    from kimi_ops.testing.ptx.machine import Machine
    from kimi_ops.testing.ptx.proxies import AsyncRead

GROUP = 4
Groups: TypeAlias = list[tuple[int, Array | None]]


def is_mma(ins: Instruction) -> bool:
    """Whether it is a ``wgmma.mma_async``."""
    return ins.parts[:2] == ("wgmma", "mma_async")


def _fragments(ins: Instruction) -> Iterator[str]:
    for operand in ins.operands[:2]:
        if isinstance(operand, Vector):
            yield from names(operand)


class Warpgroups:
    """The warpgroups of a batch.

    Attributes:
        waiting: (site, mask of lanes) of warps that wait for the others of their warpgroup.
        tracked: registers that some wgmma holds a fragment in -> row of the tables below.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        code = machine.launch.program.code
        used = sorted({name for ins in code if is_mma(ins) for name in _fragments(ins)})
        self.tracked = {name: row for row, name in enumerate(used)}
        self._uses: dict[tuple[object, ...], int] = {}
        self.waiting: list[tuple[Site, Array]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for a new batch."""
        registers, warps = len(self.tracked), self.machine.ctas * self.machine.warps
        self.waiting = []
        self._reads: list[tuple[AsyncRead, int, int]] = []
        # Per register and warp: the group of the last operation in which it is, and how it is used
        # there; the line of the last other access, and the last operation's use, since the fence.
        self._group = np.full((registers, warps), -1, np.int64)
        self._use = np.zeros((registers, warps), np.int64)
        self._touched = np.zeros((registers, warps), np.int64)
        self._since = np.zeros((registers, warps), np.int64)
        self._line = np.zeros((registers, warps), np.int64)
        # Per warp: groups committed, groups known to be complete, last group with an operation.
        self._open = np.zeros(warps, np.int64)
        self._done = np.zeros(warps, np.int64)
        self._last = np.full(warps, -1, np.int64)
        self._last_site: dict[int, Site] = {}
        self._fenced = np.zeros(warps, bool)
        self._flying = False

    # Meeting of the four warps

    def meet(self, site: Site, active: Active) -> Array | None:
        """Lets warps wait for their warpgroup: the lanes of those that are complete, or None.

        Raises:
            Divergence: warps of one warpgroup at different instructions, or an incomplete one.
        """
        machine = self.machine
        warps = active.warps
        own = warps % machine.warps
        lonely = own // GROUP * GROUP + GROUP > machine.warps
        if lonely.any():
            raise site.fail(
                Divergence,
                f"{site.ins.opcode} by a warp outside of any warpgroup of four: the CTA has "
                f"{machine.warps} warps",
                int(warps[lonely][0]) * WARP,
            )
        if not self.waiting:
            whole = len(warps) % GROUP == 0 and not (own[::GROUP] % GROUP).any()
            if whole and (warps[::GROUP] + GROUP - 1 == warps[GROUP - 1 :: GROUP]).all():
                return active.lanes
        self.waiting.append((site, active.mask.copy()))
        here = np.zeros(machine.lanes, bool)
        for other, mask in self.waiting:
            here |= mask
            if other is not site:
                self._require_same(site, active.mask, other, mask)
        complete = self._whole(here)
        if not complete.any():
            return None
        self.waiting = [
            (other, mask & ~complete) for other, mask in self.waiting if (mask & ~complete).any()
        ]
        return np.flatnonzero(complete)

    def _number(self, mask: Array) -> Array:
        """Warpgroups of the batch that lanes of a mask are in."""
        machine = self.machine
        warps = np.flatnonzero(mask.reshape(-1, WARP).any(axis=1))
        cta, own = np.divmod(warps, machine.warps)
        groups: Array = np.unique(cta * machine.warps + own // GROUP * GROUP)
        return groups

    def _whole(self, mask: Array) -> Array:
        """Lanes of a mask whose four warps are all in it."""
        warps = mask.reshape(-1, WARP).any(axis=1)
        out = np.zeros(len(warps), bool)
        for first in self._number(mask):
            out[first : first + GROUP] = warps[first : first + GROUP].all()
        return np.repeat(out, WARP)

    def _require_same(self, site: Site, mask: Array, other: Site, others: Array) -> None:
        common = np.intersect1d(self._number(mask), self._number(others))
        if len(common):
            lanes = np.arange(common[0] * WARP, (common[0] + GROUP) * WARP)
            raise site.fail(
                Divergence,
                f"warps of one warpgroup execute different instructions: the others wait at "
                f"{other.ins.opcode}, PTX line {other.line}",
                int(lanes[mask[lanes]][0]),
            )

    def stuck(self) -> tuple[str, str]:
        """What a deadlock here is: (message, where)."""
        site, mask = self.waiting[0]
        lane = int(mask.argmax())
        first = int(self._number(mask)[0])
        here = mask.reshape(-1, WARP).any(axis=1)[first : first + GROUP]
        came = (np.flatnonzero(here) + first % self.machine.warps).tolist()
        message = f"deadlock: of a warpgroup only warps {came} come to {site.ins.opcode}"
        return message, self.machine.where(site.ins, lane)

    # Registers

    def watch(self, step: Step, members: Sequence[int]) -> Step:
        """The step of instructions that run as one, after a check of the registers they touch."""
        machine = self.machine
        code, uses = machine.launch.program.code, machine.launch.uses
        touched = [
            (name, index)
            for index in members
            if not is_mma(code[index])
            for name in sorted((uses[index][0] | uses[index][1]) & self.tracked.keys())
        ]
        if not touched:
            return step
        rows = np.array([self.tracked[name] for name, _ in touched])
        lines = np.array([[machine.sites[index].line] for _, index in touched])

        def watched(active: Active) -> object:
            warps = active.warps
            at = (rows[:, None], warps)
            if self._flying:
                busy = self._group[at] >= self._done[warps]
                if busy.any():
                    row, column = np.argwhere(busy)[0]
                    name, index = touched[row]
                    reads, writes = uses[index]
                    how = "written" if name in writes else "read"
                    how = "changed" if name in reads and name in writes else how
                    raise self._in_flight(machine.sites[index], int(warps[column]), name, how)
            self._touched[at] = lines
            return step(active)

        return watched

    def _in_flight(self, site: Site, warp: int, name: str, how: str) -> MissingWait:
        line = int(self._line[self.tracked[name], warp])
        error = site.fail(
            MissingWait,
            f"register {name} is {how} while the wgmma issued at PTX line {line} that uses it is "
            "in flight: no wgmma.wait_group for its group",
            warp * WARP,
        )
        assert isinstance(error, MissingWait)
        return error

    def issue(
        self, site: Site, first: Array, use: tuple[object, ...], d: list[str], a: list[str]
    ) -> None:
        """A ``wgmma.mma_async`` of warpgroups.

        Args:
            first: [k] first warp of each, numbered over the batch.
            use: its shape and type of result.
            d, a: registers of the accumulator and of A.

        Raises:
            MissingWait: a register that another operation in flight uses otherwise.
            MissingFence: a register touched since the last ``wgmma.fence``, or none before.
        """
        warps = (first[:, None] + np.arange(GROUP)).reshape(-1)
        if not self._fenced[warps].all():
            warp = int(warps[~self._fenced[warps]][0])
            raise site.fail(
                MissingFence, "no wgmma.fence before the first wgmma.mma_async", warp * WARP
            )
        accumulates = self._uses.setdefault((*use, *d), len(self._uses) + 2)
        # 1 stands for the registers of A: two operations may read the same.
        for registers, mine in ((d, accumulates), (a, 1)):
            if not registers:
                continue
            rows = np.array([self.tracked[name] for name in registers])
            at = (rows[:, None], warps)
            other = self._use[at] != mine
            busy = (self._group[at] >= self._done[warps]) & other
            if busy.any():
                row, column = np.argwhere(busy)[0]
                how = "used otherwise (another shape, or in another place)"
                raise self._in_flight(site, int(warps[column]), registers[row], how)
            since = self._since[at]
            late = (self._touched[at] != 0) | ((since != 0) & (since != mine))
            if late.any():
                row, column = np.argwhere(late)[0]
                touched = int(self._touched[at][row, column]) or int(self._line[at][row, column])
                raise site.fail(
                    MissingFence,
                    f"register {registers[row]}, accessed at PTX line {touched}, is used without "
                    "a wgmma.fence in between",
                    int(warps[column]) * WARP,
                )
            self._group[at] = self._open[warps]
            self._use[at] = self._since[at] = mine
            self._line[at] = site.line
        self._last[warps] = self._open[warps]
        self._last_site |= dict.fromkeys(warps.tolist(), site)
        self._flying = True

    def hold(self, read: AsyncRead, first: int) -> None:
        """Keeps the operands of the operation just issued by a warpgroup until it is waited for."""
        self._reads.append((read, first, int(self._open[first])))

    # Fence, groups, exit

    def fence(self, warps: Array) -> None:
        """Orders what warps have done to registers before what wgmma will."""
        self._fenced[warps] = True
        self._touched[:, warps] = 0
        self._since[:, warps] = 0

    def commit(self, warps: Array) -> None:
        """Closes the open group."""
        self._open[warps] += 1

    def wait(self, warps: Array, pending: int) -> None:
        """Waits until at most ``pending`` committed groups of the warps are in flight."""
        self._done[warps] = np.maximum(self._done[warps], self._open[warps] - pending)
        shared = self.machine.shared
        left = []
        for read, first, group in self._reads:
            if group < self._done[first]:
                cta, own = divmod(first, self.machine.warps)
                warps_of_it = own + np.arange(GROUP)
                shared.async_reads.end_together(read, cta, own // GROUP, warps_of_it)
            else:
                left.append((read, first, group))
        self._reads = left
        self._flying = bool((self._last >= self._done).any())

    def leave(self, mask: Array) -> None:
        """Lanes exit.

        Raises:
            MissingWait: with an operation in flight.
            Divergence: while others of their warpgroup wait for them.
        """
        if not self.tracked:
            return
        warps = np.flatnonzero(mask.reshape(-1, WARP).any(axis=1))
        flying = self._last[warps] >= self._done[warps]
        if flying.any():
            warp = int(warps[flying][0])
            raise self._last_site[warp].fail(
                MissingWait,
                "the warp exits with this wgmma in flight: no wgmma.commit_group and "
                "wgmma.wait_group for it",
                warp * WARP,
            )
        for site, others in self.waiting:
            common = np.intersect1d(self._number(mask), self._number(others))
            if len(common):
                raise site.fail(
                    Divergence,
                    "another warp of the warpgroup exits without executing this",
                    int(others.argmax()),
                )
