"""How many blocks the tokens of an expert layer can need, known from shapes alone."""

from __future__ import annotations


def block_count(slots: int, experts: int, tokens: int) -> tuple[int, bool]:
    """Blocks in the grid, and whether they are numbered by slot.

    Args:
        slots: (token, choice) pairs.
        experts: local ones.
        tokens: that a block holds.
    """
    by_expert = experts + slots // tokens
    return min(slots, by_expert), slots <= by_expert
