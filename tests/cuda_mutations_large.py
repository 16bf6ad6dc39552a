"""Mutations of MLA decode on mma.sync, and of the int4 products."""

from __future__ import annotations

from cuda_mutations_base import WRONG, Mutation

from kimi_ops.testing.ptx import Misaligned, MissingWait, OutOfBounds, Race

MUTATIONS = [
    # MLA decode: tiles of 32 tokens, two of them in turn.
    Mutation(
        "a tile is read before its copies have landed",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "    copy_async_wait<0>();\n    __syncthreads();  // the tokens are there",
        "    __syncthreads();  // the tokens are there", MissingWait, invariant=True,
    ),
    Mutation(
        "a tile is read, and the other refilled, without a barrier",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "    __syncthreads();  // the tokens are there, and nobody needs",
        "    // the tokens are there, and nobody needs", Race, invariant=True, slow=True,
    ),
    Mutation(
        "the tiles change places (wrong parity)",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "(block - blocks.first) % 2 != 0", "(block - blocks.first) % 2 == 0", WRONG,
        invariant=True, slow=True,
    ),
    Mutation(
        "warps that share scores do not meet",
        "mla_decode", "100 tokens", "mla_decode_products.cuh",
        "if (at.warp / S::K_GROUPS == adders) named_barrier_sync(1 + adders, S::K_GROUPS * WARP);",
        "", Race, invariant=True, slow=True,
    ),
    Mutation(
        "maxima are read without a barrier",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "    __syncthreads();\n#pragma unroll\n    for (int half = 0; half < 2; ++half) {\n"
        "      const int row", "#pragma unroll\n    for (int half = 0; half < 2; ++half) {\n"
        "      const int row", Race, invariant=True, slow=True,
    ),
    Mutation(
        "p is read without a barrier",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "    __syncthreads();\n    float fade[ROWS / 8];", "    float fade[ROWS / 8];", Race,
        invariant=True, slow=True,
    ),
    Mutation(
        "page ids are not looked up for the next but one tile",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "      tokens.look_up(cache, block + 2, end);\n", "", WRONG, invariant=True, slow=True,
    ),
    Mutation(
        "the sums do not fade when the maximum grows",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "acc[m][n][e] *= fade[2 * m + e / 2]", "acc[m][n][e] *= 1.0f", WRONG, invariant=True,
        slow=True,
    ),
    Mutation(
        "a row sees one token more than it may",
        "mla_decode", "bf16-small", "mla_decode_split.cuh",
        "token < limit[half] ?", "token <= limit[half] ?", WRONG, slow=True,
    ),
    Mutation(
        "absurd page ids are followed",
        "mla_decode", "bf16-lost-page", "mla_decode_tile.cuh",
        "const bool present = page[i] >= 0 && page[i] < cache.num_pages;",
        "const bool present = true;", OutOfBounds, slow=True,
    ),
    Mutation(
        "rows of matrices start in the middle of 16 bytes",
        "mla_decode", "bf16-small", "mla_decode_products.cuh",
        "lane / 8 % 2 * 16;", "lane / 8 % 2 * 8;", Misaligned, slow=True,
    ),
    Mutation(
        "the joined sums are overwritten before they are read",
        "mla_decode", "two chunks", "mla_decode_combine.cuh",
        "      __syncthreads();  // the sums of the chunk before have been read\n", "", Race,
        host=("kimi_ops.cuda.mla_decode.ROWS_A_MULTIPROCESSOR", 0), slow=True,
    ),
    Mutation(
        "the joined sums are read without a barrier",
        "mla_decode", "600 tokens", "mla_decode_combine.cuh",
        "      sum_smem[warp][lane] = sum;\n      __syncthreads();",
        "      sum_smem[warp][lane] = sum;", Race, slow=True,
    ),
    Mutation(
        "the weight is read before its copies have landed",
        "mla_decode_value", "600 tokens", "mla_decode_value.cu",
        "  copy_async_wait<0>();\n  __syncthreads();", "  __syncthreads();", MissingWait, slow=True,
    ),
    Mutation(
        "joined rows are read without a barrier",
        "mla_decode_value", "600 tokens", "mla_decode_value.cu",
        "  copy_async_wait<0>();\n  __syncthreads();", "  copy_async_wait<0>();", Race, slow=True,
    ),
    # The experts, and the same products of a linear layer.
    Mutation(
        "a step of int4 codes is read before its copies have landed",
        "int4_linear", "40 rows", "int4_many.cuh",
        "copy_async_wait<STAGES - 2>", "copy_async_wait<STAGES - 1>", MissingWait,
        invariant=True, slow=True,
    ),
    Mutation(
        "a step of int4 codes is read without a barrier",
        "int4_linear", "40 rows", "int4_many.cuh",
        "    __syncthreads();  // this step is there", "    // this step is there", Race,
        invariant=True, slow=True,
    ),
    Mutation(
        "an expert's counts are read without a barrier",
        "moe_experts_int4", "bf16-scale-fp16", "moe_experts_int4_blocks.cuh",
        "  __syncthreads();\n  int start = 0", "  int start = 0", Race, slow=True,
    ),
    Mutation(
        "an expert's slots begin one place late",
        "moe_experts_int4", "bf16-scale-fp16", "moe_experts_int4_blocks.cuh",
        "  at += start;\n", "  at += start + 1;\n", Race, slow=True,
    ),
]  # fmt: skip
