"""How `mla_decode` splits the cached tokens, for the kernels of every language."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

MAX_SPLITS = 128  # what one program of the second stage takes at a time
# In batch-invariant mode a split is this long, longer only in sequences of more than 16,384 tokens.
INVARIANT_SPLITS, INVARIANT_TOKENS = 32, 512


class Tile(Protocol):
    """What one program of the first stage takes: query rows, and tokens at a time."""

    @property
    def rows(self) -> int:
        """S * H rows at most."""

    @property
    def tokens(self) -> int:
        """Tokens of a block."""


@functools.lru_cache(maxsize=4096)
def splits_of(groups: int, blocks: int, slots: int) -> int:
    """The number of splits that ends soonest, by a count of what the busiest multiprocessor does.

    A program costs one unit for each block of its split, and about two for its queries and its
    result; the second stage costs one, and a fiftieth for each partial result that it reads.

    Args:
        groups: sequences times tiles of rows.
        blocks: of tokens in a sequence, at most.
        slots: programs that run at a time.
    """

    def cost(splits: int) -> float:
        waves = -(-groups * splits // slots)
        combine = 1 + 0.02 * groups * splits if splits > 1 else 0
        return waves * (-(-blocks // splits) + 2) + combine

    return min(range(1, max(1, min(blocks, MAX_SPLITS)) + 1), key=cost)


@dataclass(frozen=True)
class Plan:
    """The grid of a call.

    Attributes:
        row_tiles, splits: programs of the first stage per sequence, and per tile of its rows.
        min_blocks: blocks that a split takes at least.
        partials: splits up to the next power of two; in batch-invariant mode the same always.
    """

    row_tiles: int
    splits: int
    min_blocks: int
    partials: int


def plan_of(
    tile: Tile, slots: int, batch: int, rows: int, capacity: int, *, invariant: bool
) -> Plan:
    """The plan of a call, from its shapes alone.

    In batch-invariant mode how a sequence is split depends on its own length alone: the splits are
    as many as the page table has use for, and fewer only leave out such as would be empty.

    Args:
        tile: of the first stage.
        slots: programs that the GPU runs at a time.
        batch, rows: B and S * H.
        capacity: tokens that a row of the page table can hold.
        invariant: batch-invariant mode.
    """
    row_tiles = -(-rows // tile.rows)
    if invariant:
        splits = max(1, min(INVARIANT_SPLITS, -(-capacity // INVARIANT_TOKENS)))
        return Plan(row_tiles, splits, INVARIANT_TOKENS // tile.tokens, INVARIANT_SPLITS)
    splits = splits_of(batch * row_tiles, -(-capacity // tile.tokens), slots)
    return Plan(row_tiles, splits, 1, 1 << (splits - 1).bit_length())
