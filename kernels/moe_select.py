"""Triton kernel of `kimi_ops.moe_select`: one warp per row of logits, one launch.

    s = sigmoid(logits);  ids = the K largest of s + bias (in the kept groups);  w = s[ids]

Grid: ``(cdiv(T, ROWS),)``, each program one warp, which keeps its rows in registers::

    logits [T, E]   program 0: |row 0 ........|      12 experts of E = 384 per lane
                    program 1: |row 1 ........|      K rounds of a maximum over registers and warp

`_selection` has the method. From 2,048 rows on a warp takes two, whose chains of dependent rounds
overlap; with fewer, idle SMs would take the second one.

Bytes: logits once, 4 T E, and 8 T K out; the K logits of the chosen are read again, from L1. No
shared memory. Bound by integer operations: 3 per expert and round.
Numerics: float32; weights within two units in the last place before they are normalised.

Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2 (auxiliary-loss-free balancing).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops.kernels._selection import select_rows, shape_of

BATCH_INVARIANT = True  # then a warp has one row
_TWO_ROWS_FROM = 2048


@triton.jit
def moe_select_kernel(
    logits_ptr,  # [SPLITS, T, E]
    bias_ptr,  # [E]
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    T,
    stride_logits_s,
    stride_logits_t,
    stride_logits_e,
    stride_bias_e,
    scale,
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
    ROWS: tl.constexpr,
):
    offs_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    select_rows(
        logits_ptr, bias_ptr, weights_ptr, ids_ptr, offs_t, offs_t < T,
        stride_logits_s, stride_logits_t, stride_logits_e, stride_bias_e, scale, K,
        E, n_group, topk_group, NORMALIZE, SPLITS, C0, C1, L, BLOCK_K,
    )  # fmt: skip


def arguments(
    weights: Tensor,
    ids: Tensor,
    logits: Tensor,
    bias: Tensor,
    experts: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> dict[str, Any]:
    """Arguments of a selection kernel, without ROWS.

    Args:
        weights, ids: the outputs, ``[T, K]``.
        logits: ``[SPLITS, T, >= E]`` float32, to be summed over the splits.
        bias: ``[E]`` float32.
        experts, n_group, topk_group, scale, normalize: as the op has them.
    """
    shape = shape_of(experts, n_group, topk_group)
    return {
        "logits_ptr": logits,
        "bias_ptr": bias,
        "weights_ptr": weights,
        "ids_ptr": ids,
        "T": weights.shape[0],
        "stride_logits_s": logits.stride(0),
        "stride_logits_t": logits.stride(1),
        "stride_logits_e": logits.stride(2),
        "stride_bias_e": bias.stride(0),
        "scale": scale,
        "K": weights.shape[1],
        "E": experts,
        "n_group": n_group,
        "topk_group": topk_group,
        "NORMALIZE": normalize,
        "SPLITS": logits.shape[0],
        **shape._asdict(),
        "BLOCK_K": triton.next_power_of_2(weights.shape[1]),
    }


def rows_of_program(tokens: int) -> int:
    """Rows that one warp selects."""
    return 1 if is_batch_invariant() or tokens < _TWO_ROWS_FROM else 2


def run(call: dict[str, Any]) -> None:
    """Launches the kernel on `arguments`."""
    rows = rows_of_program(call["T"])
    moe_select_kernel[(triton.cdiv(call["T"], rows),)](**call, ROWS=rows, num_warps=1)


def unsupported(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> str | None:
    if logits.dtype == torch.float64:
        return "moe_select in Triton computes in float32; logits are float64"
    return None


def launch(
    outputs: tuple[Tensor, Tensor],
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    normalize: bool,
) -> None:
    if logits.shape[0] == 0:
        return
    call = arguments(
        *outputs, logits[None], bias, logits.shape[1], n_group, topk_group, scale, normalize
    )
    run(call)


def static_cases() -> Iterable[Any]:
    """Kimi K2.5 with one and two rows, DeepSeek-V3's groups, and the largest row."""
    from kimi_ops.testing.static import StaticCase

    for experts, top_k, n_group, topk_group, rows in (
        (384, 8, 1, 1, 1), (384, 8, 1, 1, 2), (256, 8, 8, 4, 1), (1024, 32, 1, 1, 1),
    ):  # fmt: skip
        call = arguments(
            torch.empty(64, top_k, device="meta"),
            torch.empty(64, top_k, dtype=torch.int32, device="meta"),
            torch.empty(1, 64, experts, device="meta"),
            torch.empty(experts, device="meta"),
            experts, n_group, topk_group, 2.827, True,
        )  # fmt: skip
        name = f"{experts}_experts_{n_group}_groups_{rows}_rows"
        yield StaticCase.of_call(name, moe_select_kernel, {**call, "ROWS": rows}, num_warps=1)
