"""The complete Kimi K2.5 model, assembled from the ops of this package.

`KimiK25` is loaded when it is first asked for, so that the modules which only read a config or a
checkpoint's headers stay light to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kimi_ops.model.kimi import KimiK25

__all__ = ["KimiK25"]


def __getattr__(name: str) -> Any:
    if name == "KimiK25":
        from kimi_ops.model.kimi import KimiK25

        return KimiK25
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
