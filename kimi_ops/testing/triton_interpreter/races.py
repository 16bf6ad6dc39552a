"""Which program, and which lane of it, used each piece of global memory, and in what order.

Programs run one after the other, each to its end. So "earlier in this launch, by another program"
is a range of access numbers, and a race needs no clock to be seen: two programs used an address,
one of them wrote it plainly, and no atomic of theirs ordered the two.

Shadow arrays hold access numbers, one per granule of memory; numbers only grow, so nothing is
cleared between launches. Granules that no kernel touches cost no memory (pages of zeros).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kimi_ops.testing.triton_interpreter.faults import Place

Array = np.ndarray[Any, Any]

MANY_LANES = 0xFFFF_FFFF


class Ledger:
    """Numbers the accesses of a launch and knows which of them are ordered.

    Attributes:
        program_start: first number of the program that runs now; what the launch numbered before
            belongs to other programs.
        barrier_start: first number since that program's last barrier.
    """

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._launch_start = 1
        self.program_start = 1
        self.barrier_start = 1
        self._numbers: dict[Place, int] = {}
        self._starts: list[int] = []
        self._acquired: Array | None = None
        self._released: list[Array] = []
        self._programs = 0

    def _next(self) -> int:
        return len(self._places) + 1

    def begin_launch(self, programs: int) -> None:
        """Starts a launch of that many programs; what came before is ordered before it."""
        self._launch_start = self._next()
        self._starts = []
        self._programs = programs
        # Number 0 in a shadow array means that nothing was released there.
        self._released = [np.zeros(0, np.uint32)]

    def begin_program(self) -> None:
        """Starts the next program."""
        self.program_start = self._next()
        self._starts.append(self.program_start)
        self._acquired = None
        self.barrier()

    def barrier(self) -> None:
        """All threads of the program have met: its earlier accesses are ordered for itself."""
        self.barrier_start = self._next()
        self._numbers = {}

    def number(self, place: Place) -> int:
        """The number of an access at this place; the same until the next barrier."""
        found = self._numbers.get(place)
        if found is None:
            self._places.append(place)
            found = self._numbers[place] = len(self._places)
        return found

    def place(self, number: int) -> Place:
        """Where the access with this number happened."""
        return self._places[number - 1]

    def unordered(self, numbers: Array) -> Array:
        """Mask of accesses by other programs of this launch that nothing orders before now."""
        other = (numbers >= self._launch_start) & (numbers < self.program_start)
        if self._acquired is not None and other.any():
            program = np.searchsorted(self._starts, numbers[other], "right") - 1
            other[other] = numbers[other] > self._acquired[program]
        return other

    def unsynchronised(self, numbers: Array, lanes: Array, mine: Array) -> Array:
        """Mask of accesses by this program since its barrier, made by another lane than mine."""
        result: Array = (numbers >= self.barrier_start) & (lanes != mine)
        return result

    def is_own(self, numbers: Array) -> Array:
        """Mask of accesses by this program since its barrier."""
        return numbers >= self.barrier_start

    def is_old(self, numbers: Array) -> Array:
        """Mask of accesses of earlier launches, and of no access."""
        return numbers < self._launch_start

    def synchronise(self, at: Array, acquire: bool, release: bool) -> Array | None:
        """One atomic operation orders what its addresses released before, and what comes after.

        Args:
            at: what `Shadow.sync` holds at its addresses, uint32.
            acquire, release: its semantics.

        Returns:
            What `Shadow.sync` is to hold there from now on, or None for what it holds.
        """
        known = np.unique(at)
        known = known[known > 0]
        if acquire:
            for index in known:
                if self._acquired is None:
                    self._acquired = np.zeros(self._programs, np.uint32)
                np.maximum(self._acquired, self._released[index], out=self._acquired)
        if not release:
            return None
        if len(known) == 1 and (at > 0).all():
            clock, result = self._released[known[0]], None
        else:
            clock = np.zeros(self._programs, np.uint32)
            for index in known:
                np.maximum(clock, self._released[index], out=clock)
            self._released.append(clock)
            result = np.full(at.shape, len(self._released) - 1, np.uint32)
        if self._acquired is not None:
            np.maximum(clock, self._acquired, out=clock)
        clock[len(self._starts) - 1] = self._next() - 1
        return result


class Shadow:
    """The last uses of each granule of one storage.

    Args:
        nbytes: of the storage.
        granule: bytes that share one entry; a narrower access makes it smaller.
    """

    _NAMES = (
        "writer",
        "writer_lane",
        "reader",
        "reader_lane",
        "second_reader",
        "atomic",
        "second_atomic",
        "sync",
    )

    def __init__(self, nbytes: int, granule: int) -> None:
        self.granule = granule
        self._nbytes = nbytes
        self._arrays: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        found = self._arrays.get(name)
        if found is None:
            assert name in self._NAMES
            size = -(-self._nbytes // self.granule)
            found = self._arrays[name] = np.zeros(size, np.uint32)
        return found

    def _indices(self, offsets: Array, size: int, lanes: Array) -> tuple[Array, Array, int]:
        """Entries of accesses of `size` bytes at byte `offsets`, their lanes, entries each."""
        if size < self.granule:
            factor = self.granule // size
            for name, array in self._arrays.items():
                self._arrays[name] = np.repeat(array, factor)
            self.granule = size
        each = size // self.granule
        first = offsets // self.granule
        if each == 1:
            return first, lanes, 1
        indices = (first[:, None] + np.arange(each)).reshape(-1)
        return indices, np.repeat(lanes, each), each

    def _seen(
        self, ledger: Ledger, names: tuple[str, ...], at: Array, each: int
    ) -> Iterator[tuple[str, int, int]]:
        """Races with the accesses recorded under `names`: (kind, position, number)."""
        for name in names:
            if name not in self._arrays:
                continue
            numbers = self[name][at]
            bad = ledger.unordered(numbers)
            if bad.any():
                first = int(bad.argmax())
                yield "race", first // each, int(numbers[first])

    def load(
        self, ledger: Ledger, offsets: Array, size: int, lanes: Array, number: int
    ) -> Iterator[tuple[str, int, int]]:
        """Records a load, and yields its conflicts: (kind, position in `offsets`, number)."""
        at, lanes, each = self._indices(offsets, size, lanes)
        yield from self._seen(ledger, ("writer", "atomic", "second_atomic"), at, each)
        if "writer" in self._arrays:
            numbers = self["writer"][at]
            bad = ledger.unsynchronised(numbers, self["writer_lane"][at], lanes)
            if bad.any():
                first = int(bad.argmax())
                yield "unsynchronised", first // each, int(numbers[first])
        reader, reader_lane = self["reader"], self["reader_lane"]
        before = reader[at]
        new = ledger.is_old(before)
        again = ledger.is_own(before)
        if again.any():
            mixed = again & (reader_lane[at] != lanes)
            reader_lane[at[mixed]] = MANY_LANES
        late = ~new & (before < ledger.program_start)
        if late.any():
            self["second_reader"][at[late]] = number
        # This program's reads before its barrier no longer matter to itself.
        mine = new | (~late & ~again)
        reader[at[mine]] = number
        reader_lane[at[mine]] = lanes[mine]
        twice = reader_lane[at[mine]] != lanes[mine]
        reader_lane[at[mine][twice]] = MANY_LANES

    def store(
        self, ledger: Ledger, offsets: Array, size: int, lanes: Array, number: int
    ) -> Iterator[tuple[str, int, int]]:
        """Records a store, and yields its conflicts: (kind, position in `offsets`, number)."""
        at, lanes, each = self._indices(offsets, size, lanes)
        names = ("writer", "reader", "second_reader", "atomic", "second_atomic")
        yield from self._seen(ledger, names, at, each)
        for name in ("writer", "reader"):
            if name in self._arrays:
                numbers = self[name][at]
                bad = ledger.unsynchronised(numbers, self[f"{name}_lane"][at], lanes)
                if bad.any():
                    first = int(bad.argmax())
                    yield "unsynchronised", first // each, int(numbers[first])
        writer_lane = self["writer_lane"]
        writer_lane[at] = lanes
        self["writer"][at] = number
        lost = writer_lane[at] != lanes
        if lost.any():
            yield "overlapping store", int(lost.argmax()) // each, number

    def atomic(
        self,
        ledger: Ledger,
        offsets: Array,
        size: int,
        number: int,
        acquire: bool,
        release: bool,
    ) -> Iterator[tuple[str, int, int]]:
        """Records an atomic operation, and yields its conflicts with plain accesses."""
        at, _, each = self._indices(offsets, size, np.zeros(len(offsets), np.uint32))
        if acquire or release:
            held = ledger.synchronise(self["sync"][at], acquire, release)
            if held is not None:
                self["sync"][at] = held
        yield from self._seen(ledger, ("writer", "reader", "second_reader"), at, each)
        before = self["atomic"][at]
        late = ~ledger.is_old(before) & (before < ledger.program_start)
        self["second_atomic"][at[late]] = number
        self["atomic"][at[~late]] = number
