"""Triton kernels, one file per op; imported as `kimi_ops.kernels`.

From the root of a checkout this folder is also visible as `kernels`, a name that belongs to another
package, which transformers probes for by importing it. Under that name this module is an empty
shell: no version, no attributes, no submodules. Raising here instead would break transformers for
whoever stands in the checkout.
"""

from __future__ import annotations

if __name__ != "kimi_ops.kernels":
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"no {name!r} here: the Triton kernels of kimi-ops are kimi_ops.kernels "
            "(the name 'kernels' belongs to another package)"
        )
