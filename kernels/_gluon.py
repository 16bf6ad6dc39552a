"""Whether the Triton that is here is one that the Gluon kernels were compiled with.

Gluon changes with each release. Every op has a plain kernel behind its Gluon ones.
"""

from __future__ import annotations

import triton

RELEASES = ("3.7.", "3.8.")


def compiles() -> bool:
    """Whether Gluon kernels are used at all."""
    return str(triton.__version__).startswith(RELEASES)
