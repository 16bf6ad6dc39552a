"""Times of calls: a monotonic clock on CPUs, CUDA events around graph replays on GPUs.

A *sampler* makes a few calls, the next ones of the rotation, and gives the seconds of one. Samplers
of all contestants take turns (`kimi_ops.bench.measure`), so that a slow spell falls on all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol

import torch

Call = Callable[[int], Any]  # of a number, taken modulo the rotation
Sampler = Callable[[], float]
_LEAST_S = 1e-3  # a sample is at least so long
_MOST_CALLS = 1000


class Clock(Protocol):
    """Times calls on one device."""

    def sampler(self, call: Call, rotation: int) -> tuple[Sampler, int]:
        """A warmed-up sampler of a call, and the calls in each of its samples."""


class CpuClock:
    """Wall time of calls one after the other, until a sample takes a millisecond."""

    def sampler(self, call: Call, rotation: int) -> tuple[Sampler, int]:
        """As `Clock` has it: two calls for warming up, the second of them timed."""
        call(0)
        start = time.perf_counter()
        call(1 % rotation)
        once = time.perf_counter() - start
        calls = min(max(1, round(_LEAST_S / max(once, 1e-9))), _MOST_CALLS)
        numbers = count()

        def sample() -> float:
            places = [next(numbers) % rotation for _ in range(calls)]
            start = time.perf_counter()
            for place in places:
                call(place)
            return (time.perf_counter() - start) / calls

        return sample, calls


class CudaClock:
    """Device time of a CUDA graph that holds the whole rotation; of plain launches for what cannot
    be captured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sampler(self, call: Call, rotation: int) -> tuple[Sampler, int]:
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
            return self._sampled(lambda: [call(place) for place in range(rotation)], rotation)
        graph.replay()
        return self._sampled(graph.replay, rotation)

    def _sampled(self, run: Callable[[], object], calls: int) -> tuple[Sampler, int]:
        def sample() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(self.device):
                start.record()
                run()
                end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3 / calls

        return sample, calls


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()
