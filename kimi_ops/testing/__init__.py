"""How a kernel earns trust: oracle comparison, hostile inputs, and what else shows it right."""

from __future__ import annotations

from kimi_ops.testing.check import check_op, poisoned_outputs
from kimi_ops.testing.inputs import Case, cases
from kimi_ops.testing.oracle import Comparison, assert_close_to_oracle

__all__ = [
    "Case",
    "Comparison",
    "assert_close_to_oracle",
    "cases",
    "check_op",
    "poisoned_outputs",
]
