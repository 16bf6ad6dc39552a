"""Triton kernels of `kimi_ops.moe_route`: gate product and selection, one launch to 64 tokens.

    logits = float32(x) @ float32(gate)^T;  ids and weights of them as `_selection` has it

The gate's weights, 5.5 MB for 384 experts of 7,168, have to come from memory once: that takes every
SM. The selection takes a warp per token and all of its logits. Both fit one launch because the
program that finishes last (`_arrivals`) knows that all logits are written, and selects::

    T <= 4     program = 3 experts, whole rows of x and gate, multiplied and added in registers
               | e 0-2 | e 3-5 | e 6-8 | ...... | e 381-383 |     128 programs on 132 SMs
                                                  the last one: a warp per token selects

    T <= 64    program = (8 tokens, 1/8 of D, 64 experts), on tensor cores; x, the narrow operand,
               is on the right
               tokens 0-7:   | D 0: e 0-63, 64-127, .. | D 1: e 0-63, .. | .. | D 7: .. |
               tokens 8-15:  | ..                        the last one of each 8: sums the 8
                                                         partial logits in their order, selects

    T > 64     the same product in larger tiles, then `moe_select`'s kernel, which sums the parts

In batch-invariant mode every T goes the last way, with 8 parts and one tile.
For `moe_route_sort` whoever selects last sorts too, up to T = 64 (`_moe_route_sort`).

Bytes: gate once from memory (once per 8 tokens from L2), x once per 64 experts, 8 T E of partial
logits per part. At T = 1 the floor is 5.5 MB, 1.6 us on an H100.

Shared memory: 256 bytes at T <= 4; a tile, 36 KiB, up to T = 64; 3 or 4 of them, 96 KiB, above.

Numerics: products of 16-bit numbers are exact, sums are float32 (a tensor core's own over at most
1/8 of D up to T = 64); operands of two dtypes, or of float32, are multiplied in float32, without
TF32. No float atomics: the parts have fixed borders and are added in a fixed order.

Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2 (auxiliary-loss-free balancing).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops import _arrivals, _target
from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.kernels import _moe_route_sort as tables
from kimi_ops.kernels import moe_select
from kimi_ops.kernels._moe_route_sort import GROUPS, is_last, sort_pairs
from kimi_ops.kernels._moe_route_tiles import (
    NARROW,
    NARROW_FLOAT32,
    NARROW_PARTS,
    PARTS,
    TILES,
    TILES_WIDE,
    WIDE,
    WIDE_64K,
    WIDE_FLOAT32,
    Tile,
)
from kimi_ops.kernels._selection import select_rows

BATCH_INVARIANT = True  # then every call has 8 parts, one tile and two launches
_FEW = 4  # tokens up to which a product of vectors beats one of matrices: x still fits registers
_ONE_LAUNCH = 8 * GROUPS.value  # tokens
_FEW_COLUMNS = 1024  # of a step: a 16-byte load for each thread of 4 warps
_FEW_WIDEST = 16 * _FEW_COLUMNS  # columns of x: its steps are unrolled
_FEW_ROWS = 4  # of the gate at most; each is 8 accumulators a thread and token


@triton.jit
def moe_route_few_kernel(
    x_ptr,  # [T, D]
    gate_ptr,  # [E, D]
    logits_ptr,  # [1, T, E]
    counter_ptr,
    bias_ptr,  # [E]
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    T,
    stride_x_t,
    stride_x_d,
    stride_gate_e,
    stride_gate_d,
    stride_logits_s,
    stride_logits_t,
    stride_logits_e,
    stride_bias_e,
    scale,
    D: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    n_group: tl.constexpr,
    topk_group: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    order_ptr,  # [T K], with BLOCK_S
    offsets_ptr,  # [local + 1], with BLOCK_S
    first,
    local,
    BLOCK_S: tl.constexpr,  # 0: no tables
    BLOCK_L: tl.constexpr,
    ROWS: tl.constexpr,  # experts of a program
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SELECT_T: tl.constexpr,
):
    offs_t = tl.arange(0, BLOCK_T)
    offs_e = tl.program_id(0) * ROWS + tl.arange(0, BLOCK_E)
    mask_e = (tl.arange(0, BLOCK_E) < ROWS) & (offs_e < E)
    x_rows = x_ptr + offs_t.to(tl.int64)[:, None, None] * stride_x_t
    gate_rows = gate_ptr + offs_e.to(tl.int64)[None, :, None] * stride_gate_e
    total = tl.zeros([BLOCK_T, BLOCK_E, BLOCK_D], tl.float32)
    for d0 in tl.static_range(0, D, BLOCK_D):
        offs_d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)[None, None, :]
        mask_d = offs_d < D
        mask_x = (offs_t < T)[:, None, None] & mask_d
        mask_gate = mask_e[None, :, None] & mask_d
        x = tl.load(x_rows + offs_d * stride_x_d, mask=mask_x, other=0.0)
        gate = tl.load(gate_rows + offs_d * stride_gate_d, mask=mask_gate, other=0.0)
        total += x.to(tl.float32) * gate.to(tl.float32)
    offs = offs_t.to(tl.int64)[:, None] * stride_logits_t + offs_e[None, :] * stride_logits_e
    mask = (offs_t < T)[:, None] & mask_e[None, :]
    tl.store(logits_ptr + offs, tl.sum(total, 2), mask=mask)

    if is_last(counter_ptr, tl.num_programs(0)):
        offs_s = tl.arange(0, SELECT_T)
        select_rows(
            logits_ptr, bias_ptr, weights_ptr, ids_ptr, offs_s, offs_s < T,
            stride_logits_s, stride_logits_t, stride_logits_e, stride_bias_e, scale, K,
            E, n_group, topk_group, NORMALIZE, SPLITS, C0, C1, L, BLOCK_K,
        )  # fmt: skip
        if BLOCK_S > 0:
            tl.debug_barrier()
            sort_pairs(ids_ptr, order_ptr, offsets_ptr, T * K, first, local, BLOCK_S, BLOCK_L)


@triton.jit
def moe_route_gate_kernel(
    x_ptr,  # [T, D]
    gate_ptr,  # [E, D]
    logits_ptr,  # [SPLITS, T, E], partial
    counter_ptr,  # one for each BLOCK_T tokens
    bias_ptr,  # [E]
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    T,
    columns,  # of a part, a multiple of BLOCK_D
    stride_x_t,
    stride_x_d,
    stride_gate_e,
    stride_gate_d,
    stride_logits_s,
    stride_logits_t,
    stride_logits_e,
    stride_bias_e,
    scale,
    D: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    n_group: tl.constexpr,
    topk_group: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    order_ptr,  # [T K], with BLOCK_S
    offsets_ptr,  # [local + 1], with BLOCK_S
    first,
    local,
    BLOCK_S: tl.constexpr,  # 0: no tables
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SELECT: tl.constexpr,  # in this launch
):
    tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles % SPLITS
    group = tl.program_id(0) // (tiles * SPLITS)
    offs_e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_t = group * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_e = offs_e < E
    mask_t = offs_t < T
    gate_rows = gate_ptr + offs_e.to(tl.int64)[:, None] * stride_gate_e
    x_rows = x_ptr + offs_t.to(tl.int64)[None, :] * stride_x_t
    total = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    for d0 in range(part * columns, tl.minimum((part + 1) * columns, D), BLOCK_D):
        offs_d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < D
        mask = mask_e[:, None] & mask_d[None, :]
        gate = tl.load(gate_rows + offs_d[None, :] * stride_gate_d, mask=mask, other=0.0)
        mask = mask_d[:, None] & mask_t[None, :]
        x = tl.load(x_rows + offs_d[:, None] * stride_x_d, mask=mask, other=0.0)
        if x_ptr.dtype.element_ty != gate_ptr.dtype.element_ty:
            x, gate = x.to(tl.float32), gate.to(tl.float32)
        total = tl.dot(gate, x, total, input_precision="ieee")
    offs = part.to(tl.int64) * stride_logits_s + offs_t.to(tl.int64)[None, :] * stride_logits_t
    offs += offs_e[:, None] * stride_logits_e
    tl.store(logits_ptr + offs, total, mask=mask_e[:, None] & mask_t[None, :])

    if SELECT:  # noqa: SIM102  (`and` would evaluate both)
        if is_last(counter_ptr + group, tiles * SPLITS):
            select_rows(
                logits_ptr, bias_ptr, weights_ptr, ids_ptr, offs_t, mask_t,
                stride_logits_s, stride_logits_t, stride_logits_e, stride_bias_e, scale, K,
                E, n_group, topk_group, NORMALIZE, SPLITS, C0, C1, L, BLOCK_K,
            )  # fmt: skip
            if BLOCK_S > 0:  # noqa: SIM102
                if is_last(counter_ptr + GROUPS, tl.num_programs(0) // (tiles * SPLITS)):
                    sort_pairs(
                        ids_ptr, order_ptr, offsets_ptr, T * K, first, local, BLOCK_S, BLOCK_L
                    )


class Call(NamedTuple):
    """One launch of a gate kernel, and whether the selection is in it."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]
    options: dict[str, int]
    selects: bool


