"""Checks a case, then times its contestants in turn: our backends, the peers, the ceiling.

Every round makes one sample of each, forwards and backwards by turns, and ratios are medians over
rounds: what slows the machine down slows both sides of a ratio. Calls rotate over inputs that
together exceed the caches, so that each finds its own cold, as between the layers of a model.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kimi_ops._dispatch import Op, get_op, use_backend
from kimi_ops.bench import oracle
from kimi_ops.bench.case import Args, BenchCase, Maker, Work
from kimi_ops.bench.ceilings import Ceilings
from kimi_ops.bench.clock import Call, Clock, Sampler
from kimi_ops.bench.memory import available_bytes, cache_bytes
from kimi_ops.bench.peers import Declined
from kimi_ops.bench.record import MEASURED, SKIPPED, WRONG, Row
from kimi_ops.quant import latent_fp8
from kimi_ops.testing.check import as_tuple
from kimi_ops.testing.latent_fp8 import is_written_fp8

APART = 2e-2  # relative L2 between a peer's result and ours; a peer may declare its own
_ROTATION = (3, 32)  # calls, at least and at most
_SHARE_OF_MEMORY = 0.6


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: of samples of every contestant.
        seconds: after so long a case makes no further round, but never fewer than `least`.
        least: rounds.
    """

    rounds: int = 25
    seconds: float = 1.5
    least: int = 7


class TooLarge(Exception):  # noqa: N818  no error: a machine it is not for
    """A case that wants more memory than there is."""


@dataclass
class _Contestant:
    name: str
    ours: bool
    error: float
    sample: Sampler
    calls: int
    how: str


