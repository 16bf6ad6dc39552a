"""The search: every candidate of every choice, one entry of the table at a time.

case --lay out--> what it asks for: (choice, sizes, own tile)
per entry, over the cases that ask for it:
    candidates --compile--> no spills, fits --hostile cases--> right --clock--> us per case
    best: smallest geometric mean over the cases; kept if it beats the kernel's own tile
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

import torch

from kimi_ops._batch_invariant import batch_invariant
from kimi_ops._version import __version__
from kimi_ops.kernels import _tiles
from kimi_ops.testing.checkout import commit_of
from kimi_ops.tune.cases import TuneCase
from kimi_ops.tune.clocks import Clock
from kimi_ops.tune.trials import Forced, Launched, laid_out, unusable


@dataclass
class Entry:
    """One entry that a table may have.

    Attributes:
        choice, sizes: its key.
        built_in: the kernel's own tile.
        calls: the cases that ask for it, with the tiles of all choices of each.
        times: tile -> microseconds, case by case.
        dropped: tile -> why.
    """

    choice: _tiles.TileChoice
    sizes: tuple[int, ...]
    built_in: Any
    calls: list[tuple[TuneCase, Forced]] = field(default_factory=list)
    times: dict[Any, list[float]] = field(default_factory=dict)
    dropped: dict[Any, str] = field(default_factory=dict)

    def named_sizes(self) -> dict[str, int]:
        """The sizes by name."""
        return dict(zip(self.choice.sizes, self.sizes, strict=True))

    def best(self, margin: float) -> Any:
        """The tile to use: the kernel's own unless another one is faster by the margin."""
        if not self.times:
            return self.built_in
        means = {t: exp(sum(map(log, us)) / len(us)) for t, us in self.times.items()}
        fastest = min(means, key=lambda tile: means[tile])
        own = means.get(self.built_in)
        return fastest if own is None or means[fastest] < (1 - margin) * own else self.built_in


def _entries(cases: Sequence[TuneCase], clock: Clock) -> list[Entry]:
    """What the cases ask for; a kernel's own tile is that of the first case of an entry."""
    found: dict[tuple[str, tuple[int, ...]], Entry] = {}
    for case in cases:
        _, trial = laid_out(case, clock.gpu, {})
        own = {choice.name: tile for choice, _, tile in trial.asked}
        for choice, sizes, tile in trial.asked:
            entry = found.setdefault((choice.name, sizes), Entry(choice, sizes, tile))
            entry.calls.append((case, own))
    return list(found.values())


def _refusal(entry: Entry, tile: Any, clock: Clock) -> str | None:
    """Why a tile is dropped, or None."""
    launches: dict[str, Launched] = {}
    for case, own in entry.calls:
        noted, _ = laid_out(case, clock.gpu, {**own, entry.choice.name: tile})
        launches |= {launched.specialisation: launched for launched in noted}
    if reason := unusable(list(launches.values()), clock.arch):
        return reason
    case, own = entry.calls[0]
    for check in case.checks:
        if reason := clock.wrong(case.op, check, {entry.choice.name: tile}):
            return f"wrong result: {reason}"
    return None


def _try_all(entry: Entry, clock: Clock, say: Callable[[str], None]) -> None:
    name = f"{entry.choice.name} {entry.named_sizes()}"
    candidates = dict.fromkeys((entry.built_in, *entry.choice.candidates(*entry.sizes)))
    say(f"{name}: {len(candidates)} tiles, its own is {_plain(entry.built_in)}")
    for tile in candidates:
        if reason := _refusal(entry, tile, clock):
            entry.dropped[tile] = reason
            say(f"  {_plain(tile)} dropped: {reason}")
    entry.times = {tile: [] for tile in candidates if tile not in entry.dropped}
    for case, own in entry.calls:
        left = list(entry.times)
        forced = [{**own, entry.choice.name: tile} for tile in left]
        for tile, us in zip(left, clock.time(case, forced), strict=True):
            if isinstance(us, str):
                del entry.times[tile]
                entry.dropped[tile] = us
                say(f"  {case.name}: {_plain(tile)} dropped: {us}")
            else:
                entry.times[tile].append(us)
                say(f"  {case.name}: {_plain(tile)} {us:.2f} us {clock.name}")


def _plain(tile: Any) -> str:
    return " ".join(f"{name} {value}" for name, value in tile._asdict().items())


def search(
    cases: Sequence[TuneCase],
    clock: Clock,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Tries every candidate on every case.

    Args:
        cases: what to tune for.
        clock: what times the tiles.
        say: is told what happens, line by line.
        save: is given the content so far after each entry.

    Returns:
        What the file of the table holds: its own part (`kimi_ops.kernels._tiles`), and under
        "trials" every tile with its microseconds by case, or why it was dropped.
    """
    content: dict[str, Any] = {
        "format": _tiles.FORMAT,
        "gpu": {"product": clock.product, **vars(clock.gpu)},
        "clock": clock.name,
        "made_with": made_with(),
        "tiles": [],
        "trials": [],
    }
    with batch_invariant(False):  # in that mode choices that depend on the batch are not made
        for entry in _entries(cases, clock):
            _try_all(entry, clock, say)
            key = {"choice": entry.choice.name, "sizes": entry.named_sizes()}
            best = entry.best(clock.margin)
            if best != entry.built_in:
                content["tiles"].append({**key, "tile": best._asdict()})
                say(f"  chosen: {_plain(best)}")
            else:
                say(f"  chosen: its own; nothing is faster by {100 * clock.margin:.0f} %")
            names = [case.name for case, _ in entry.calls]
            for tile, us in entry.times.items():
                by_case = {n: round(t, 3) for n, t in zip(names, us, strict=True)}
                content["trials"].append({**key, "tile": tile._asdict(), "us": by_case})
            for tile, reason in entry.dropped.items():
                content["trials"].append({**key, "tile": tile._asdict(), "dropped": reason})
            save(content)
    return content


def made_with() -> dict[str, str]:
    """Versions, and the commit of a checkout."""
    import triton

    return {
        "kimi_ops": __version__,
        "commit": commit_of("kernels"),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "python": platform.python_version(),
    }
