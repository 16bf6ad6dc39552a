"""How long one CTA takes alone: its chain of dependent instructions.

The trace of the longest CTA is walked once. An instruction starts when its operands are there and
when what came before its basic block has been issued; within a block the compiler is taken to have
ordered instructions as well as it can be done. A load takes as long as the level it went to; a
branch, barrier or wait ends a block. Warps that execute the same instructions throughout are one
walker; walkers meet at barriers. Asynchronous copies take their time from issue to the wait for
their group; wgmma runs in order from issue to its wait.

What this leaves out: other CTAs on the same SM (they hide latency: the model divides by how many
are resident), queues of the memory system, and ptxas's reordering across blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from kimi_ops.testing.cost.devices import Latencies, Rates
from kimi_ops.testing.ptx.trace import DRAM, L1, L2, Event, Static, Trace

# Instructions that the hardware has no work for, or whose work is not on the chain.
FREE = frozenset(
    ["mov", "cvta", "griddepcontrol", "prefetch", "prefetchu", "createpolicy", "isspacep"]
)
SPECIAL = frozenset(["ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"])
_SHUFFLES = frozenset(["shfl", "redux", "vote", "match", "activemask", "elect", "movmatrix"])
_STORES = frozenset(["st", "red", "stmatrix"])
_LOADS = frozenset(["ld", "ldu", "ldmatrix", "atom"])
_FENCES = frozenset(["membar", "fence", "setmaxnreg", "nanosleep"])
_FLOATS = frozenset(["f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64"])


class CostError(ValueError):
    """Something that the model needs is missing, contradicts the rest, or is not modelled."""


@dataclass
class _Walker:
    """Warps that execute the same: register -> time when it is ready, and the time now."""

    warps: int
    ready: dict[str, float] = field(default_factory=dict)
    now: float = 0
    latest: float = 0  # issue of any instruction of this block
    issued: float = 0  # instructions of this block
    end: float = 0  # of anything
    group: float = 0  # of the open group of copies
    groups: list[float] = field(default_factory=list)
    matrix: float = 0  # of the wgmma issued last
    stores: float = 0
    barrier: int | None = None


def _walkers(trace: Trace) -> dict[int, _Walker]:
    """Walkers by warp; warps that no event parts share one."""
    parts = [(1 << trace.warps) - 1]
    for warps in {event.warps for event in trace.events}:
        parts = [p for old in parts for p in (old & warps, old & ~warps) if p]
    found: dict[int, _Walker] = {}
    for part in parts:
        walker = _Walker(part.bit_count())
        found |= {w: walker for w in range(trace.warps) if part >> w & 1}
    return found


def chain_cycles(trace: Trace, rates: Rates, latencies: Latencies, expansion: float) -> float:
    """Clocks of the longest CTA if it had the SM to itself.

    Args:
        trace: of the launch.
        rates, latencies: of the GPU.
        expansion: machine instructions per PTX instruction, for the time that issue takes.

    Raises:
        CostError: an empty trace, or a kernel that waits on mbarriers, whose order of completion
            the trace does not have.
    """
    if not trace.events:
        raise CostError("the trace is empty: the CTA ran too many blocks of code to be recorded")
    return _Walk(trace, rates, latencies, expansion).run()


class _Walk:
    def __init__(self, trace: Trace, rates: Rates, latencies: Latencies, expansion: float) -> None:
        self.trace, self.rates, self.times = trace, rates, latencies
        self.expansion = expansion
        self.levels = {
            L1: rates.l1_latency.value,
            L2: rates.l2_latency.value,
            DRAM: rates.dram_latency.value,
        }
        self.walkers = _walkers(trace)
        self.arrived: dict[int, float] = {}
        self.latency = [self._latency(static) for static in trace.code]

    def run(self) -> float:
        for event in self.trace.events:
            walkers = {id(w): w for i, w in self.walkers.items() if event.warps >> i & 1}
            for walker in walkers.values():
                self._event(walker, event)
        end = 0.0
        for walker in self.walkers.values():
            self._close(walker, 0, walker.end, walker.matrix, walker.stores)
            end = max(end, walker.now)
        return end + self.times.launch

    def _latency(self, static: Static) -> float:
        """Of a result, where it does not depend on the level that a load goes to."""
        parts, times = static.opcode.split("."), self.times
        if parts[0] == "mbarrier" or parts[:3] == ["cp", "async", "bulk"]:
            raise CostError(
                f"{static.opcode}: the latency of kernels that wait on mbarriers or bulk copies "
                "is not modelled; give chain_cycles"
            )
        if parts[0] in FREE or "param" in parts:
            return 0
        if parts[0] in _SHUFFLES:
            return times.shuffle
        if parts[0] in SPECIAL:
            return times.special
        if parts[0] in ("div", "rem"):
            return times.divide
        if parts[0] == "cvt":
            return times.convert
        if parts[0] == "mma":
            return times.mma
        if parts[0] in _LOADS:
            return times.shared if "shared" in static.opcode or parts[0] == "ldmatrix" else 0
        return times.floating if _FLOATS & set(parts) else times.integer

    def _close(self, walker: _Walker, extra: float, *until: float) -> None:
        """Ends a block: issue is in order, so what follows starts after all of it was issued."""
        shared = max(1.0, walker.warps / self.rates.issue.value)
        issue = walker.now + walker.issued * self.expansion * shared
        walker.now = max(issue, walker.latest, *until) + extra
        walker.issued = 0

    def _event(self, walker: _Walker, event: Event) -> None:
        if walker.barrier is not None:
            self._release(walker.barrier)
        levels = dict(event.levels)
        for index in range(event.start, event.end):
            static = self.trace.code[index]
            name = static.opcode.partition(".")[0]
            if static.family in ("control", "barrier") or name in ("bar", "barrier"):
                self._synchronise(walker, static, name)
            elif name in ("cp", "wgmma"):
                self._asynchronous(walker, static, levels.get(index))
            else:
                self._plain(walker, static, name, index, levels.get(index))

    def _release(self, number: int) -> None:
        """Somebody goes on from a barrier, so all who wait there do; what they do then is later."""
        after = self.arrived.pop(number) + self.times.synchronise
        for walker in self.walkers.values():
            if walker.barrier == number:
                walker.now, walker.barrier = after, None

    def _start(self, walker: _Walker, static: Static, *, results: bool = True) -> float:
        skip = () if results else static.writes
        ready = [walker.ready[r] for r in static.reads if r in walker.ready and r not in skip]
        start = max(walker.now, *ready) if ready else walker.now
        walker.latest = max(walker.latest, start)
        return start

    def _plain(
        self, walker: _Walker, static: Static, name: str, index: int, level: int | None
    ) -> None:
        start = self._start(walker, static)
        if name not in FREE:
            walker.issued += 1
        if name in _STORES:
            walker.stores = max(walker.stores, start + self.times.store)
            return
        done = start + self.latency[index]
        if name in _LOADS and not self.latency[index] and "param" not in static.opcode:
            # A load all of whose lanes were switched off went nowhere.
            done = start + self.levels[L1 if level is None else level]
        for register in static.writes:
            walker.ready[register] = done
        walker.end = max(walker.end, done)

    def _synchronise(self, walker: _Walker, static: Static, name: str) -> None:
        walker.issued += 1
        if name not in ("bar", "barrier"):
            wait = name in _FENCES
            self._start(walker, static)
            self._close(walker, 0, walker.stores if wait else 0)
            return
        number = static.number or 0
        if "arrive" in static.opcode:
            self._close(walker, 0)
            self.arrived[number] = max(self.arrived.get(number, 0), walker.now)
            return
        self._close(walker, 0, walker.stores)
        self.arrived[number] = max(self.arrived.get(number, 0), walker.now)
        walker.barrier = number

    def _asynchronous(self, walker: _Walker, static: Static, level: int | None) -> None:
        opcode = static.opcode
        start = self._start(walker, static, results=False)
        walker.issued += 1
        if "commit" in opcode:
            if opcode.startswith("cp"):
                walker.groups.append(walker.group)
                walker.group = 0
        elif "wait" in opcode and opcode.startswith("cp"):
            keep = static.number or 0
            if "wait_all" in opcode:
                walker.groups, walker.group, keep = [*walker.groups, walker.group], 0, 0
            landed = walker.groups[: len(walker.groups) - keep]
            walker.groups = walker.groups[len(landed) :]
            self._close(walker, self.times.synchronise, *landed, 0)
        elif "wait" in opcode:
            self._close(walker, 0, walker.matrix + self.times.wgmma)
        elif opcode.startswith("cp"):
            took = self.times.shared if level is None else self.levels[level]
            walker.group = max(walker.group, start + took)
        elif "mma_async" in opcode:
            walker.matrix = max(start, walker.matrix) + self._wgmma(static) * walker.warps / 4
            for register in static.writes:
                walker.ready[register] = walker.matrix
            walker.end = max(walker.end, walker.matrix)

    def _wgmma(self, static: Static) -> float:
        """Clocks of one wgmma m64nNkK at the SM's rate; below n = 64 its rate falls ([Luo])."""
        shape = re.search(r"\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.", static.opcode + ".")
        if shape is None:
            raise CostError(f"{static.opcode}: a shape that the model does not know")
        kind = f"wgmma {shape[4]}.{shape[3]}"
        rate = self.rates.tensor.get(kind)
        if rate is None:
            raise CostError(f"{self.rates.name} has no published rate of {kind}")
        return 64 * max(int(shape[1]), 64) * int(shape[2]) / rate.value