def bytes_of(calls: Sequence[Args]) -> int:
    """Of all tensors; a storage that several of them share counts once."""
    tensors = (arg for call in calls for arg in call if isinstance(arg, Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    # Python's object is made anew at every call: torch's own tells storages apart.
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def rotation(case: BenchCase, device: torch.device) -> list[Args]:
    """The calls of a case, enough of them to exceed the caches.

    Raises:
        TooLarge: it wants more memory than the device has free.
    """
    free = available_bytes(device)
    wanted = bytes_of([next(case.calls(Maker("meta")))])
    if wanted > _SHARE_OF_MEMORY * free:
        raise TooLarge(f"wants {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    endless = case.calls(Maker(device))
    first = next(endless)
    touched = case.work(*first).bytes
    least, most = _ROTATION
    number = min(max(least, -int(-2 * cache_bytes(device) // max(touched, 1))), most)
    calls = [first]
    for call in islice(endless, number - 1):
        before = bytes_of(calls)
        calls.append(call)
        now = bytes_of(calls)
        if len(calls) >= least and now + (now - before) > _SHARE_OF_MEMORY * free:
            break
    return calls


def _results(op: Op, call: Args, outputs: Any) -> tuple[Tensor, ...]:
    return (*as_tuple(outputs), *(call[op.params.index(name)] for name in op.mutates))


def checked(op: Op, backend: str, call: Args) -> tuple[float, tuple[Tensor, ...]]:
    """Error share and results of one call, on copies of what the op writes."""
    written = [op.params.index(name) for name in op.mutates]
    mine = [arg.clone() if place in written else arg for place, arg in enumerate(call)]
    with use_backend(f"{op.name}={backend}"):
        outputs = op.overload(*mine)
    results = _results(op, tuple(mine), outputs)
    return oracle.check(op, call, results), results


def _ours(op: Op, calls: Sequence[Args]) -> Call:
    def call(number: int) -> Any:
        return op.overload(*calls[number])

    return call


def _choosing(op: Op, backend: str, sample: Sampler) -> Sampler:
    """A sampler under its backend, chosen outside of what it times."""

    def chosen() -> float:
        with use_backend(f"{op.name}={backend}"):
            return sample()

    return chosen


def _rested(sample: Sampler, rest_s: float) -> Sampler:
    """A sampler that waits, after what it times, until the peer's own threads are asleep."""
    if not rest_s:
        return sample

    def rested() -> float:
        taken = sample()
        time.sleep(rest_s)
        return taken

    return rested


def _apart(op: Op, call: Args, peer: Any, mine: Sequence[Tensor]) -> float:
    """Relative L2 distance of a peer's results from ours, the larger of them."""
    theirs = as_tuple(peer)
    # An op that writes an argument is compared by it, others by as many results as the peer has.
    ours = mine[-len(op.mutates) :] if op.mutates else mine
    if is_written_fp8(op, call):
        rank = call[op.params.index("kv_norm_weight")].numel()
        theirs = tuple(latent_fp8.unpack(tensor, rank) for tensor in theirs)
        ours = [latent_fp8.unpack(tensor, rank) for tensor in ours]
    worst = 0.0
    for a, b in zip(theirs, ours, strict=False):
        if b.numel():
            distance = (a.double().reshape(-1) - b.double().reshape(-1)).norm()
            worst = max(worst, float(distance / b.double().norm().clamp(min=1e-30)))
    return worst


@dataclass
class Bench:
    """Measures cases on one device.

    Attributes:
        device: where.
        clock: of it.
        ceilings: of it.
        backends: of ours, the first of them the base of all ratios.
        peers: modules of `kimi_ops.bench.peers`.
        effort: how long.
    """

    device: torch.device
    clock: Clock
    ceilings: Ceilings
    backends: Sequence[str]
    peers: Sequence[Any]
    effort: Effort

    def run(self, case: BenchCase) -> list[Row]:
        """The rows of a case, ours first; what cannot run has a row with its reason."""
        op = get_op(case.op)
        plain = Row(
            case.op, case.name, "", True, self._threads, SKIPPED,
            series=case.series, size=case.size, unit=case.unit,
        )  # fmt: skip
        try:
            with torch.inference_mode():
                return list(self._rows(op, case, plain))
        except TooLarge as error:
            return [replace(plain, contestant=self._name(self.backends[0]), reason=str(error))]
        except (MemoryError, RuntimeError) as error:
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not memory and "can't allocate memory" not in str(error):
                raise
            reason = f"not enough memory: {' '.join(str(error).split())}"
            return [replace(plain, contestant=self._name(self.backends[0]), reason=reason)]
        finally:
            gc.collect()  # copies of weights, and processes, of peers

    @property
    def _threads(self) -> int:
        return torch.get_num_threads() if self.device.type == "cpu" else 0

    @staticmethod
    def _name(backend: str) -> str:
        return f"kimi-ops {backend}"

    def _rows(self, op: Op, case: BenchCase, plain: Row) -> Iterator[Row]:
        calls = rotation(case, self.device)
        places = [op.params.index(name) for name in op.mutates]
        fresh = {place: calls[0][place].clone() for place in places}
        work = case.work(*calls[0])
        plain = replace(plain, read_bytes=work.read, written_bytes=work.written, flops=work.flops)
        contestants: list[_Contestant] = []
        mine: tuple[Tensor, ...] | None = None
        for backend in self.backends:
            row = replace(plain, contestant=self._name(backend))
            if reason := op.why_not(backend, calls[0]):
                yield replace(row, reason=reason)
                continue
            try:
                error, results = checked(op, backend, calls[0])
            except AssertionError as wrong:
                yield replace(row, status=WRONG, reason=" ".join(str(wrong).split()))
                continue
            mine = results if mine is None else mine
            with use_backend(f"{op.name}={backend}"):
                timed = self.clock.sampler(_ours(op, calls), len(calls))
            sample = _choosing(op, backend, timed.sample)
            contestants.append(_Contestant(row.contestant, True, error, sample, *timed[1:]))
        if mine is None:
            return
        for peer in self.peers:
            row = replace(plain, contestant=peer.NAME, ours=False)
            for place, tensor in fresh.items():  # what our own samples have written since
                calls[0][place].copy_(tensor)
            found = self._peer(op, peer, calls, mine)
            if isinstance(found, _Contestant):
                contestants.append(found)
            else:
                status, reason = found
                yield replace(row, status=status, reason=reason)
        works = [case.work(*call) for call in calls]
        yield from self._timed(contestants, plain, works, new_memory=not op.mutates)

    def _peer(
        self, op: Op, peer: Any, calls: Sequence[Args], mine: Sequence[Tensor]
    ) -> _Contestant | tuple[str, str]:
        if op.name not in peer.OPS:
            return SKIPPED, "has no such op"
        if reason := peer.missing(str(self.device)):
            return SKIPPED, reason
        try:
            run = peer.OPS[op.name](calls)
            apart = _apart(op, calls[0], run(0), mine)
        except Declined as error:
            return SKIPPED, str(error)
        if not apart <= getattr(peer, "APART", APART):
            return WRONG, f"its result is {apart:.2g} (relative L2) from ours"
        timed = self.clock.sampler(run, len(calls))
        sample = _rested(timed.sample, getattr(peer, "REST_S", 0.0))
        return _Contestant(peer.NAME, False, apart, sample, *timed[1:])

    def _timed(
        self,
        contestants: Sequence[_Contestant],
        plain: Row,
        works: Sequence[Work],
        new_memory: bool,
    ) -> Iterator[Row]:
        mean = Work(
            statistics.mean(w.read for w in works),
            statistics.mean(w.written for w in works),
            statistics.mean(w.flops for w in works),
            works[0].dtype,
        )
        probe, amount = self.ceilings.binding(mean, new_memory=new_memory)
        ceiling = self.clock.sampler(probe.call, 1).sample
        samplers = [*(c.sample for c in contestants), ceiling]
        *times, ceiling_times = _in_turn(samplers, self.effort)
        floor_us = 1e6 * amount / probe.amount * statistics.median(ceiling_times)
        for contestant, mine in zip(contestants, times, strict=True):
            low, *_, high = statistics.quantiles(mine, n=10, method="inclusive")
            yield replace(
                plain,
                contestant=contestant.name,
                ours=contestant.ours,
                status=MEASURED,
                us=1e6 * statistics.median(mine),
                p10_us=1e6 * low,
                p90_us=1e6 * high,
                samples=len(mine),
                calls=contestant.calls,
                how=contestant.how,
                read_bytes=mean.read,
                written_bytes=mean.written,
                flops=mean.flops,
                ceiling=probe.name,
                ceiling_us=floor_us,
                ratio=statistics.median(a / b for a, b in zip(mine, times[0], strict=True)),
                error=contestant.error,
            )


def _in_turn(samplers: Sequence[Sampler], effort: Effort) -> list[list[float]]:
    """Samples of all, one of each in every round."""
    times: list[list[float]] = [[] for _ in samplers]
    spent = 0.0
    for number in range(effort.rounds):
        start = time.perf_counter()
        order = range(len(samplers))
        for which in order if number % 2 == 0 else reversed(order):
            times[which].append(samplers[which]())
        spent += time.perf_counter() - start
        if spent > effort.seconds and number + 1 >= effort.least:
            break
    return times


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """As many threads of torch, and so of the CPU library, in a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
