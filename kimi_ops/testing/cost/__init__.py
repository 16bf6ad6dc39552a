"""Modelled kernel times, from what the emulator counted and the compilers made.

`cost` gives one launch on one GPU; `CostTable` collects several. Nothing here was measured.
"""

from __future__ import annotations

from kimi_ops.testing.cost.devices import RATES, Figure, Latencies, Rates, rates_of
from kimi_ops.testing.cost.latency import CostError
from kimi_ops.testing.cost.model import cost
from kimi_ops.testing.cost.report import Cost, CostTable, Resource

__all__ = [
    "RATES",
    "Cost",
    "CostError",
    "CostTable",
    "Figure",
    "Latencies",
    "Rates",
    "Resource",
    "cost",
    "rates_of",
]
