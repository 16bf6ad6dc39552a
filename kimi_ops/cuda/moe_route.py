"""Launches `csrc/cuda/moe_route.cu`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_ops import _arrivals
from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops._target import target
from kimi_ops.cuda._launcher import Argument, launch_kernel
from kimi_ops.cuda._support import ELEMENTS, aligned, refusal
from kimi_ops.cuda.moe_select import FEW_EXPERTS, Selection

BATCH_INVARIANT = True  # then every call has 8 parts, one tile and two launches
_ONE_LAUNCH = 64  # tokens
_PARTS = 8  # of D at most, and in batch-invariant mode
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # as the kernel numbers them


class Tables(NamedTuple):
    """What the launch of few tokens can sort into: `moe_sort`'s outputs, and the local experts."""

    order: Tensor
    offsets: Tensor
    first: int
    local: int


class Tile(NamedTuple):
    """A block of the product: experts, tokens, threads, dynamic shared memory."""

    E: int
    T: int
    threads: int
    shared_bytes: int


_MANY = Tile(E=128, T=64, threads=128, shared_bytes=3 * 2 * (192 * 64 + 64))
_ANY = Tile(E=32, T=32, threads=256, shared_bytes=0)


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
        return "moe_route in CUDA C++ computes in float32; x or gate_weight is float64"
    return refusal("moe_route", x, _DTYPES)


def _few(
    x: Tensor,
    gate_weight: Tensor,
    selection: Selection,
    token_tiles: int,
    blocks: int,
    tables: Tables | None,
) -> None:
    """Product and selection in one launch, and the tables if they are wanted."""
    warps = 8 * token_tiles
    own: list[Argument] = [x, gate_weight, x.stride(0), gate_weight.stride(0), x.shape[1]]
    own += [_arrivals.counters(x.device), *(tables or (None, None, 0, 0))]
    launch_kernel(
        "moe_route",
        f"moe_route_few_kernel_{ELEMENTS[x.dtype]}_{token_tiles}",
        grid=(blocks,),
        block=(32 * warps,),
        args=[*selection.arguments(), *own],
        shared_bytes=selection.scratch_bytes(warps),
    )


def _many(x: Tensor, gate_weight: Tensor, logits: Tensor, tile: Tile, tiles: int) -> None:
    """The product alone."""
    experts, columns = gate_weight.shape
    parts, tokens, _ = logits.shape
    args: list[Argument] = [logits, *logits.stride()[:2], tokens, experts, parts, x, gate_weight]
    if tile is _ANY:
        args += [_DTYPES.index(x.dtype), _DTYPES.index(gate_weight.dtype)]
        args += [*x.stride(), *gate_weight.stride(), columns]
    else:
        args += [x.stride(0), gate_weight.stride(0), columns]
    launch_kernel(
        "moe_route",
        "moe_route_any_kernel" if tile is _ANY else f"moe_route_many_kernel_{ELEMENTS[x.dtype]}",
        grid=(tiles, parts),
        block=(tile.threads,),
        args=args,
        shared_bytes=tile.shared_bytes,
    )


def route(
    outputs: tuple[Tensor, Tensor],
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
    tables: Tables | None = None,
) -> bool:
    """Routes; whether the tables, if they were wanted, are written."""
    (tokens, columns), experts = x.shape, gate_weight.shape[0]
    if tokens == 0:
        return False
    multiprocessors = target(x.device).multiprocessors
    invariant = is_batch_invariant()
    # A row's path follows from dtypes and D: which rows of x happen to be aligned does not matter.
    on_tensor_cores = x.dtype == gate_weight.dtype and x.element_size() == 2 and columns % 8 == 0
    if on_tensor_cores:
        x, gate_weight = aligned(x), aligned(gate_weight)
    few = on_tensor_cores and not invariant and tokens <= _ONE_LAUNCH and experts <= FEW_EXPERTS
    tile = _MANY if on_tensor_cores else _ANY
    token_tiles = 1 if tokens <= 16 else 2  # of 8 tokens a block, with a warp for each to select
    if few:
        tile = Tile(E=16, T=8 * token_tiles, threads=256 * token_tiles, shared_bytes=0)
    tiles = -(-experts // tile.E) * -(-tokens // tile.T)
    if few:  # parts of D as far as every block still has an SM
        parts = 4 // token_tiles
        while parts > 1 and parts * tiles > multiprocessors:
            parts //= 2
    else:  # until every SM has a block
        parts = 1
        while parts < _PARTS and (invariant or parts * tiles < multiprocessors):
            parts *= 2
    # Rows of a multiple of 4 logits are read in 16 bytes.
    logits = x.new_empty((parts, tokens, -(-experts // 4) * 4), dtype=torch.float32)
    selection = Selection(
        *outputs, logits, bias.float(), experts, n_group, topk_group, scale, normalize
    )
    if few:
        _few(x, gate_weight, selection, token_tiles, blocks=parts * tiles, tables=tables)
    else:
        _many(x, gate_weight, logits, tile, tiles)
        selection.launch()
    return few and tables is not None


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
    route(outputs, x, gate_weight, bias, top_k, n_group, topk_group, scale, normalize)
