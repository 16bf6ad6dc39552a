"""Mutations of the kernels of norms, sort, router, vision and latent write."""

from __future__ import annotations

from cuda_mutations_base import WRONG, Mutation

from kimi_ops.testing.ptx import (
    Deadlock,
    Misaligned,
    MissingWait,
    OutOfBounds,
    Race,
    Uninitialised,
)

MUTATIONS = [
    # Row norms.
    Mutation(
        "a block's partial sums are read without a barrier",
        "rms_norm", "bf16-2x7168", "reduce.cuh",
        "  __syncthreads();\n  Sum sum = 0;", "  Sum sum = 0;", Race,
    ),
    Mutation(
        "the last step of a warp's sum is left out",
        "rms_norm", "bf16-3x127", "reduce.cuh",
        "for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {\n    value +=",
        "for (int lanes = WARP / 2; lanes > 1; lanes /= 2) {\n    value +=", WRONG,
    ),
    Mutation(
        "rows past the last one are not left out",
        "rms_norm", "bf16-3x127", "rms_norm.cu",
        "  if (row >= rows) return;", "", OutOfBounds,
    ),
    Mutation(
        "a row is read one vector too far",
        "rms_norm", "bf16-2x3x512", "rows.cuh",
        "      if (d < columns) held[i] = load_vec", "      if (d <= columns) held[i] = load_vec",
        OutOfBounds, slow=True,
    ),
    Mutation(
        "a thread's vectors begin one element late",
        "rms_norm", "bf16-2x3x512", "rows.cuh",
        "first(thread * N)", "first(thread * N + 1)", Misaligned,
    ),
    Mutation(
        "results go to the next row",
        "rms_norm", "bf16-2x3x512", "rms_norm.cu",
        "y_gmem + row * columns;", "y_gmem + (row + 1) * columns;", OutOfBounds, slow=True,
    ),
    Mutation(
        "the sum is not divided by the number of columns",
        "add_rms_norm", "bf16-3x127", "rows.cuh",
        "sqrtf(squares / columns + eps)", "sqrtf(squares + eps)", WRONG,
    ),
    # The sort.
    Mutation(
        "the warps' counts are read without a barrier",
        "moe_sort", "skewed", "moe_sort.cu", "  __syncthreads();\n", "", Race,
    ),
    Mutation(
        "a hit's own lane counts as one below it",
        "moe_sort", "skewed", "moe_sort.cu",
        "__popc(lanes & ((1u << lane) - 1))", "__popc(lanes & ((2u << lane) - 1))", OutOfBounds,
    ),
    Mutation(
        "a warp's own hits count as before it",
        "moe_sort", "skewed", "moe_sort.cu",
        "if (other < warp) mine_before", "if (other <= warp) mine_before", Race,
    ),
    Mutation(
        "pairs past the end are read",
        "moe_sort", "one", "moe_sort.cu",
        "if (pair < end) expert[j]", "expert[j]", OutOfBounds,
    ),
    # The router, up to 64 tokens: a product and a selection in one launch.
    Mutation(
        "a block arrives before its warps have stored their logits",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "__shared__ bool last_smem;\n  __syncthreads();", "__shared__ bool last_smem;", Race,
    ),
    Mutation(
        "arrivals publish nothing (relaxed for acq_rel)",
        "moe_route", "3 tokens", "ptx.cuh",
        "atom.global.add.acq_rel.gpu.s32", "atom.global.add.relaxed.gpu.s32", Race,
    ),
    Mutation(
        "the last but one block selects",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "== blocks - 1;", "== blocks - 2;", Race,
    ),
    Mutation(
        "no block finds itself last",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "== blocks - 1;", "== blocks;", Uninitialised, slow=True,
    ),
    Mutation(
        "whether a block is last is read without a barrier",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "    if (last_smem) *counter_gmem = 0;\n  }\n  __syncthreads();",
        "    if (last_smem) *counter_gmem = 0;\n  }", Uninitialised,
    ),
    Mutation(
        "the warps' sums are read without a barrier",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "  __syncthreads();\n#pragma unroll\n  for (int i = threadIdx.x;",
        "#pragma unroll\n  for (int i = threadIdx.x;", Race, slow=True,
    ),
    Mutation(
        "rows past the last token are read",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "min(token + r + 8 * n, tokens - 1)", "token + r + 8 * n", OutOfBounds, slow=True,
    ),
    # The router of many tokens: three stages of asynchronous copies.
    Mutation(
        "the product waits for one copy too few",
        "moe_route", "65 tokens", "moe_route_many.cuh",
        "copy_async_wait<STAGES - 2>", "copy_async_wait<STAGES - 1>", MissingWait,
    ),
    Mutation(
        "a stage is read without a barrier after the wait",
        "moe_route", "65 tokens", "moe_route_many.cuh",
        "    __syncthreads();  // stage i", "    // stage i", Race,
    ),
    Mutation(
        "a stage's copies are not committed",
        "moe_route", "65 tokens", "moe_route_many.cuh",
        "    }\n    copy_async_commit();\n  }\n", "    }\n  }\n", MissingWait,
    ),
    Mutation(
        "the next copy goes into the stage that is read",
        "moe_route", "many steps", "moe_route_many.cuh",
        "smem + (i + STAGES - 1) % STAGES * STAGE", "smem + i % STAGES * STAGE", MissingWait,
    ),
    Mutation(
        "rows past the last token are copied",
        "moe_route", "65 tokens", "moe_route_many.cuh",
        "index < (of_gate ? experts : tokens) && d", "d", OutOfBounds, slow=True,
    ),
    # The selection.
    Mutation(
        "keys end in the expert, not in its complement",
        "moe_select", "ties", "select.cuh",
        "+ (ID_MASK - expert_of(i));", "+ expert_of(i);", OutOfBounds,
    ),
    Mutation(
        "experts of dropped groups stay",
        "moe_select", "bf16-groups", "select.cuh",
        "pair_smem[e * per_expert >> 20] != KEPT", "false", WRONG, slow=True,
    ),
    Mutation(
        "a group's lanes do not wait for each other (no __syncwarp)",
        "moe_select", "bf16-groups", "select.cuh", "  __syncwarp();\n", "", None,
        why="races between lanes of one warp are not found", times=2,
    ),
    # The vision encoder's.
    Mutation(
        "a corner's sums are overwritten before all have read them",
        "patch_merge", "bf16-width-2040", "patch_merge.cu",
        "  __syncthreads();  // what the call before left there has been read\n", "", Race,
    ),
    Mutation(
        "a corner's sums are read without a barrier",
        "patch_merge", "bf16-width-2040", "patch_merge.cu",
        "  __syncthreads();\n  float sum = 0.0f;", "  float sum = 0.0f;", Race,
    ),
    Mutation(
        "patches that the grid announces past the end are read",
        "patch_merge", "announced", "patch_merge.cu",
        "patch >= 0 && patch < length;", "patch >= 0;", OutOfBounds,
    ),
    Mutation(
        "the frames of a clip are not told apart",
        "patch_merge", "bf16-small", "patch_merge.cu",
        "++frame, patch += at.h * at.w", "++frame", WRONG,
    ),
    Mutation(
        "patches past the last one are turned",
        "vision_rope", "announced", "vision_rope.cu",
        "  if (patch >= length) return;", "", OutOfBounds,
    ),
    Mutation(
        "row and column change places",
        "vision_rope", "bf16-head-4", "vision_rope.cu",
        "pair % 2 == 0 ? column : row", "pair % 2 == 0 ? row : column", WRONG,
    ),
    Mutation(
        "sines are read without __syncwarp",
        "vision_rope", "bf16-head-4", "vision_rope.cu", "  __syncwarp();\n", "", None,
        why="races between lanes of one warp are not found",
    ),
    # The latent write: three warps of four meet at a barrier of their own.
    Mutation(
        "the barrier waits for a warp that never comes",
        "mla_latent_write", "fp8-tiny", "mla_latent_write.cu",
        "named_barrier_sync(1, Q_WARPS * WARP)", "named_barrier_sync(1, (Q_WARPS + 1) * WARP)",
        Deadlock,
    ),
    Mutation(
        "partial sums are read without the barrier",
        "mla_latent_write", "fp8-tiny", "mla_latent_write.cu",
        "    named_barrier_sync(1, Q_WARPS * WARP);\n", "", Race,
    ),
    Mutation(
        "slots outside the cache are written",
        "mla_latent_write", "fp8-tiny", "mla_latent_write.cu",
        "  if (!inside) return;  // only now", "", OutOfBounds, slow=True,
    ),
]  # fmt: skip
