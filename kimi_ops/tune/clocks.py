"""What times a tile: a GPU, or the cost model over what the emulator counts.

Both have the same few methods (`Clock`). A modelled time is no measurement: it tells which resource
a tile wastes, and may be 40 % off (docs/evidence.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

import torch
from triton.errors import TritonError

from kimi_ops._dispatch import get_op
from kimi_ops._target import Target, target, targeting
from kimi_ops.kernels import _tiles
from kimi_ops.testing.check import check_op
from kimi_ops.testing.cost import CostError, cost, rates_of
from kimi_ops.testing.devices import device as limits_of
from kimi_ops.testing.inputs import CASES as HOSTILE
from kimi_ops.testing.ptx import PtxError
from kimi_ops.testing.runner import emulated, target_of
from kimi_ops.testing.ways import WAYS, with_way
from kimi_ops.tune.cases import TuneCase
from kimi_ops.tune.trials import Forced, compiled, first_line, laid_out, launch, noting

ROUNDS = 40
# Written before each timed launch: evicts L2, and keeps the GPU busy (50 us and more) while the
# host prepares the launch, so that no wait for the host is between the two events.
_FLUSH_BYTES = 256 << 20


class Clock(Protocol):
    """Checks and times tiles on one GPU.

    Attributes:
        name: "measured" or "modelled".
        product: of the GPU.
        gpu, arch: what kernels are told, and what they are compiled for.
        margin: a tile must be faster than the kernel's own by this part to replace it.
    """

    name: str
    product: str
    gpu: Target
    arch: str
    margin: float

    def wrong(self, op: str, check: str, forced: Forced) -> str | None:
        """What a hostile case found wrong with the tiles, or None."""

    def time(self, case: TuneCase, tiles: Sequence[Forced]) -> Sequence[float | str]:
        """Microseconds of the call with each choice of tiles, or why there are none."""


def medians(
    calls: Sequence[Callable[[], None]],
    rounds: int,
    time_one: Callable[[Callable[[], None]], Callable[[], float]],
) -> list[float]:
    """Median times of calls that take turns, so that a slow spell falls on all of them alike.

    Args:
        calls: what to time.
        rounds: turns of each; every other round goes backwards.
        time_one: makes one call, and gives a function that waits for its time.
    """
    taken: list[list[Callable[[], float]]] = [[] for _ in calls]
    for number in range(rounds):
        order = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
        for which in order:
            taken[which].append(time_one(calls[which]))
    return [median(wait() for wait in waits) for waits in taken]


class Measured:
    """CUDA events around single launches, L2 flushed, tiles interleaved; medians of `ROUNDS`."""

    name = "measured"
    margin = 0.02  # medians of interleaved rounds are steady to about 1 %

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device, self.product, self.gpu = device, str(properties.name), target(device)
        hip = self.gpu.vendor == "hip"
        self.arch = limits_of(f"gfx{self.gpu.capability}" if hip else self.gpu.capability).arch
        self._flush = torch.empty(
            max(_FLUSH_BYTES, 4 * int(properties.L2_cache_size)), dtype=torch.int8, device=device
        )

    def wrong(self, op: str, check: str, forced: Forced) -> str | None:
        """As `Clock` has it; on the GPU."""
        return _wrong(op, check, "triton", str(self.device), forced)

    def _one(self, call: Callable[[], None]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()

        def elapsed_us() -> float:
            end.synchronize()
            return 1e3 * float(start.elapsed_time(end))

        return elapsed_us

    def time(self, case: TuneCase, tiles: Sequence[Forced]) -> Sequence[float | str]:
        """As `Clock` has it; the full case."""
        args = case.args(case.full, self.device)
        outputs = get_op(case.op).outputs(*args)

        def call_with(forced: Forced) -> Callable[[], None]:
            def call() -> None:
                with _tiles.trying(forced):
                    launch(case.op, args, outputs)

            return call

        calls: dict[int, Callable[[], None]] = {}
        answers: list[float | str] = [0.0] * len(tiles)
        with torch.cuda.device(self.device):
            for number, forced in enumerate(tiles):
                call = call_with(forced)
                try:
                    call()  # compiles
                except TritonError as error:
                    answers[number] = first_line(error)
                else:
                    calls[number] = call
            kept = list(calls.values())
            medians(kept, 3, self._one)  # warms the GPU up
            for number, us in zip(calls, medians(kept, ROUNDS, self._one), strict=True):
                answers[number] = us
        return answers


class Modelled:
    """The cost model: the middle of its low and up, plus the launches."""

    name = "modelled"
    margin = 0.1  # less than that the model cannot tell apart

    def __init__(self, product: str) -> None:
        self._rates = rates_of(product)
        self.product, self.arch = self._rates.name, self._rates.arch
        number = limits_of(self.arch).capability
        way = next((w for w in WAYS if w.name == f"triton[sm_{number}]"), None)
        if way is None or number is None:
            raise ValueError(f"no test runs kernels for {self.arch} in the emulator")
        self._way, self._number, self.gpu = way, number, target_of(number)

    def wrong(self, op: str, check: str, forced: Forced) -> str | None:
        """As `Clock` has it; in the emulator."""
        with with_way(op, self._way) as backend:
            return _wrong(op, check, backend, "cpu", forced)

    def time(self, case: TuneCase, tiles: Sequence[Forced]) -> Sequence[float | str]:
        """As `Clock` has it; from the case's sample, executed once."""
        return [self._time(case, forced) for forced in tiles]

    def _time(self, case: TuneCase, forced: Forced) -> float | str:
        try:
            return self._modelled(case, forced)
        except (PtxError, CostError) as error:
            return first_line(error)

    def _modelled(self, case: TuneCase, forced: Forced) -> float:
        assert case.sample is not None
        args = case.args(case.sample, torch.device("cpu"))
        outputs = get_op(case.op).outputs(*args)
        full, _ = laid_out(case, self.gpu, forced)
        with (
            targeting(self.gpu),
            emulated(arch=self._number) as emulation,
            noting(execute=True) as sample,
            _tiles.trying(forced),
        ):
            launch(case.op, args, outputs)
        total = 0.0
        for whole, part, (_, report) in zip(full, sample, emulation.launches, strict=True):
            modelled = cost(
                report,
                compiled(part, self.arch),
                self._rates,
                ctas=whole.ctas,
                dram_bytes=float(whole.bytes),
            )
            total += (modelled.low_us + modelled.up_us) / 2 + modelled.launch_us
        return total


def _wrong(op: str, check: str, backend: str, device: str, forced: Forced) -> str | None:
    with _tiles.trying(forced):
        try:
            check_op(op, HOSTILE[op][check].args(), backend, device=device)
        except (AssertionError, PtxError, TritonError) as error:
            return f"{check}: {first_line(error)}"
    return None
