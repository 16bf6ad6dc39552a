"""Times of calls: a monotonic clock on CPUs, CUDA events around graph replays on GPUs.

A *sampler* makes a few calls, the next ones of the rotation, and gives the seconds of one. Samplers
of all contestants take turns (`kimi_ops.bench.measure`), so that a slow spell falls on all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Protocol

import torch

Call = Callable[[int], Any]  # of a number, taken modulo the rotation
Sampler = Callable[[], float]
_LEAST_S = 1e-3  # a sample is at least so long
_MOST_CALLS = 1000
_LONG_S = 0.25  # a call that has warmed up by itself


class Timed(NamedTuple):
    """A warmed-up sampler.

    Attributes:
        sample: makes the next calls and gives the seconds of one.
        calls: in a sample.
        how: "wall clock", "graph", or "launches" (of the host, one by one).
    """

    sample: Sampler
    calls: int
    how: str


class Clock(Protocol):
    """Times calls on one device."""

    def sampler(self, call: Call, rotation: int) -> Timed:
        """A sampler of a call whose numbers go round in a rotation."""


class CpuClock:
    """Wall time of calls one after the other, until a sample takes a millisecond."""

    def sampler(self, call: Call, rotation: int) -> Timed:
        """As `Clock` has it: two calls for warming up, or one that is long."""
        for number in range(2):
            start = time.perf_counter()
            call(number % rotation)
            once = time.perf_counter() - start
            if once > _LONG_S:
                break
        calls = min(max(1, round(_LEAST_S / max(once, 1e-9))), _MOST_CALLS)
        numbers = count()

        def sample() -> float:
            places = [next(numbers) % rotation for _ in range(calls)]
            start = time.perf_counter()
            for place in places:
                call(place)
            return (time.perf_counter() - start) / calls

        return Timed(sample, calls, "wall clock")


class CudaClock:
    """Device time of a CUDA graph that holds the whole rotation; of plain launches, which may wait
    for the host, for what cannot be captured: `Timed.how` says which."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sampler(self, call: Call, rotation: int) -> Timed:
        """As `Clock` has it; the rotation is run once for warming up, on a stream of its own."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            for place in range(rotation):
                call(place)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                for place in range(rotation):
                    call(place)
        except RuntimeError:  # what waits for the device cannot be captured
            torch.cuda.synchronize(self.device)
            each = partial(self._sample, lambda: [call(n) for n in range(rotation)], rotation)
            return Timed(each, rotation, "launches")
        graph.replay()
        return Timed(partial(self._sample, graph.replay, rotation), rotation, "graph")

    def _sample(self, run: Callable[[], object], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            start.record()
            run()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / calls


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()