def _parts(tokens: int, experts: int, tile: Tile, multiprocessors: int) -> int:
    """Parts of D: enough to give every SM a program, 8 at most; 8 in batch-invariant mode."""
    if is_batch_invariant():
        return PARTS
    programs = triton.cdiv(tokens, tile.T) * triton.cdiv(experts, tile.E)
    return min(PARTS, triton.next_power_of_2(triton.cdiv(multiprocessors, programs)))


def plan(
    outputs: tuple[Tensor, Tensor],
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
    sort: tuple[Tensor, Tensor, int, int] | None = None,
) -> Call:
    """The launch for a call, with its workspaces.

    ``sort`` is what a launch that selects writes tables to: order, offsets, and the first and the
    number of the local experts.
    """
    (tokens, D), experts = x.shape, gate_weight.shape[0]
    target = _target.target(x.device)
    multiprocessors = target.multiprocessors
    on_tensor_cores = x.dtype == gate_weight.dtype and x.element_size() == 2
    few = tokens <= _FEW and D <= _FEW_WIDEST and not is_batch_invariant()
    one_launch = tokens <= _ONE_LAUNCH and not is_batch_invariant()
    if one_launch:
        tile = NARROW if on_tensor_cores else NARROW_FLOAT32
    elif on_tensor_cores:
        tile = WIDE if target.shared_bytes > 1 << 16 else WIDE_64K
    else:
        tile = WIDE_FLOAT32
    if on_tensor_cores and not few:
        choice = TILES if one_launch else TILES_WIDE
        tile = choice.choose(x.device, tile, experts, D, tokens)
    if few:
        parts = 1
    else:
        parts = NARROW_PARTS if one_launch else _parts(tokens, experts, tile, multiprocessors)
    # Rows of a multiple of 32 logits are read in 16 bytes.
    width = triton.cdiv(experts, 32) * 32
    logits = torch.empty((parts, tokens, width), dtype=torch.float32, device=x.device)
    arguments = moe_select.arguments(
        *outputs, logits, bias, experts, n_group, topk_group, scale, normalize
    )
    arguments |= {
        "x_ptr": x,
        "gate_ptr": gate_weight,
        "counter_ptr": _arrivals.counters(x.device) if one_launch else None,
        "stride_x_t": x.stride(0),
        "stride_x_d": x.stride(1),
        "stride_gate_e": gate_weight.stride(0),
        "stride_gate_d": gate_weight.stride(1),
        "D": D,
    }
    wanted = sort if one_launch and sort is not None else (None, None, 0, 0)
    arguments |= tables.arguments(*wanted)
    if few:
        rows = min(triton.cdiv(experts, multiprocessors), _FEW_ROWS)
        arguments |= {
            "ROWS": rows,
            "BLOCK_T": triton.next_power_of_2(tokens),
            "BLOCK_E": triton.next_power_of_2(rows),
            "BLOCK_D": min(triton.next_power_of_2(max(D, 1)), _FEW_COLUMNS),
            "SELECT_T": 4,  # a row for each warp, so that each row has one
        }
        grid = (triton.cdiv(experts, rows),)
        return Call(moe_route_few_kernel, grid, arguments, {"num_warps": 4}, True)
    arguments |= {
        "columns": triton.cdiv(triton.cdiv(D, parts), tile.D) * tile.D,
        "BLOCK_E": tile.E,
        "BLOCK_T": tile.T,
        "BLOCK_D": tile.D,
        "SELECT": one_launch,
    }
    grid = (triton.cdiv(experts, tile.E) * parts * triton.cdiv(tokens, tile.T),)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Call(moe_route_gate_kernel, grid, arguments, options, one_launch)


