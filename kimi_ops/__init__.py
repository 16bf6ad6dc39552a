"""Fused kernels for Kimi K2.5 as PyTorch ops, and the model assembled from them.

Every op is a function here (`kimi_ops.mla_decode`, ...) and an entry in `torch.ops.kimi_ops`;
`help(kimi_ops.mla_decode)` states its formula, shapes, dtypes and errors. `explain` says which
backend runs a call, `use_backend` chooses one. The model is `kimi_ops.model`.
"""

from __future__ import annotations

from kimi_ops import _ctrl_c  # noqa: F401  before torch, whose import takes seconds
from kimi_ops._batch_invariant import batch_invariant
from kimi_ops._dispatch import (
    BackendError,
    Explanation,
    explain,
    op_names,
    register_backend,
    resolve,
    use_backend,
)
from kimi_ops._version import __version__
from kimi_ops.ops import *  # noqa: F403  the public ops, named in kimi_ops/ops/__init__.py
from kimi_ops.ops import __all__ as _op_names

__all__ = [
    "BackendError",
    "Explanation",
    "__version__",
    "batch_invariant",
    "explain",
    "op_names",
    "register_backend",
    "resolve",
    "use_backend",
    *_op_names,
]
