"""Products with int4 weights in groups of 32, straight from the checkpoint's layout.

Shared by `moe_experts_int4` and `int4_linear`. Weights are read as int16 *units* of four columns,
eight units to a group; *plane* j of a unit is its nibble j, column 4 u + j::

    unit  u       bits 15 12 11  8 7   4 3   0        a group:  8 units = 16 bytes = one load
          plane        3     2     1     0

The weights are the wide operand: out^T [N, tokens] = W [N, K] x^T. Two units sit side by side in a
register, so one AND-OR with 0x4300 4300 makes two weights of one plane into the bfloat16 numbers
128 + u (float16: 0x6400, 1024 + u), and the K axis of a matrix product runs over the units of a
plane, not over neighbouring columns. x is rearranged to match, once per token.

Assembly, because no compiler joins the halves by itself: on sm_90 the separated form takes 1.4
instructions per weight with it and 3.4 without (AMD, the interpreter).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops import _target

GROUP = 32
UNITS = tl.constexpr(8)  # int16 units per group
_CHUNK_BYTES = 16  # a group of codes

# $4: two units; $5, $6: 2^28 (`SHIFT`). The upper half of a product is a shift too: shifts and ANDs
# share a pipe that is busier than the multiplier's. The factor comes from memory, as a tensor
# [1, 1]: were it a constant, ptxas would make shifts of the products again; were it a scalar,
# Triton would not move the change of layout from here up to the load of the codes.
SHIFT = tl.constexpr(1 << 28)
_SPLIT = """{{
    .reg .b32 a, b, c;
    mul.hi.u32 a, $4, $5;
    mul.hi.u32 b, a, $5;
    mul.hi.u32 c, b, $5;
    lop3.b32 $0, $4, 0x000f000f, {magic}, 0xea;
    lop3.b32 $1, a, 0x000f000f, {magic}, 0xea;
    lop3.b32 $2, b, 0x000f000f, {magic}, 0xea;
    lop3.b32 $3, c, 0x000f000f, {magic}, 0xea;
    {then}
}}"""
# $7: the scale of both units, twice. (128 + u) * 1 - 136 is exact; times the scale it is rounded
# once. A product is written as a multiply-add of -0: sm_80 has no other in bfloat16.
_SCALE = """.reg .b32 one, bias, zero;
    mov.b32 one, {one};
    mov.b32 bias, {bias};
    mov.b32 zero, 0x80008000;
""" + "\n".join(
    f"    fma.rn.{{two}} ${i}, ${i}, one, bias;\n    fma.rn.{{two}} ${i}, ${i}, $7, zero;"
    for i in range(4)
)
_BF16 = {"two": "bf16x2", "one": "0x3f803f80", "bias": "0xc308c308"}
_FP16 = {"two": "f16x2", "one": "0x3c003c00", "bias": "0xe408e408"}
_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r")
OPERANDS_SCALED = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r")
FOUR_BF16 = tl.constexpr((tl.bfloat16,) * 4)
FOUR_FP16 = tl.constexpr((tl.float16,) * 4)
_SPLIT_BF16 = tl.constexpr(_SPLIT.format(magic="0x43004300", then=""))
_SPLIT_FP16 = tl.constexpr(_SPLIT.format(magic="0x64006400", then=""))
SCALED_BF16 = tl.constexpr(_SPLIT.format(magic="0x43004300", then=_SCALE.format(**_BF16)))
SCALED_FP16 = tl.constexpr(_SPLIT.format(magic="0x64006400", then=_SCALE.format(**_FP16)))


def takes_assembly(device: torch.device) -> bool:
    """Whether the launch is for NVIDIA's assembly, which an interpreter refuses."""
    compiled = isinstance(planes, triton.runtime.JITFunction) and not _target.runs_in_python()
    return compiled and _target.target(device).vendor == "cuda"


def _row_refusal(name: str, packed: Tensor, scale: Tensor) -> str | None:
    if packed.stride(-1) != 1 or (scale.shape[-1] > 1 and scale.stride(-1) != 1):
        return f"{name} and its scales must have neighbouring columns side by side in memory"
    rows = [s for s, size in zip(packed.stride()[:-1], packed.shape[:-1], strict=True) if size > 1]
    if packed.data_ptr() % _CHUNK_BYTES or any(4 * s % _CHUNK_BYTES for s in rows):
        return f"{name} must start, and each of its rows must start, at a multiple of 16 bytes"
    return None


def refusal(
    op: str,
    x: Tensor,
    packed: Mapping[str, tuple[Tensor, Tensor]],
    dense: Mapping[str, Tensor | None],
) -> str | None:
    """Why the kernels cannot take a call: its dtype, its GPU or how its weights lie; or None.

    Args:
        op: name, for the sentence.
        x: activations.
        packed: codes and scales by name.
        dense: 16-bit weights by name.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        dtype = str(x.dtype).removeprefix("torch.")
        return f"{op} in Triton multiplies in bfloat16 or float16; x is {dtype}"
    for name, (codes, scale) in packed.items():
        if codes.numel() and (reason := _row_refusal(name, codes, scale)) is not None:
            return reason
    for name, weight in dense.items():
        if weight is not None and weight.numel() and weight.stride(-1) != 1:
            return f"{name} must have neighbouring columns side by side in memory"
    return None


def units(packed: Tensor) -> tuple[Tensor, list[int]]:
    """The codes as int16 units, and the strides of the leading dimensions in groups (16 bytes)."""
    return packed.view(torch.int16), [4 * s // _CHUNK_BYTES for s in packed.stride()[:-1]]


@triton.jit
def bias_of(dtype: tl.constexpr):
    """What `planes` adds to a weight q = u - 8: the constant under the nibble, and 8."""
    return 136.0 if dtype == tl.bfloat16 else 1032.0


@triton.jit
def planes(units, shift, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int16 units -> four planes of the same shape in ``dtype``, each weight q plus `bias_of`."""
    if ASSEMBLY:
        shift = tl.broadcast_to(shift, units.shape)
    if ASSEMBLY and dtype == tl.bfloat16:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            _SPLIT_BF16, _OPERANDS, [units, shift], dtype=FOUR_BF16, is_pure=True, pack=2
        )
    elif ASSEMBLY:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            _SPLIT_FP16, _OPERANDS, [units, shift], dtype=FOUR_FP16, is_pure=True, pack=2
        )
    else:
        magic: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        p0 = ((units & 15) | magic).to(dtype, bitcast=True)
        p1 = (((units >> 4) & 15) | magic).to(dtype, bitcast=True)
        p2 = (((units >> 8) & 15) | magic).to(dtype, bitcast=True)
        p3 = (((units >> 12) & 15) | magic).to(dtype, bitcast=True)
    return p0, p1, p2, p3


