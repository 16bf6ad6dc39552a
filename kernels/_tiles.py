"""Which tile a launch takes: the kernel's own table says, unless a tuned one of this GPU does.

    TILES = TileChoice("rms_norm", candidates, row=("columns", "element_bytes"))

    launch:  tile = TILES.choose(x.device, built_in, columns, element_bytes)

                   no table (the usual case)  ->  built_in
    KIMI_OPS_TILES=tiles.json                 ->  its entry for ("rms_norm", 7168, 2), or built_in

`kimi-ops tune` writes such a file: it tries the candidates, one after the other (`trying`). In a
call nothing is tried and nothing is timed: a choice is one look-up by sizes that the host knows.

Batch-invariant mode: the size of the batch (``batch``: tokens) has a name of its own, and a choice
that has one is not looked up in that mode, so that its kernel's own rule for the mode holds. A
choice without it sees nothing of the batch: whatever a file says, it is the same tile at every
batch size.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops._target import Target, target

FORMAT = "kimi-ops tiles 1"
# The size of a batch is rounded up to a power of two; this one stands for all larger ones as well.
LARGEST_BATCH = 4096

Tile = Any  # a NamedTuple of the kernel's
Key = tuple[str | int, ...]

_CHOICES: dict[str, TileChoice] = {}


class TileChoice:
    """One choice of a kernel: what it depends on, and what may be chosen.

    Attributes:
        name: the op, or ``op.stage`` where an op has several choices.
        candidates: ``candidates(*sizes)`` gives the tiles worth a trial, NamedTuples of integers;
            all must be correct for any call, but may not compile or fit everywhere.
        row: names of the sizes that a row has whatever is beside it: widths, bytes of an element.
        batch: name of the size of the batch, or "" where the choice does not depend on it.
        sizes: all names.
    """

    def __init__(
        self,
        name: str,
        candidates: Callable[..., tuple[Tile, ...]],
        *,
        row: tuple[str, ...],
        batch: str = "",
    ) -> None:
        self.name, self.candidates, self.batch = name, candidates, batch
        self.sizes = (*row, batch) if batch else row
        _CHOICES[name] = self

    def choose(self, device: torch.device, built_in: Tile, *sizes: int) -> Tile:
        """The tile of a launch.

        Args:
            device: of its tensors.
            built_in: what the kernel's own table says.
            sizes: those named ``row``, then the one named ``batch``.

        Raises:
            ValueError: ``KIMI_OPS_TILES`` names a file that is damaged, or of another GPU and has
                an entry for these sizes.
        """
        source = _SOURCE.get()
        if source is None:
            source = _ENVIRONMENT[0] if _ENVIRONMENT else _of_environment()
            if source is None:
                return built_in
        return source.tile(self, device, built_in, sizes)

    def key(self, sizes: tuple[int, ...]) -> Key:
        """What tables are looked up by."""
        if not self.batch:
            return (self.name, *sizes)
        size = sizes[-1]
        size = LARGEST_BATCH if size > LARGEST_BATCH else 1 << (size - 1).bit_length()
        return (self.name, *sizes[:-1], size)


@dataclass
class Table:
    """Tiles that were tuned for one GPU.

    Attributes:
        origin: where they are from, for messages.
        gpu: what they are for.
        tiles: by `TileChoice.key`.
    """

    origin: str
    gpu: Target
    tiles: dict[Key, Tile]
    _checked: Target | None = None

    def tile(
        self, choice: TileChoice, device: torch.device, built_in: Tile, sizes: tuple[int, ...]
    ) -> Tile:
        """The table's tile for a launch, or ``built_in``."""
        if choice.batch and is_batch_invariant():
            return built_in
        tile = self.tiles.get(choice.key(sizes))
        # A launch on meta tensors is laid out for the compilers, for no GPU in particular.
        if tile is None or device == _META:
            return built_in
        gpu = target(device)
        if gpu is not self._checked:
            if gpu != self.gpu:
                raise ValueError(f"{self.origin} is for {self.gpu}, but this is {gpu}")
            self._checked = gpu
        return tile


@dataclass
class Trial:
    """What was asked for in a `trying` block, and what was forced on it.

    Attributes:
        forced: tile by the name of a choice.
        asked: (choice, sizes as a table has them, the kernel's own tile), in order.
    """

    forced: Mapping[str, Tile]
    asked: list[tuple[TileChoice, tuple[int, ...], Tile]] = field(default_factory=list)

    def tile(
        self, choice: TileChoice, device: torch.device, built_in: Tile, sizes: tuple[int, ...]
    ) -> Tile:
        """The forced tile, or ``built_in``."""
        self.asked.append((choice, choice.key(sizes)[1:], built_in))
        return self.forced.get(choice.name, built_in)


