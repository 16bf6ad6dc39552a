"""Reference of `mla_decode_value`: one op after the other, the latent result rounded in between."""

from __future__ import annotations

from torch import Tensor

from kimi_ops.reference import runs_anything as unsupported
from kimi_ops.reference.mla_decode import mla_decode
from kimi_ops.reference.mla_project_value import mla_project_value

__all__ = ["launch", "mla_decode_value", "unsupported"]


def mla_decode_value(
    q_latent: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    w_uv: Tensor,
    scale: float,
    kv_lora_rank: int,
) -> Tensor:
    out, _ = mla_decode(q_latent, kv_cache, page_table, seq_lens, scale, kv_lora_rank)
    value = mla_project_value(out.flatten(0, 1), w_uv)
    return value.view(*out.shape[:3], w_uv.shape[1])


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
    value.copy_(
        mla_decode_value(q_latent, kv_cache, page_table, seq_lens, w_uv, scale, kv_lora_rank)
    )