@triton.jit
def rearranged(k, groups, SEPARATED: tl.constexpr):
    """Where column k of a row of x is stored: [4, K/4] by plane, or [K/32, 4, 8] within groups."""
    if SEPARATED:
        return k % 4 * (groups * UNITS) + k // 4
    else:
        return k // 32 * 32 + k % 4 * UNITS + k % 32 // 4


@triton.jit
def rearrange(
    x_ptr,  # [K], a row
    stride_x_k,
    out_ptr,  # [K]
    bias_ptr,  # [K/32] float32
    g0,
    groups,  # K/32
    SEPARATED: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """BLOCK_G groups of one row, from g0 on; if separated, also what takes off the bias."""
    k = g0 * 32 + tl.arange(0, 32 * BLOCK_G)  # [32 BLOCK_G]
    mask = k < groups * 32
    x = tl.load(x_ptr + k.to(tl.int64) * stride_x_k, mask=mask, other=0.0)
    tl.store(out_ptr + rearranged(k, groups, SEPARATED), x, mask=mask)
    if SEPARATED:
        g = g0 + tl.arange(0, BLOCK_G)  # [BLOCK_G]
        sums = tl.sum(x.to(tl.float32).reshape(BLOCK_G, 32), 1)
        tl.store(bias_ptr + g, -bias_of(x_ptr.dtype.element_ty) * sums, mask=g < groups)


@triton.jit
def unlift_of(dtype: tl.constexpr):
    """What sums over lifted x are multiplied with at last."""
    return 2.0**20 if dtype == tl.bfloat16 else 1.0


@triton.jit
def lift(top, dtype: tl.constexpr):
    """What lifts the x of a group whose largest magnitude is ``top``, and what takes it off.

    `_int4_few_direct` multiplies a code u as the number of which it is the bits, u * 2^-133 in
    bfloat16 and u * 2^-24 in float16. So that products stay normal float32 numbers, x of a group is
    brought just below 2^121 or 2^15 by a power of two, by 2^126 at most (in bfloat16 a group whose
    largest x is below 2^-119 may lose bits). The second factor and `unlift_of` undo both.
    """
    exponent = (top.to(tl.int32, bitcast=True) >> 23) - 127
    if dtype == tl.bfloat16:
        up = tl.minimum(120 - exponent, 126)
        down = 133 - 20 - up
    else:
        up = tl.minimum(14 - exponent, 126)
        down = 24 - up
    up = ((up + 127) << 23).to(tl.float32, bitcast=True)
    return up, ((down + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def start_of(sums, dtype: tl.constexpr):
    """Where the sum over a group's products starts: what takes 8 off every code."""
    return sums * (-8 * (2.0**-133 if dtype == tl.bfloat16 else 2.0**-24))


@triton.jit
def paired(k):
    """Where column k of a lifted row is stored: by two groups, plane, group and unit."""
    return k // 64 * 64 + k % 4 * 16 + k % 64 // 4


@triton.jit
def rearrange_lifted(
    x_ptr,  # [K], a row
    stride_x_k,
    out_ptr,  # [K/64, 4, 2, 8]
    bias_ptr,  # [2, K/32] float32
    g0,
    groups,  # K/32
    BLOCK_G: tl.constexpr,
):
    """BLOCK_G groups of one row, from g0 on, as `_int4_few_direct` wants them.

    Planes 1 and 3 are divided by 16: their codes are nibbles that were left where they are, one
    nibble up. ``bias``: `start_of`, then the second of `lift`.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    k = g0 * 32 + tl.arange(0, 32 * BLOCK_G)  # [32 BLOCK_G]
    mask = k < groups * 32
    x = tl.load(x_ptr + k.to(tl.int64) * stride_x_k, mask=mask, other=0.0).to(tl.float32)
    x = x.reshape(BLOCK_G, 32)
    up, down = lift(tl.max(tl.abs(x), 1), dtype)
    x = x * up[:, None]
    g = g0 + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    tl.store(bias_ptr + g, start_of(tl.sum(x, 1), dtype), mask=g < groups)
    tl.store(bias_ptr + groups + g, down, mask=g < groups)
    x = tl.where(k % 2 == 0, x.reshape(32 * BLOCK_G), x.reshape(32 * BLOCK_G) * 0.0625)
    tl.store(out_ptr + paired(k), x.to(dtype), mask=mask)


@triton.jit
def inside(n, N, EXACT: tl.constexpr):
    """Row numbers that can be read: those behind the last repeat it."""
    if EXACT:
        return n
    else:
        return tl.minimum(n, N - 1)
