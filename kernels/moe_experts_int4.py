"""Triton kernels of `kimi_ops.moe_experts_int4`: the chosen experts on int4 weights, four launches.

    y[t] = sum_k weights[t, k] * down(silu(gate x) * up x)  [+ shared expert]

    prepare   per expert: its slots and blocks (`_moe_blocks`)   |  per token: x rearranged
    gate_up   program = (block of tokens of one expert, BN gate rows and the same BN up rows);
              silu(gate) * up in the epilogue, rearranged for the next product: h [T K, F]
    down      program = (block of tokens, 2 BN rows of down)  -> one row per slot: [T K, D]
    sum       program = (token, 1024 columns): weights, sum over k in a fixed order, shared expert

    grid of gate_up and down, blocks fastest, so that two blocks of an expert read the same weights
    at about the same time and the second finds them in L2:

        | shared: row tile 0, token blocks | shared: row tile 1 | .. | row tile 0: block 0 1 .. | ..

The shared expert's 16-bit weights are further programs of the same launches. Unused blocks end
after one load. The form follows from the tokens in a block: `_int4_few_direct` for 1 and 2 and
`_int4_many_gluon` from 8 on, where `_int4_few_plan` and `_int4_many_plan` say that a call is such
as they are for, else `_int4_few.separated` up to 8 and `_int4_many.blocked` above. A block holds at
most 64 (`_int4_product`), 16 in batch-invariant mode; more of them read the weights again.

Shared memory: 3 or 4 stages of codes and x, 17 to 104 KiB. Bytes: 0.5625 per weight of a chosen
expert (codes and 16-bit scales), once per block; x, h and the slot rows add 2 percent at T = 1.
Numerics: float32 accumulation; h and the slot rows are rounded to x's dtype once, as the reference
does; no atomics, so equal from run to run.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; compressed-tensors ``pack-quantized``.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kimi_ops._expert_blocks import block_count
from kimi_ops._target import targeting
from kimi_ops.kernels import _int4, _int4_few_plan, _int4_many_plan, _moe_blocks
from kimi_ops.kernels._int4_product import LEAST_COLUMNS, Tile, compiled_tiles, tile_for
from kimi_ops.kernels._moe_experts_int4 import (
    moe_experts_int4_down_kernel,
    moe_experts_int4_gate_up_kernel,
    moe_experts_int4_prepare_kernel,
    moe_experts_int4_sum_kernel,
)

BATCH_INVARIANT = True  # then `tile_for` has one answer

_PREPARE_GROUPS = 32  # 1,024 columns of x
_SUM_COLUMNS = 1024


class _Call:
    """A call's sizes, workspaces and tile, and the arguments of its launches."""

    def __init__(
        self,
        y: Tensor,
        x: Tensor,
        gate_up: tuple[Tensor, Tensor],
        down: tuple[Tensor, Tensor],
        ids: Tensor,
        shared: tuple[Tensor, Tensor] | None,
        expert_range: Sequence[int] | None,
        tile: Tile | None = None,
        direct: bool | None = None,
    ) -> None:
        self.T, self.D = x.shape
        self.E, self.F, self.K = len(down[0]), down[0].shape[2] * 8, ids.shape[1]
        self.first, self.last = expert_range or (0, self.E)
        self.f_shared = shared[0].shape[0] // 2 if shared else 0
        self.slots = self.T * self.K
        self.routed = self.slots > 0 and self.E > 0 and self.F > 0
        # Of an expert range its end is the best guess at how many experts the model has.
        experts = max(self.E, int(self.last))
        scales = (gate_up[1], down[1])
        gluon = _int4_many_plan.fits(x, scales, shared if shared and self.f_shared else ())
        most = 64 if self.D % 64 == 0 else 16  # with more, masked rows of `down` spill
        self.tile = tile or tile_for(x.device, self.T, self.slots, experts, gluon=gluon, most=most)
        if self.tile.gluon and self.f_shared and not _int4_many_plan.rows_fit(x, 8):
            x = x.clone(memory_format=torch.contiguous_format)
        self.blocks, self.by_slot = block_count(self.slots, self.E, self.tile.tokens)
        if not self.routed:
            self.blocks = 0

        def room(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        self.direct = _int4_few_plan.fits(self.tile, x.device) if direct is None else direct
        groups, groups_down = ((1 + self.direct) * n // 32 for n in (self.D, self.F))
        self.tables = _moe_blocks.tables(self.slots, self.blocks, x.device)
        d, f = (triton.cdiv(n, 64) * 64 if self.direct else n for n in (self.D, self.F))
        self.xr = room(self.T * d + _int4_few_plan.ZEROS * self.direct)
        self.bias = room(self.T, groups, dtype=torch.float32)
        self.h, self.h_shared = room(self.slots, f), room(self.T, self.f_shared)
        self.h_bias = room(self.slots, groups_down, dtype=torch.float32)
        self.rows = room(self.slots + self.T * bool(self.f_shared), self.D)
        self.y, self.x, self.ids, self.shared = y, x, ids, shared
        self.gate_up, self.down = gate_up, down
        self.chunks = triton.cdiv(self.D // 32, _PREPARE_GROUPS)

    def prepare(self) -> dict[str, Any]:
        return {
            "x_ptr": self.x,
            "xr_ptr": self.xr,
            "bias_ptr": self.bias,
            "ids_ptr": self.ids,
            "tables_ptr": self.tables,
            "stride_x_t": self.x.stride(0),
            "stride_x_d": self.x.stride(1),
            "stride_ids_t": self.ids.stride(0),
            "stride_ids_k": self.ids.stride(1),
            "experts": self.E,
            "slot_count": self.slots,
            "K": self.K,
            "first": int(self.first),
            "blocks": self.blocks,
            "groups": self.D // 32,
            "chunks": self.chunks,
            "TOKENS": self.tile.tokens,
            "SEPARATED": self.tile.separated,
            "LIFTED": self.direct,
            "BY_SLOT": self.by_slot,
            "BLOCK_S": 256 if self.slots <= 256 else 1024,
            "BLOCK_G": _PREPARE_GROUPS,
        }

    def _product(
        self,
        weights: tuple[Tensor, Tensor],
        shared: Tensor | None,
        rows: int,
        routed_rows: int,
        shared_rows: int,
    ) -> tuple[int, dict[str, Any]]:
        """Programs and common arguments of a product with ``rows`` rows of weights a program."""
        packed, scale = weights
        units, strides = _int4.units(packed)
        groups = packed.shape[2] // 4
        tile = self.tile
        shared_tokens = max(LEAST_COLUMNS if tile.rows == 32 else 16, tile.tokens)
        shared_blocks = triton.cdiv(self.T, shared_tokens)
        width = packed.shape[1] if shared is None else shared.shape[1]
        shared_programs = 0 if shared is None else triton.cdiv(shared_rows, rows) * shared_blocks
        arguments = {
            "units_ptr": units,
            "scale_ptr": scale,
            "shared_ptr": shared,
            "tables_ptr": self.tables,
            "stride_units_e": strides[0],
            "stride_units_n": strides[1],
            "stride_scale_e": scale.stride(0),
            "stride_scale_n": scale.stride(1),
            "stride_shared_n": 0 if shared is None else shared.stride(0),
            "T": self.T,
            "K": self.K,
            "F_SHARED": self.f_shared,
            "groups": groups,
            "blocks": max(self.blocks, 1),
            "shared_programs": shared_programs,
            "shared_blocks": shared_blocks,
            "TOKENS": tile.tokens,
            "SHARED": shared is not None,
        }
        if tile.gluon:
            strides = _int4_many_plan.scale_strides(scale)
            return shared_programs, arguments | _int4_many_plan.constants(
                tile, groups, self.x.device
            ) | {
                "stride_scale_e": strides[0],
                "stride_scale_n": strides[1],
                "stride_shared_n": 0 if shared is None else shared.stride(0) // 8,
            }
        if self.direct:
            for name in ("units_ptr", "stride_units_e", "stride_units_n"):
                del arguments[name]
            own = _int4_few_plan.arguments(tile.tokens, packed, scale)
            return shared_programs, arguments | own | {
                "zeros_ptr": self.xr[-_int4_few_plan.ZEROS :],
                "stride_words_e": strides[0],
                "stride_words_n": strides[1],
                "EVEN_SHARED": width % 64 == 0,
            }
        return shared_programs, arguments | {
            "GS": tile.groups,
            "TILES": tile.steps,
            "BN": tile.rows,
            "BLOCK_TS": shared_tokens,
            "BLOCK_K": 64,
            "SEPARATED": tile.separated,
            "EVEN": groups % (tile.groups * tile.steps) == 0,
            "EXACT": routed_rows % rows == 0,
            "EVEN_SHARED": width % 64 == 0,
            "ASSEMBLY": _int4.takes_assembly(self.x.device),
        }

    def kernels(self) -> tuple[Any, Any, dict[str, int]]:
        """Those of the two products, and the options of their launches."""
        if self.tile.gluon:
            many = importlib.import_module("kimi_ops.kernels._moe_experts_int4_gluon")
            return (
                many.moe_experts_int4_gate_up_gluon_kernel,
                many.moe_experts_int4_down_gluon_kernel,
                self.tile.options,
            )
        if self.direct:
            few = importlib.import_module("kimi_ops.kernels._moe_experts_int4_direct")
            return (
                few.moe_experts_int4_gate_up_direct_kernel,
                few.moe_experts_int4_down_direct_kernel,
                _int4_few_plan.options(self.x.device),
            )
        kernel = moe_experts_int4_gate_up_kernel, moe_experts_int4_down_kernel
        return *kernel, self.tile.options

    def gate_up_launch(self) -> tuple[int, dict[str, Any]]:
        """Programs and arguments."""
        shared = self.shared[0] if self.shared and self.f_shared else None
        rows = self.tile.rows
        programs, arguments = self._product(self.gate_up, shared, rows, self.F, self.f_shared)
        arguments |= {
            "x_ptr": self.x,
            "xr_ptr": self.xr,
            "bias_ptr": self.bias,
            "h_ptr": self.h,
            "h_bias_ptr": self.h_bias,
            "h_shared_ptr": self.h_shared,
            "stride_x_t": self.x.stride(0),
            "F": self.F,
        }
        if self.tile.gluon:
            del arguments["bias_ptr"], arguments["h_bias_ptr"]
            arguments["stride_x_t"] //= 8
        return programs + triton.cdiv(self.F, rows) * self.blocks, arguments

    def down_launch(self) -> tuple[int, dict[str, Any]]:
        """Programs and arguments."""
        shared = self.shared[1] if self.shared and self.f_shared else None
        rows = 2 * self.tile.rows
        programs, arguments = self._product(self.down, shared, rows, self.D, self.D)
        arguments |= {
            "hr_ptr": self.h,
            "bias_ptr": self.h_bias,
            "h_shared_ptr": self.h_shared,
            "rows_ptr": self.rows,
            "D": self.D,
        }
        if self.direct:
            arguments["EXACT"] = self.D % rows == 0
        elif self.tile.gluon:
            del arguments["bias_ptr"]
        return programs + triton.cdiv(self.D, rows) * self.blocks, arguments

    def sum(self, weights: Tensor) -> dict[str, Any]:
        return {
            "rows_ptr": self.rows,
            "ids_ptr": self.ids,
            "weights_ptr": weights,
            "y_ptr": self.y,
            "stride_ids_t": self.ids.stride(0),
            "stride_ids_k": self.ids.stride(1),
            "stride_weights_t": weights.stride(0),
            "stride_weights_k": weights.stride(1),
            "T": self.T,
            "K": self.K,
            "D": self.D,
            "first": int(self.first),
            "last": int(self.last),
            "ROUTED": self.routed,
            "SHARED": self.f_shared > 0,
            "BLOCK_K": 8,
            "BLOCK_D": _SUM_COLUMNS,
        }


def unsupported(
    x: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    expert_range: Sequence[int] | None,
) -> str | None:
    return _int4.refusal(
        "moe_experts_int4",
        x,
        {
            "gate_up_packed": (gate_up_packed, gate_up_scale),
            "down_packed": (down_packed, down_scale),
        },
        {"shared_gate_up": shared_gate_up, "shared_down": shared_down},
    )


def launch(
    y: Tensor,
    x: Tensor,
    gate_up_packed: Tensor,
    gate_up_scale: Tensor,
    down_packed: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    ids: Tensor,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    expert_range: Sequence[int] | None,
) -> None:
    if y.numel() == 0:
        return
    shared = None
    if shared_gate_up is not None and shared_down is not None:
        shared = shared_gate_up, shared_down
        if x.stride(1) != 1:
            x = x.contiguous()
    call = _Call(
        y,
        x,
        (gate_up_packed, gate_up_scale),
        (down_packed, down_scale),
        ids,
        shared,
        expert_range,
    )
    if call.routed:
        programs = call.E + call.T * call.chunks
        moe_experts_int4_prepare_kernel[(programs,)](**call.prepare(), num_warps=4)
    programs, arguments = call.gate_up_launch()
    if programs:
        gate_up_kernel, down_kernel, options = call.kernels()
        gate_up_kernel[(programs,)](**arguments, **options)
        programs, arguments = call.down_launch()
        down_kernel[(programs,)](**arguments, **options)
    grid = (call.T, triton.cdiv(call.D, _SUM_COLUMNS))
    moe_experts_int4_sum_kernel[grid](**call.sum(weights), num_warps=4)


def static_cases() -> Iterable[Any]:
    """Every tile at the shapes of Kimi K2.5 with its shared expert, on the GPUs that have the tile;
    then float16, widths that no tile divides, and the two kernels around the products."""
    from kimi_ops.testing.static import StaticCase

    def call(tile: Tile, tokens: int, dtype: torch.dtype, d: int, f: int, *, direct: bool) -> _Call:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def weights(n: int, k: int) -> tuple[Tensor, Tensor]:
            return meta(8, n, k // 8, dtype=torch.int32), meta(8, n, k // 32)

        ids, shared = meta(tokens, 8, dtype=torch.int32), (meta(2 * f, d), meta(d, f))
        up, down = weights(2 * f, d), weights(d, f)
        return _Call(meta(tokens, d), meta(tokens, d), up, down, ids, shared, None, tile, direct)

    widths = (
        (torch.bfloat16, 7168, 2048),
        (torch.float16, 7168, 256),
        (torch.bfloat16, 160, 96),
    )
    for tile, arches, gpu in compiled_tiles():
        tokens = tile.tokens
        with targeting(gpu):
            forms = (False, True) if _int4_few_plan.fits(tile, torch.device("meta")) else (False,)
        for direct, (dtype, d, f) in itertools.product(forms, widths):
            if d == 160 and (tile.gluon or tokens > 16):
                continue  # never chosen
            if direct:
                arches = tuple(arch for arch in arches if arch in _int4_few_plan.ARCHES)
            with targeting(gpu):
                made = call(tile, max(tokens, 2), dtype, d, f, direct=direct)
                name = f"{str(dtype).removeprefix('torch.')}_{d}x{f}_{tokens}_{arches[0]}"
                gate_up_kernel, down_kernel, options = made.kernels()
                for stage, kernel, arguments in (
                    ("gate_up", gate_up_kernel, made.gate_up_launch()[1]),
                    ("down", down_kernel, made.down_launch()[1]),
                ):
                    yield StaticCase.of_call(
                        f"{'gluon_' * tile.gluon}{'direct_' * direct}{stage}_{name}",
                        kernel,
                        arguments,
                        num_warps=tile.warps,
                        num_stages=tile.stages,
                        options={k: n for k, n in options.items() if k == "maxnreg"},
                        arches=arches,
                    )
            if arches[0] == "sm_80" and dtype == torch.bfloat16 and d == 7168 and not tile.gluon:
                name = f"prepare_{'lifted_' * direct}{tokens}"
                yield StaticCase.of_call(name, moe_experts_int4_prepare_kernel, made.prepare())
    weights = torch.empty(2, 8, device="meta")
    yield StaticCase.of_call("sum", moe_experts_int4_sum_kernel, made.sum(weights))
