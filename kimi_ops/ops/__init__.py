"""The contract of every op: formula, schema, checks and outputs. One import line per op."""

from __future__ import annotations

from kimi_ops.ops.add_rms_norm import add_rms_norm
from kimi_ops.ops.int4_linear import int4_linear
from kimi_ops.ops.merge_attention import merge_attention
from kimi_ops.ops.mla_absorb_query import mla_absorb_query
from kimi_ops.ops.mla_decode import mla_decode
from kimi_ops.ops.mla_decode_value import mla_decode_value
from kimi_ops.ops.mla_latent_write import mla_latent_write
from kimi_ops.ops.mla_prefill import mla_prefill
from kimi_ops.ops.mla_project_value import mla_project_value
from kimi_ops.ops.moe_experts_int4 import moe_experts_int4
from kimi_ops.ops.moe_route import moe_route
from kimi_ops.ops.moe_route_sort import moe_route_sort
from kimi_ops.ops.moe_select import moe_select
from kimi_ops.ops.moe_sort import moe_sort
from kimi_ops.ops.patch_merge import patch_merge
from kimi_ops.ops.rms_norm import rms_norm
from kimi_ops.ops.silu_mul import silu_mul
from kimi_ops.ops.vision_attention import vision_attention
from kimi_ops.ops.vision_pos_embed import vision_pos_embed
from kimi_ops.ops.vision_rope import vision_rope

__all__ = [
    "add_rms_norm",
    "int4_linear",
    "merge_attention",
    "mla_absorb_query",
    "mla_decode",
    "mla_decode_value",
    "mla_latent_write",
    "mla_prefill",
    "mla_project_value",
    "moe_experts_int4",
    "moe_route",
    "moe_route_sort",
    "moe_select",
    "moe_sort",
    "patch_merge",
    "rms_norm",
    "silu_mul",
    "vision_attention",
    "vision_pos_embed",
    "vision_rope",
]