_META = torch.device("meta")
_SOURCE: ContextVar[Table | Trial | None] = ContextVar("kimi_ops_tiles", default=None)
_ENVIRONMENT: list[Table | None] = []


def _of_environment() -> Table | None:
    """The table that ``KIMI_OPS_TILES`` names, read at the first launch that asks."""
    if not _ENVIRONMENT:
        path = os.environ.get("KIMI_OPS_TILES")
        _ENVIRONMENT.append(read_table(path, f"KIMI_OPS_TILES: {path}") if path else None)
    return _ENVIRONMENT[0]


@contextlib.contextmanager
def using(table: Table | None) -> Iterator[None]:
    """Makes every choice in the block follow a table, in this thread or task only."""
    token = _SOURCE.set(Table("no table", Target("", 0, 0, 0), {}) if table is None else table)
    try:
        yield
    finally:
        _SOURCE.reset(token)


@contextlib.contextmanager
def trying(forced: Mapping[str, Tile]) -> Iterator[Trial]:
    """Forces tiles on choices by name, whatever their sizes; all others take the kernel's own."""
    trial = Trial(forced)
    token = _SOURCE.set(trial)
    try:
        yield trial
    finally:
        _SOURCE.reset(token)


def choices_of(op: str) -> list[TileChoice]:
    """The choices that the kernels of an op offer; none for an op without a Triton kernel."""
    if not op.isidentifier() or importlib.util.find_spec(f"kimi_ops.kernels.{op}") is None:
        return []
    importlib.import_module(f"kimi_ops.kernels.{op}")
    return [c for name, c in _CHOICES.items() if name.partition(".")[0] == op]


def read_table(path: str | os.PathLike[str], origin: str) -> Table:
    """Reads what `kimi-ops tune` wrote.

    Args:
        path: of the file.
        origin: what messages begin with.

    Raises:
        ValueError: what is wrong with it, in one sentence: unreadable, damaged, of another format,
            an unknown op, or an entry that is no candidate of its op.
    """
    try:
        return _table(json.loads(Path(path).read_text("utf-8")), origin)
    except OSError as error:
        raise ValueError(f"{origin} cannot be read: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{origin} is no JSON: {error}") from None


def _table(content: Any, origin: str) -> Table:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{origin} is no table of tiles: its format is not {FORMAT!r}")
    gpu, entries = content.get("gpu"), content.get("tiles")
    fields = {"vendor": str, "capability": int, "multiprocessors": int, "shared_bytes": int}
    if not isinstance(gpu, dict) or any(type(gpu.get(n)) is not kind for n, kind in fields.items()):
        raise ValueError(f"{origin} is damaged: its gpu must have {', '.join(fields)}")
    if not isinstance(entries, list):
        raise ValueError(f"{origin} is damaged: its tiles must be a list")
    table = Table(origin, Target(**{name: gpu[name] for name in fields}), {})
    for number, entry in enumerate(entries):
        key, tile = _entry(entry, f"{origin}: entry {number}")
        if key in table.tiles:
            raise ValueError(f"{origin}: entry {number} repeats {key[0]} of the same sizes")
        table.tiles[key] = tile
    return table


def _entry(entry: Any, where: str) -> tuple[Key, Tile]:
    if not isinstance(entry, dict) or set(entry) != {"choice", "sizes", "tile"}:
        raise ValueError(f"{where} is damaged: it must have choice, sizes and tile, nothing else")
    name, sizes, wanted = entry["choice"], entry["sizes"], entry["tile"]
    found = choices_of(name.partition(".")[0]) if isinstance(name, str) else []
    choice = next((c for c in found if c.name == name), None)
    if choice is None:
        raise ValueError(f"{where}: no op has a choice of tiles named {name!r}")
    names = choice.sizes
    if not isinstance(sizes, dict) or set(sizes) != set(names):
        raise ValueError(f"{where}: the sizes of {name} must be {', '.join(names)}")
    values = tuple(sizes[n] for n in names)
    if any(type(v) is not int or not 0 < v < 1 << 31 for v in values):
        raise ValueError(f"{where}: the sizes of {name} must be positive integers")
    key = choice.key(values)
    if key[1:] != values:
        raise ValueError(f"{where}: {choice.batch} must be a power of two up to {LARGEST_BATCH}")
    candidates = choice.candidates(*values)
    tile = next((c for c in candidates if c._asdict() == wanted), None)
    if tile is None:
        raise ValueError(f"{where}: {wanted} is not among the candidates of {name} for these sizes")
    return key, tile
