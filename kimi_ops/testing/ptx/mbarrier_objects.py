"""One mbarrier object, and the copies that complete on it as the race detector sees them.

Source: PTX ISA, "Contents of the mbarrier object", "Phase of the mbarrier object".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kimi_ops.testing.ptx.types import Array

if TYPE_CHECKING:
    from kimi_ops.testing.ptx.binding import Site

# Of arrivals and of bytes.
LARGEST_COUNT = (1 << 20) - 1
# That a CTA may have here: actors of the race detector are numbered in a byte.
MBARRIERS = 64
SIZE = 8


@dataclass(eq=False)
class Copies:
    """The copies that complete on the mbarriers at one address, as actors of the race detector.

    Attributes:
        number: of bulk copies among the actors; copies by cp.async have the next one.
        time: completed phases, over all mbarriers that have lived at the address.
        dead: PTX line of the last inval.
    """

    number: int
    time: int = 0
    dead: int = 0


@dataclass(eq=False)
class Mbarrier:
    """One mbarrier object.

    Attributes:
        site, warp, stamp, barriers: of the init: where, by whom, the warp's clock and the CTA
            barriers it had passed.
        cta, address, cells: where it is, within the batch and the CTA; its granules.
        copies: what completes on it.
        count, pending: arrivals that a phase expects, that the current one still expects.
        bytes_pending: the tx-count, bytes that the current phase still expects.
        open, done: clocks of the arrivals at the current phase, of all completed phases.
        phase: completed phases since the init.
        published: a fence has made the init known to the async proxy.
        acquired: value of ``copies.time`` that somebody has waited for.
        polls: (warp, phase) -> waits for it that were answered false.
        used: whether anything but its init has touched it.
    """

    site: Site
    warp: int
    stamp: int
    barriers: int
    cta: int
    address: int
    cells: Array
    copies: Copies
    count: int
    pending: int
    open: Array
    done: Array
    bytes_pending: int = 0
    phase: int = 0
    published: bool = False
    acquired: int = 0
    polls: dict[tuple[int, int], int] = field(default_factory=dict)
    used: bool = False

    @property
    def name(self) -> str:
        """For reports."""
        return f"mbarrier at shared memory + {self.address}"

    @property
    def state(self) -> str:
        """For reports."""
        return (
            f"{self.name} is in phase {self.phase}, which still expects {self.pending} of "
            f"{self.count} arrivals and {self.bytes_pending} bytes"
        )


@dataclass(eq=False)
class Held:
    """Lanes whose wait for a phase is held, and the place of the wait."""

    bar: Mbarrier
    phase: int
    place: int
    mask: Array
    site: Site
