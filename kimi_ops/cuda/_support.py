"""What launchers of CUDA C++ share: which devices and dtypes they take, and names of instances."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_ops._target import target

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def refusal(op: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why no kernel of the op runs on the device and in the dtype of ``x``, or None."""
    if target(x.device).vendor != "cuda":
        return f"{op} in CUDA C++ needs an NVIDIA GPU"
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"{op} in CUDA C++ takes {names}; x is {str(x.dtype).removeprefix('torch.')}"
    return None


def is_aligned(*tensors: Tensor) -> bool:
    """Whether 16-byte accesses reach every row: bases, and all strides but a last one of 1."""
    for x in tensors:
        strides = [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]
        if strides and strides.pop() != 1:
            return False
        if x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in strides):
            return False
    return True


def aligned(x: Tensor) -> Tensor:
    """``x``, or a packed copy where 16-byte accesses do not reach every row of it."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
