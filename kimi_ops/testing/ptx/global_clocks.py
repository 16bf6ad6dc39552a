"""Happens-before through global memory: what each warp of a launch knows of the others.

Within a CTA the clocks of `SharedRaces` say it: barriers and mbarriers order accesses of every
memory. Between CTAs it takes a release pattern that an acquire pattern observes:

- release: ``st``, ``atom`` or ``red`` of release order, or a fence and after it a strong write;
- acquire: ``ld`` or ``atom`` of acquire order, or a strong read and after it a fence.

What a warp knows goes with a release (cumulativity): its own accesses, what it has seen at
barriers, what it has acquired. A location hands on what its last plain-ordered store published;
read-modify-writes add to it (a release sequence goes on through them). Memory here is sequentially
consistent, so a read observes the last write. Scopes: what is of CTA scope reaches that CTA alone;
clusters count as CTAs.

Granularity is the warp: a fence of one lane stands for those of its warp.

What a warp acquires from other CTAs is noted with its own clock at that moment; another warp of the
CTA knows it if it has seen that much of the first one's clock. So whatever joins clocks within a
CTA carries such knowledge along.

Source: PTX ISA, "Memory Consistency Model": morally strong operations, release and acquire
patterns, synchronizes, causality order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kimi_ops.testing.ptx.errors import UnsupportedPtx
from kimi_ops.testing.ptx.races import SharedRaces
from kimi_ops.testing.ptx.syntax import Instruction
from kimi_ops.testing.ptx.types import Array

# A stamp says who accessed and when: agent + 1, its clock, the instruction.
INSTRUCTION_BITS, EPOCH_BITS, AGENT_BITS = 18, 20, 25
AGENT_SHIFT = INSTRUCTION_BITS + EPOCH_BITS
_EPOCHS = (1 << EPOCH_BITS) - 1
INSTRUCTIONS = (1 << INSTRUCTION_BITS) - 1


@dataclass(frozen=True)
class Order:
    """What an instruction is in the memory model.

    Attributes:
        strong: it synchronises (relaxed or stronger, volatile, a fence); otherwise it is weak.
        acquire, release: alone, or for a fence, together with strong accesses around it.
        narrow: of CTA or cluster scope.
        bulk: of the asynchronous copy engine.
    """

    strong: bool
    acquire: bool
    release: bool
    narrow: bool
    bulk: bool


@lru_cache(maxsize=4096)
def order_of(parts: tuple[str, ...]) -> Order:
    """The order that an instruction's modifiers give it."""
    said = set(parts)
    narrow = bool(said & {"cta", "cluster"})
    if parts[0] in ("fence", "membar"):
        if "proxy" in said or "mbarrier_init" in said:
            return Order(False, False, False, narrow, False)
        return Order(True, "release" not in said, "acquire" not in said, narrow, False)
    both = "acq_rel" in said
    strong = bool(said & {"relaxed", "acquire", "release", "volatile"})
    return Order(
        parts[0] in ("atom", "red") or (parts[0] in ("ld", "st") and strong),
        both or "acquire" in said,
        both or "release" in said,
        narrow,
        "bulk" in said,
    )


@dataclass(frozen=True)
class _Snapshot:
    """What a warp knew: the clocks of its CTA [warps], and those of others [agents] or None."""

    cta: int
    row: Array
    others: Array | None


