"""Launches `csrc/cuda/mla_decode_value.cu` behind the first stage of `csrc/cuda/mla_decode.cu`."""

from __future__ import annotations

from torch import Tensor

from kimi_ops._target import Target, target
from kimi_ops.cuda import mla_decode
from kimi_ops.cuda._launcher import launch_kernel
from kimi_ops.cuda._support import ELEMENTS, is_aligned

BATCH_INVARIANT = True  # the first stage's plan is; a token's sums here see nothing of the others

WARPS, VALUES, MAX_TOKENS = 8, 64, 16  # of a block
_ROW_BYTES = 2 * mla_decode.MAX_RANK + 16
SHARED_BYTES = (VALUES + MAX_TOKENS) * _ROW_BYTES + 4 * WARPS * 128  # ``ValueShared``


def tokens_of(gpu: Target, tokens: int, heads: int, values: int) -> int:
    """How many tokens share a block: all that can, but that there is one for each multiprocessor.

    Args:
        gpu: that the launch is for.
        tokens, heads, values: B * S, H and V.
    """
    each = MAX_TOKENS
    while each > 1 and -(-tokens // each) * heads * -(-values // VALUES) < gpu.multiprocessors:
        each //= 2
    return each


def unsupported(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    w_uv: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> str | None:
    return mla_decode.unsupported(q_latent, kv_cache, page_table, seq_lens, scale, kv_lora_rank)


def launch(
    value: Tensor,
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    w_uv: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> None:
    if value.numel() == 0:
        return
    batch, new, heads, values = value.shape
    stage = mla_decode.FirstStage.of(q_latent, kv_cache, page_table, kv_lora_rank)
    part, part_lse = stage.partials(q_latent, kv_lora_rank)
    call = (q_latent, kv_cache, page_table, seq_lens, scale, kv_lora_rank)
    stage.launch(part, None, part_lse, *call)
    each = tokens_of(target(value.device), batch * new, heads, values)
    columns = "pairs" if kv_lora_rank % 2 == 0 else "each"
    launch_kernel(
        "mla_decode_value",
        f"mla_decode_value_combine_kernel_{ELEMENTS[value.dtype]}_{columns}",
        grid=(-(-batch * new // each), heads, -(-values // VALUES)),
        block=(32 * WARPS,),
        args=[
            part,
            part_lse,
            seq_lens,
            w_uv,
            value,
            batch * new,
            new,
            heads,
            values,
            kv_lora_rank,
            each,
            page_table.shape[1] * kv_cache.shape[1],
            stage.plan.splits,
            stage.min_blocks,
            int(is_aligned(w_uv) and kv_lora_rank % 8 == 0),
            *(stride * w_uv.element_size() for stride in w_uv.stride()),
            seq_lens.stride(0),
        ],
        shared_bytes=SHARED_BYTES,
    )
