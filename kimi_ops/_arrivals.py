"""Counters by which the last program of a launch finds out that it is the last.

    store(result);  barrier;  ticket = atomic_add(counter, 1, acq_rel, gpu)
    if ticket == programs - 1:  every other program's result can be read;  counter = 0

A counter has to be 0 at entry, and a launch that zeroes it would be a second launch. So counters
are zeroed once, when they are allocated, and each launch leaves its own at 0. That is safe as long
as no two launches that may overlap share a counter:

- Launches on one stream never overlap: they share the counters of their stream.
- A launch recorded into a CUDA graph may be replayed on any stream, next to any other launch: it
  gets counters that are never handed out again. One graph's replays do not overlap, as their
  outputs would be shared too.
- Recording when no counters are left or the device has none yet: they are allocated in the graph,
  zeroed by a node of it. That costs a launch, so one eager call before recording is worth it.

What breaks it: a launch that is killed halfway (the CUDA context is then lost with all its memory),
and a stream destroyed while its work runs whose handle a new stream gets. The first call on a
device waits for it, which breaks a recording that another thread has begun there. Without a GPU
(the interpreter, the emulator) every call has counters of its own.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Counters of a launch (16-byte aligned), and launches that a device's counters are enough for: 60
# layers recorded at 270 batch sizes. 768 KiB a device.
PER_LAUNCH = 12
_LAUNCHES = 1 << 14


@dataclass
class _Pool:
    """Counters of one device: some given to streams, the others not yet given to anybody."""

    counters: Tensor
    given: int = 0
    of_stream: dict[int, Tensor] = field(default_factory=dict)

    def take(self) -> Tensor | None:
        if self.given == _LAUNCHES:
            return None
        start = self.given * PER_LAUNCH
        self.given += 1
        return self.counters[start : start + PER_LAUNCH]


_POOLS: dict[int, _Pool] = {}
_LOCK = threading.Lock()


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def counters(device: torch.device) -> Tensor:
    """``[PER_LAUNCH]`` int32 zeros for one launch on the current stream, which must zero them."""
    if device.type != "cuda":
        return _zeros(device, PER_LAUNCH)
    index = torch.cuda.current_device() if device.index is None else device.index
    recording = torch.cuda.is_current_stream_capturing()
    stream = int(torch.cuda.current_stream(index).cuda_stream)
    with _LOCK:
        pool = _POOLS.get(index)
        if pool is None and not recording:
            # Waits for the zeros, once per device, so that every stream sees them.
            pool = _POOLS[index] = _Pool(_zeros(device, PER_LAUNCH * _LAUNCHES))
            torch.cuda.synchronize(index)
        mine = None if pool is None or recording else pool.of_stream.get(stream)
        if mine is None and pool is not None:
            mine = pool.take()
            if mine is not None and not recording:
                pool.of_stream[stream] = mine
    return _zeros(device, PER_LAUNCH) if mine is None else mine
