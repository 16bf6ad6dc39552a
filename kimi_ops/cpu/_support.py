"""What launchers of the CPU library share: which dtypes its ops take, and how they take tensors."""

from __future__ import annotations

from torch import Tensor

from kimi_ops._native import DTYPES
from kimi_ops._strided_rows import Rows, or_packed


def refusal(op: str, x: Tensor) -> str | None:
    """Why the library does not run the op in the dtype of ``x``, or None."""
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return f"{op} on the CPU takes {names}; x is {str(x.dtype).removeprefix('torch.')}"
    return None


def dense_last(x: Tensor) -> Tensor:
    """``x``, or a packed copy where the elements of its last dimension are apart."""
    if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
        return x.contiguous()
    return x


def dense_rows(x: Tensor) -> tuple[Tensor, Rows]:
    """A tensor ``[..., D]`` with the places of its rows: ``x``, or a packed copy where two strides
    do not say where they are or the elements of a row are apart."""
    return or_packed(dense_last(x))
