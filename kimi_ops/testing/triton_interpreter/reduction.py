"""tl.reduce and tl.associative_scan, with the kernel's own combine function on whole slices.

Neighbours are combined pairwise, in order, as a GPU's threads and shuffles do: log2(n) calls of
the combine function, each rounding in the operands' own type. (Triton's interpreter calls it per
element, or replaces it by a numpy function that treats NaN and bf16 otherwise.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl

from kimi_ops.testing.triton_interpreter.arithmetic import handle
from kimi_ops.testing.triton_interpreter.numerics import Array

Call = Callable[..., Any]


def _block(data: Array, dtype: Any) -> Any:
    shape = list(data.shape)
    return tl.tensor(handle(data, dtype), tl.block_type(dtype, shape) if shape else dtype)


def _combine(
    call: Call, function: Any, left: list[Array], right: list[Array], types: list[Any]
) -> list[Array]:
    """One application of the combine function to slices."""
    blocks = [_block(d, t) for side in (left, right) for d, t in zip(side, types, strict=True)]
    result = call(function, *blocks)
    results = list(result) if isinstance(result, tuple | tl.tuple) else [result]
    if len(results) != len(types):
        raise TypeError(f"a combine function returned {len(results)} values for {len(types)}")
    return [np.broadcast_to(r.handle.data, d.shape) for r, d in zip(results, left, strict=True)]


def _take(data: list[Array], axis: int, part: slice) -> list[Array]:
    index = (slice(None),) * axis + (part,)
    return [d[index] for d in data]


def reduce(call: Call, inputs: Any, axis: int | None, function: Any, keep_dims: bool) -> Any:
    """tl.reduce.

    Args:
        call: how to call a jit'd function.
        inputs: a tensor, or a tuple of tensors of one shape.
        axis: None for all dimensions.
        function: two groups of scalars to one.
        keep_dims: keep what was reduced, with length 1.
    """
    single = isinstance(inputs, tl.tensor)
    tensors = [inputs] if single else list(inputs)
    types = [t.dtype for t in tensors]
    data = [t.handle.data.reshape([int(n) for n in t.shape]) for t in tensors]
    rank = data[0].ndim
    if axis is None:
        data, at = [d.reshape(-1) for d in data], 0
    else:
        at = int(axis) + (rank if int(axis) < 0 else 0)
    while (n := data[0].shape[at]) > 1:
        # Triton's block lengths are powers of two.
        left, right = _take(data, at, slice(0, n, 2)), _take(data, at, slice(1, n, 2))
        data = _combine(call, function, left, right, types)
    if axis is None:
        data = [d.reshape((1,) * rank if keep_dims else ()) for d in data]
    elif not keep_dims:
        data = [d.reshape(d.shape[:at] + d.shape[at + 1 :]) for d in data]
    outputs = tuple(_scalar_or_block(d, t) for d, t in zip(data, types, strict=True))
    return outputs[0] if single else outputs


def _scalar_or_block(data: Array, dtype: Any) -> Any:
    if data.ndim == 0:
        # A scalar is a handle of one element.
        return tl.tensor(handle(data.reshape(1), dtype), dtype)
    return _block(np.ascontiguousarray(data), dtype)


def scan(call: Call, inputs: Any, axis: int, function: Any, reverse: bool) -> Any:
    """tl.associative_scan, inclusive, along one axis; arguments as in `reduce`."""
    single = isinstance(inputs, tl.tensor)
    tensors = [inputs] if single else list(inputs)
    types = [t.dtype for t in tensors]
    data = [t.handle.data for t in tensors]
    at = int(axis) + (data[0].ndim if int(axis) < 0 else 0)
    if reverse:
        data = [np.flip(d, at) for d in data]
    n, step = data[0].shape[at], 1
    while step < n:
        # A block has a power of two of elements, so all n take part; the first ones are kept.
        left = [np.roll(d, step, at) for d in data]
        combined = _combine(call, function, left, data, types)
        kept = zip(
            _take(data, at, slice(0, step)), _take(combined, at, slice(step, n)), strict=True
        )
        data = [np.concatenate(pair, at) for pair in kept]
        step *= 2
    if reverse:
        data = [np.flip(d, at) for d in data]
    outputs = tuple(_block(np.ascontiguousarray(d), t) for d, t in zip(data, types, strict=True))
    return outputs[0] if single else outputs