def unsupported(
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> str | None:
    if torch.float64 in (x.dtype, gate_weight.dtype):
        return "moe_route in Triton computes in float32; x or gate_weight is float64"
    return None


def route(
    outputs: tuple[Tensor, Tensor],
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
    sort: tuple[Tensor, Tensor, int, int] | None = None,
) -> bool:
    """Routes; whether the tables of ``sort`` (see `plan`), if any, are written."""
    if x.shape[0] == 0:
        return False
    bias = bias.float()
    call = plan(outputs, x, gate_weight, bias, n_group, topk_group, scale, normalize, sort)
    call.kernel[call.grid](**call.arguments, **call.options)
    if not call.selects:
        names = moe_select.moe_select_kernel.arg_names
        moe_select.run({name: call.arguments[name] for name in names if name != "ROWS"})
    return call.selects and sort is not None


def launch(
    outputs: tuple[Tensor, Tensor],
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> None:
    route(outputs, x, gate_weight, bias, n_group, topk_group, scale, normalize)


def static_cases() -> Iterable[Any]:
    """Kimi K2.5 in each tile: 1 and 4 tokens, 64, 4,096; and float32."""
    from kimi_ops.testing.devices import ARCHES
    from kimi_ops.testing.static import StaticCase

    cuda = tuple(arch for arch in ARCHES if arch.startswith("sm"))
    h100 = _target.Target("cuda", 90, 132, 232448), cuda
    mi300 = _target.Target("hip", 942, 304, 65536), ("gfx942",)
    sizes = (1, "bfloat16"), (4, "bfloat16"), (64, "bfloat16"), (64, "float16"), (4096, "bfloat16")
    sizes += (64, "float32"), (4096, "float32")
    for (tokens, dtype), (gpu, arches) in itertools.product(sizes, (h100, mi300)):
        weights = torch.empty(tokens, 8, device="meta")
        ids = torch.empty(tokens, 8, dtype=torch.int32, device="meta")
        x = torch.empty(tokens, 7168, dtype=getattr(torch, dtype), device="meta")
        gate = torch.empty(384, 7168, dtype=x.dtype, device="meta")
        with _target.targeting(gpu):
            call = plan((weights, ids), x, gate, torch.empty(384, device="meta"), 1, 1, 2.827, True)
        name = f"{tokens}_tokens_{dtype}_{gpu.vendor}"
        yield StaticCase.of_call(name, call.kernel, call.arguments, arches=arches, **call.options)
