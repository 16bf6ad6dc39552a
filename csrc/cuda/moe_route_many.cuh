// The gate product of many tokens, in tiles of 128 experts and 64 tokens through shared memory.
//
// Four warps have 64 experts and 32 tokens each. STAGES stages of 64 columns are under way, each
// two halves of 32 columns, a row of a half 64 bytes: the four lanes of a row read 16 bytes each
// of it (moe_route_few.cuh has why), and two rows fill the 32 banks without padding. The halves
// are 64 bytes out of step, so that eight lanes which copy 128 bytes of a row meet no bank twice.
//
//   half, bytes    0      64     128
//                  | row 0 | row 1 |    rows 0 .. 127: experts, 128 .. 191: tokens
//                  | row 2 | row 3 |    192 rows: 12 KiB, a stage 24, three 72.4
#pragma once
#include "moe_route_few.cuh"

constexpr int MANY_EXPERTS = 128, MANY_TOKENS = 64, MANY_WARPS = 4;
constexpr int MANY_ROWS = MANY_EXPERTS + MANY_TOKENS;
constexpr int MANY_STEP = 2 * FEW_STEP;
constexpr int STAGES = 3;
constexpr int HALF = MANY_ROWS * FEW_STEP + FEW_STEP;  // elements, the 64 bytes between included
constexpr int STAGE = 2 * HALF;

// Starts the copies of a stage: of a row eight threads take 16 bytes each.
template <class T>
__device__ __forceinline__ void copy_stage(const Operands<T>& from, int expert, int token,
                                           int column, int experts, int tokens, T* stage_smem) {
  constexpr int ROWS_AT_ONCE = MANY_WARPS * WARP / 8;
  const int piece = threadIdx.x % 8, d = column + piece * 8;
  T* to_smem = stage_smem + piece / 4 * HALF + piece % 4 * 8;
#pragma unroll
  for (int i = 0; i < MANY_ROWS / ROWS_AT_ONCE; ++i) {
    const int row = i * ROWS_AT_ONCE + threadIdx.x / 8;
    const bool of_gate = i * ROWS_AT_ONCE < MANY_EXPERTS;
    const int index = of_gate ? expert + row : token + row - MANY_EXPERTS;
    const bool present = index < (of_gate ? experts : tokens) && d < from.columns;
    const T* row_gmem = of_gate ? from.gate_gmem + index * from.stride_gate_e
                                : from.x_gmem + index * from.stride_x_t;
    copy_async_16(to_smem + row * FEW_STEP, present ? row_gmem + d : from.x_gmem, present);
  }
}

template <class T>
__device__ __forceinline__ void multiply_many(const Operands<T>& from, int expert, int token,
                                              int part, int experts, int tokens,
                                              float* logits_gmem,  // [T, E] of the part
                                              int64 stride_t) {
  extern __shared__ uint4 stages_smem[];  // [STAGES][STAGE]
  T* smem = reinterpret_cast<T*>(stages_smem);
  const int warp = threadIdx.x / WARP, r = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
  const int my_experts = warp % 2 * 64, my_tokens = warp / 2 * 32;
  const int all = (from.columns + MANY_STEP - 1) / MANY_STEP;
  const int run = (all + from.parts - 1) / from.parts, first = min(part * run, all);
  const int steps = min(first + run, all) - first;

  float d[4][4][4] = {};  // 64 experts, 32 tokens
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < steps) {
      copy_stage(from, expert, token, (first + i) * MANY_STEP, experts, tokens, smem + i * STAGE);
    }
    copy_async_commit();
  }
  for (int i = 0; i < steps; ++i) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // stage i is there, and all have read the one before it
    if (i + STAGES - 1 < steps) {
      copy_stage(from, expert, token, (first + i + STAGES - 1) * MANY_STEP, experts, tokens,
                 smem + (i + STAGES - 1) % STAGES * STAGE);
    }
    copy_async_commit();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* half_smem = smem + i % STAGES * STAGE + half * HALF + q * 8;
      uint4 a[4][2], b[4];
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        a[m / 2][m % 2] =
            *reinterpret_cast<const uint4*>(half_smem + (my_experts + 8 * m + r) * FEW_STEP);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        b[n] = *reinterpret_cast<const uint4*>(half_smem +
                                               (MANY_EXPERTS + my_tokens + 8 * n + r) * FEW_STEP);
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply<T>(d[m][n], d[m][n], a[m][0], a[m][1], b[n]);
      }
    }
  }
  copy_async_wait<0>();
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = expert + my_experts + 16 * m + i / 2 * 8 + r;
        const int t = token + my_tokens + 8 * n + 2 * q + i % 2;
        if (e < experts && t < tokens) logits_gmem[t * stride_t + e] = d[m][n][i];
      }
    }
  }
}
