"""Launches `csrc/cuda/moe_experts_int4.cu`: prepare, gate_up, down, sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_ops._expert_blocks import block_count
from kimi_ops.cuda import _int4
from kimi_ops.cuda._launcher import Argument, launch_kernel
from kimi_ops.cuda._support import ELEMENTS, is_aligned

BATCH_INVARIANT = True  # then blocks have one form and one size

_SHARED_TOKENS = {False: 16, True: 64}  # of the shared expert's blocks; with many tokens or not
_PIECE = 8  # elements that a 16-byte access moves
_COLUMNS = _int4.THREADS * _PIECE  # that a block of prepare and of sum has


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
    return _int4.weights_refusal(
        "moe_experts_int4",
        x,
        {
            "gate_up_packed": (gate_up_packed, gate_up_scale),
            "down_packed": (down_packed, down_scale),
        },
    )


def _dense(weight: Tensor) -> Tensor:
    """The weight, or a copy of it whose rows are whole 16-byte pieces."""
    missing = -weight.shape[1] % _PIECE
    if missing:
        return torch.nn.functional.pad(weight, (0, missing))
    return weight if is_aligned(weight) else weight.clone(memory_format=torch.contiguous_format)


class _Call:
    """A call's sizes and workspaces, and the arguments that both products take."""

    def __init__(
        self,
        x: Tensor,
        scale: Tensor,
        experts: int,
        width: int,
        ids: Tensor,
        shared_width: int,
        all_experts: int,
    ) -> None:
        self.x = x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
        self.tokens, self.depth = x.shape
        self.experts, self.width, self.choices = experts, width, ids.shape[1]
        self.shared_width = shared_width
        self.routed = self.tokens * self.choices > 0 and experts > 0 and width > 0
        self.slots = self.tokens * self.choices if self.routed else 0
        self.form = _int4.form_of(x, scale, self.slots / max(all_experts, 1))
        self.blocks, self.by_slot = block_count(self.slots, experts, self.form.block)
        self.suffix = ELEMENTS[x.dtype]

        def room(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        few = not self.form.many
        columns, starts = _int4.rearranged(self.depth // _int4.GROUP)
        self.xr = room(self.tokens, columns)
        self.lifted = (
            room(self.tokens * columns + _int4.ZEROS, dtype=torch.float16) if few else None
        )
        self.starts = room(self.tokens, starts, dtype=torch.float32) if few else None
        self.zeros = None if self.lifted is None else self.lifted[-_int4.ZEROS :]
        columns, starts = _int4.rearranged(width // _int4.GROUP)
        self.h = room(self.slots, columns)
        self.h_lifted = room(self.slots, columns, dtype=torch.float16) if few else None
        self.h_starts = room(self.slots, starts, dtype=torch.float32) if few else None
        self.h_shared = room(self.tokens, -(-shared_width // _PIECE) * _PIECE)
        self.rows = room(self.slots + self.tokens * (shared_width > 0), self.depth)
        self.tables = room(self.slots + 3 * self.blocks, dtype=torch.int32)

    def product(
        self,
        stage: str,
        packed: Tensor,
        scale: Tensor,
        dense: Tensor | None,
        rows: int,
        dense_rows: int,
        rows_a_row: int,
        more: list[Argument],
        few: list[Argument],
    ) -> None:
        """One of the two products.

        Args:
            stage: name of the launch.
            packed, scale: the experts' weights.
            dense: the shared expert's, or None.
            rows, dense_rows: of the result.
            rows_a_row: of the weights, for one of the result.
            more: further arguments.
            few: and what the form for few tokens takes beyond them.
        """
        form, groups = self.form, packed.shape[2] // 4
        block_rows = _int4.rows_of_block(form) // rows_a_row
        row_tiles = -(-rows // block_rows)
        shared_tiles = 0 if dense is None else -(-dense_rows // block_rows)
        shared_blocks = 0 if dense is None else -(-self.tokens // _SHARED_TOKENS[form.many])
        split = 1
        grid: tuple[int, ...] = (shared_tiles * shared_blocks + row_tiles * self.blocks,)
        if not form.many:
            row_tiles = max(row_tiles if self.blocks else 0, shared_tiles)
            grid = (shared_blocks + self.blocks, row_tiles)
            split = _int4.split_of(self.x, groups, grid[0] * grid[1])
        launch_kernel(
            "moe_experts_int4",
            f"moe_experts_int4_{stage}{'_many' if form.many else ''}_kernel_{self.suffix}",
            grid=grid,
            block=(form.threads(split),),
            shared_bytes=form.shared_bytes(split),
            args=[
                packed,
                scale,
                dense,
                self.tables,
                packed.stride(0) // 4,
                packed.stride(1) // 4,
                scale.stride(0),
                scale.stride(1),
                0 if dense is None else dense.stride(0),
                _int4.scale_kind(scale),
                groups,
                _int4.whole_chunks(self.x, scale),
                0 if dense is None else dense.shape[1],
                shared_tiles,
                shared_blocks,
                self.slots,
                self.blocks,
                self.tokens,
                form.few,
                split,
                _int4.SHIFT,
                *more,
                *([row_tiles, _int4.whole_pieces(scale)] if form.many else few),
            ],
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
    shared_width = 0 if shared_down is None else shared_down.shape[1]
    if shared_width == 0:
        shared_gate_up = shared_down = None
    experts, width = len(down_packed), down_packed.shape[2] * 8
    first, last = expert_range or (0, experts)
    ids, weights = ids.contiguous(), weights.contiguous()
    call = _Call(x, gate_up_scale, experts, width, ids, shared_width, last)
    groups = call.depth // _int4.GROUP
    if call.routed:
        chunks = -(-call.depth // _COLUMNS)
        launch_kernel(
            "moe_experts_int4",
            f"moe_experts_int4_prepare_kernel_{call.suffix}",
            grid=(experts + call.tokens * chunks,),
            block=(_int4.THREADS,),
            args=[
                call.x,
                ids,
                call.tables,
                call.xr,
                call.lifted,
                call.starts,
                call.x.stride(0),
                call.slots,
                call.blocks,
                call.tokens,
                groups,
                chunks,
                experts,
                first,
                call.form.block,
                call.by_slot,
            ],
        )
    if call.routed or shared_width:
        call.product(
            "gate_up",
            gate_up_packed,
            gate_up_scale,
            None if shared_gate_up is None else _dense(shared_gate_up),
            width,
            shared_width,
            2,
            [
                call.x,
                call.x.stride(0),
                call.xr,
                call.h,
                call.h_shared,
                width,
                shared_width,
                call.choices,
            ],
            [call.lifted, call.starts, call.h_lifted, call.h_starts, call.zeros],
        )
        call.product(
            "down",
            down_packed,
            down_scale,
            None if shared_down is None else _dense(shared_down),
            call.depth,
            call.depth,
            1,
            [call.h, call.h_shared, call.rows, call.depth],
            [call.h_lifted, call.h_starts, call.zeros],
        )
    launch_kernel(
        "moe_experts_int4",
        f"moe_experts_int4_sum_kernel_{call.suffix}",
        grid=(call.tokens, -(-call.depth // _COLUMNS)),
        block=(_int4.THREADS,),
        args=[
            call.rows,
            ids,
            weights,
            weights.element_size(),
            y,
            call.tokens,
            call.choices,
            call.depth,
            first,
            last,
            call.routed,
            shared_width > 0,
        ],
    )