class GlobalClocks:
    """The knowledge of all warps of a launch.

    Args:
        code: of the program.
        ctas, warps: in the grid; per CTA.

    Attributes:
        synchronises: whether the program can order accesses of different CTAs at all.
    """

    def __init__(self, code: Sequence[Instruction], ctas: int, warps: int) -> None:
        if ctas * warps >= 1 << AGENT_BITS or len(code) >= 1 << INSTRUCTION_BITS:
            raise UnsupportedPtx(
                f"unsupported: races of {ctas} CTAs of {warps} warps running {len(code)} "
                "instructions; launch with Checks(global_races=False)"
            )
        self.warps, self._agents = warps, ctas * warps
        orders = [order_of(tuple(ins.parts)) for ins in code]
        self.lines = [ins.line for ins in code]
        self.opcodes = [ins.parts[0] for ins in code]
        self.strong = np.array([order.strong for order in orders])
        self.narrow = np.array([order.narrow for order in orders])
        self.bulk = np.array([order.bulk for order in orders])
        far = [order for order in orders if order.strong and not order.narrow]
        self.synchronises = any(order.acquire or order.release for order in far)
        self._has_narrow = any(order.strong and order.narrow for order in orders)
        self._wide: dict[int, Array] = {}

    def begin(self, shared: SharedRaces, cta_number: Array) -> None:
        """A new batch: its clocks, and the number of each lane's CTA in the grid."""
        self.shared, self.cta_number = shared, cta_number
        self._who = (cta_number * self.warps + shared.warp_of + 1) << AGENT_SHIFT
        self._now: Array | None = None
        self._own: dict[tuple[int, int], Array] = {}  # (address, CTA) -> published in the CTA
        self._known: dict[int, dict[int, list[tuple[int, Array]]]] = {}
        self._fenced: dict[tuple[int, int], dict[bool, _Snapshot]] = {}
        self._read: dict[tuple[int, int], list[tuple[Array | None, Array | None]]] = {}

    def stamps(self, lanes: Array, instruction: int) -> Array:
        """Stamps [k, 1] of an access by lanes [k] now."""
        if self._now is not self.shared.now:
            self._now = self.shared.now
            if int(self._now.max(initial=0)) > _EPOCHS:
                raise UnsupportedPtx(
                    f"unsupported: races over more than {_EPOCHS} barriers; launch with "
                    "Checks(global_races=False)"
                )
            self._stamp = self._who | (self._now.astype(np.int64) << INSTRUCTION_BITS)
        picked: Array = self._stamp[lanes] | instruction
        return picked[:, None]

    def cta_of(self, stamps: Array) -> Array:
        """The CTAs that left stamps."""
        cta: Array = ((stamps >> AGENT_SHIFT) - 1) // self.warps
        return cta

    def describe(self, stamp: int) -> str:
        """Who left a stamp, where, for reports."""
        cta, warp = divmod((stamp >> AGENT_SHIFT) - 1, self.warps)
        line = self.lines[stamp & INSTRUCTIONS]
        return f"CTA number {cta}, warp {warp}, at PTX line {line}"

    def kind(self, stamp: int) -> str:
        """What left a stamp: "atomic" or "access"."""
        return "atomic" if self.opcodes[stamp & INSTRUCTIONS] in ("atom", "red") else ""

    # Who knows whom

    def unordered(self, own: Array, lanes: Array, stamps: Array) -> Array:
        """Which of the accesses stamped [k, n] are not ordered before one by lanes [k] now."""
        late: Array = ((stamps ^ own) >> AGENT_SHIFT != 0) & (stamps != 0)
        if not late.any():
            return late
        rows, columns = np.nonzero(late)
        found, lane = stamps[rows, columns], lanes[rows]
        agent = (found >> AGENT_SHIFT) - 1
        epoch = (found >> INSTRUCTION_BITS) & _EPOCHS
        shared = self.shared
        near = agent // self.warps == self.cta_number[lane]
        seen = shared.clock[shared.cta_of[lane], shared.warp_of[lane], agent % self.warps]
        # A bulk copy is ordered by the mbarrier that it completes on, which is checked there.
        bulk = self.bulk[found & INSTRUCTIONS] | self.bulk[own[rows, 0] & INSTRUCTIONS]
        ordered = near & ((epoch <= seen) | bulk)
        if self._known and not near.all():
            far = np.flatnonzero(~near)
            warp = shared.cta_of[lane[far]] * self.warps + shared.warp_of[lane[far]]
            for number in np.unique(warp):
                vector = self._knowledge(*divmod(int(number), self.warps))
                if vector is not None:
                    these = far[warp == number]
                    # The strong write of a release pattern comes after its fence, and is itself
                    # ordered before what follows the read that observes it.
                    least = epoch[these] - self.strong[found[these] & INSTRUCTIONS]
                    ordered[these] = vector[agent[these]] >= np.maximum(least, 1)
        late[rows, columns] = ~ordered
        return late

    def _knowledge(self, cta: int, warp: int) -> Array | None:
        """What a warp knows of other CTAs' clocks [agents]; None: nothing."""
        vector: Array | None = None
        for other, entries in self._known.get(cta, {}).items():
            count = len(entries)
            if other != warp:
                seen = int(self.shared.clock[cta, warp, other])
                count = bisect_right(entries, seen, key=lambda entry: entry[0])
            if count:
                found = entries[count - 1][1]
                vector = found if vector is None else np.maximum(vector, found)
        return vector

    def _snapshot(self, cta: int, warp: int, number: int) -> _Snapshot:
        row = self.shared.clock[cta, warp, : self.warps].copy()
        return _Snapshot(number, row, self._knowledge(cta, warp))

    def _acquire(self, cta: int, warp: int, number: int, vector: Array) -> None:
        clock = self.shared.clock[cta, warp, : self.warps]
        np.maximum(clock, vector[number * self.warps : (number + 1) * self.warps], out=clock)
        entries = self._known.setdefault(cta, {}).setdefault(warp, [])
        if entries:
            if (vector <= entries[-1][1]).all():
                return
            vector = np.maximum(vector, entries[-1][1])
        entries.append((int(clock[warp]), vector))

    def _published(self, before: Array | None, snapshot: _Snapshot) -> Array:
        vector = np.zeros(self._agents, np.int32) if before is None else before.copy()
        if snapshot.others is not None:
            np.maximum(vector, snapshot.others, out=vector)
        part = vector[snapshot.cta * self.warps : (snapshot.cta + 1) * self.warps]
        np.maximum(part, snapshot.row, out=part)
        return vector

    # What synchronises

    def _bump(self, warps: set[tuple[int, int]]) -> None:
        """What warps do from now on is not part of what they have released."""
        for cta, warp in warps:
            self.shared.clock[cta, warp, warp] += 1
        if warps:
            self.shared.restamp()

    def access(
        self, lanes: Array, addresses: Array, order: Order, *, reads: bool, writes: bool
    ) -> None:
        """A strong access by lanes [k] at addresses [k]; it both reads and writes in an atomic."""
        if not (self.synchronises or self._has_narrow):
            return
        shared = self.shared
        places = zip(
            shared.cta_of[lanes].tolist(),
            shared.warp_of[lanes].tolist(),
            self.cta_number[lanes].tolist(),
            addresses.tolist(),
            strict=True,
        )
        released: set[tuple[int, int]] = set()
        for cta, warp, number, address in dict.fromkeys(places):
            if reads:
                self._observe(cta, warp, number, address, order)
            if writes:
                keep = reads
                if order.release:
                    snapshot = self._snapshot(cta, warp, number)
                    released.add((cta, warp))
                    fenced = {order.narrow: snapshot, True: snapshot}
                else:
                    fenced = self._fenced.get((cta, warp), {})
                self._publish(number, address, fenced, keep=keep, narrow=order.narrow)
        self._bump(released)

    def _observe(self, cta: int, warp: int, number: int, address: int, order: Order) -> None:
        wide = None if order.narrow else self._wide.get(address)
        own = self._own.get((address, number))
        if wide is None and own is None:
            return
        if order.acquire:
            for vector in (wide, own):
                if vector is not None:
                    self._acquire(cta, warp, number, vector)
            return
        seen = self._read.setdefault((cta, warp), [])
        if not any(w is wide and o is own for w, o in seen):
            seen.append((wide, own))

    def _publish(
        self, number: int, address: int, fenced: dict[bool, _Snapshot], *, keep: bool, narrow: bool
    ) -> None:
        if not keep:
            self._wide.pop(address, None)
            self._own.pop((address, number), None)
        wide, own = None if narrow else fenced.get(False), fenced.get(True)
        if wide is not None:
            self._wide[address] = self._published(self._wide.get(address), wide)
        if own is not None and self._has_narrow:
            key = address, number
            self._own[key] = self._published(self._own.get(key), own)

    def fence(self, lanes: Array, order: Order) -> None:
        """A fence by lanes [k]."""
        if not (self.synchronises or self._has_narrow):
            return
        shared = self.shared
        warps = dict.fromkeys(
            zip(
                shared.cta_of[lanes].tolist(),
                shared.warp_of[lanes].tolist(),
                self.cta_number[lanes].tolist(),
                strict=True,
            )
        )
        for cta, warp, number in warps:
            if order.acquire:
                left = []
                for wide, own in self._read.pop((cta, warp), []):
                    if own is not None:
                        self._acquire(cta, warp, number, own)
                    if wide is not None and order.narrow:
                        left.append((wide, None))
                    elif wide is not None:
                        self._acquire(cta, warp, number, wide)
                if left:
                    self._read[cta, warp] = left
            if order.release:
                snapshot = self._snapshot(cta, warp, number)
                fenced = self._fenced.setdefault((cta, warp), {})
                fenced[True] = snapshot
                if not order.narrow:
                    fenced[False] = snapshot
        if order.release:
            self._bump({(cta, warp) for cta, warp, _ in warps})
