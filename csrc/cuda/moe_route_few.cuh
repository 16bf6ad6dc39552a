// The gate product of few tokens, straight from memory into fragments, and the block that is last.
//
// A block has 16 experts, 8 or 16 tokens and one of `parts` parts of D, whose 32-column steps its
// warps share out in runs. The sum over D may go in any order, so the four lanes of a row take 16
// neighbouring bytes each of gate and x, and what they hold are the operands of two instructions:
//
//   row of the gate, 64 bytes   | lane 0: 8 columns | lane 1 | lane 2 | lane 3 |
//   words of a lane               x   y   z   w
//   instruction 0, columns 2q, 2q + 1: x, and 2q + 8, 2q + 9: y      the same words of x's row
//   instruction 1                      z                      w
//
// No shared memory up to the sum over the warps: [WARPS][tokens][PITCH] floats, 5 or 10 KiB.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

// A warp a token, which is what the last block selects with.
template <int TILES>
constexpr int FEW_WARPS = 8 * TILES;
// Steps in flight: 7 are a warp's of D = 7,168 in 4 parts of 8 warps.
template <int TILES>
constexpr int FEW_UNROLL = TILES == 1 ? 7 : 4;
// Sums of a fragment, so that two products in a row do not wait for each other.
template <int TILES>
constexpr int CHAINS = 2 / TILES;
constexpr int FEW_EXPERTS_OF_BLOCK = 16;
constexpr int FEW_STEP = 32;
constexpr int FEW_PITCH = 20;  // of 16 experts: the lanes of a warp write to 32 banks

__device__ __forceinline__ void mma(bf16, float (&d)[4], unsigned a0, unsigned a1, unsigned a2,
                                    unsigned a3, unsigned b0, unsigned b1) {
  mma_m16n8k16_bf16(d, d, a0, a1, a2, a3, b0, b1);
}
__device__ __forceinline__ void mma(fp16, float (&d)[4], unsigned a0, unsigned a1, unsigned a2,
                                    unsigned a3, unsigned b0, unsigned b1) {
  mma_m16n8k16_fp16(d, d, a0, a1, a2, a3, b0, b1);
}

// d += a b of 32 columns, which four lanes of a row have 16 bytes each of.
template <class T>
__device__ __forceinline__ void multiply(float (&even)[4], float (&odd)[4], uint4 a, uint4 a_8,
                                         uint4 b) {
  mma(T{}, even, a.x, a_8.x, a.y, a_8.y, b.x, b.y);
  mma(T{}, odd, a.z, a_8.z, a.w, a_8.w, b.z, b.w);
}

template <class T>
struct Operands {
  const T* x_gmem;     // [T, D]; 16-byte pieces, as the gate
  const T* gate_gmem;  // [E, D]
  int64 stride_x_t, stride_gate_e;
  int columns, parts;
};

// The next FEW_UNROLL steps, all loads before the first product. LIMITED: only what is less than
// `columns` columns on; zeros after it.
template <class T, int TILES, bool LIMITED>
__device__ __forceinline__ void multiply_steps(const T* (&a_gmem)[2], const T* (&b_gmem)[TILES],
                                               int columns, float (&d)[TILES][CHAINS<TILES>][4]) {
  constexpr int UNROLL = FEW_UNROLL<TILES>;
  uint4 a[UNROLL][2] = {}, b[UNROLL][TILES] = {};
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    if (LIMITED && u * FEW_STEP >= columns) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      a[u][h] = *reinterpret_cast<const uint4*>(a_gmem[h] + u * FEW_STEP);
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      b[u][n] = *reinterpret_cast<const uint4*>(b_gmem[n] + u * FEW_STEP);
    }
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      multiply<T>(d[n][0], d[n][CHAINS<TILES> - 1], a[u][0], a[u][1], b[u][n]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) a_gmem[h] += UNROLL * FEW_STEP;
#pragma unroll
  for (int n = 0; n < TILES; ++n) b_gmem[n] += UNROLL * FEW_STEP;
}

// Logits of 8 TILES tokens from `token` on, of the 16 experts from `expert` on, over one part. All
// `stride_t` numbers of a row are written.
template <class T, int TILES>
__device__ __forceinline__ void multiply_few(const Operands<T>& from, int expert, int token,
                                             int part, int experts, int tokens,
                                             float* logits_gmem,  // [T, E] of the part
                                             int64 stride_t) {
  constexpr int TOKENS = 8 * TILES, WARPS = FEW_WARPS<TILES>, THREADS = WARPS * WARP;
  constexpr int UNROLL = FEW_UNROLL<TILES>;
  __shared__ float sum_smem[WARPS][TOKENS][FEW_PITCH];
  const int warp = threadIdx.x / WARP, r = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
  const int steps = (from.columns + FEW_STEP - 1) / FEW_STEP, runs = WARPS * from.parts;
  const int run = (steps + runs - 1) / runs;
  const int first = (part * WARPS + warp) * run, end = min(first + run, steps);

  // Rows past the last one are the last one again; what comes of them is not kept.
  const int column = first * FEW_STEP + q * 8;
  const T *a_gmem[2], *b_gmem[TILES];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int e = min(expert + r + 8 * h, experts - 1);
    a_gmem[h] = from.gate_gmem + e * from.stride_gate_e + column;
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const int t = min(token + r + 8 * n, tokens - 1);
    b_gmem[n] = from.x_gmem + t * from.stride_x_t + column;
  }
  float d[TILES][CHAINS<TILES>][4] = {};
  int step = first;
  if constexpr (TILES == 1) {  // of 16 tokens, two loops do not fit the registers of 512 threads
    for (; step + UNROLL <= min(end, from.columns / FEW_STEP); step += UNROLL) {
      multiply_steps<T, TILES, false>(a_gmem, b_gmem, 0, d);
    }
  }
  const int limit = min(end * FEW_STEP, from.columns) - q * 8;
  for (; step < end; step += UNROLL) {
    multiply_steps<T, TILES, true>(a_gmem, b_gmem, limit - step * FEW_STEP, d);
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = d[n][0][i];
      if (CHAINS<TILES> == 2) sum += d[n][CHAINS<TILES> - 1][i];
      sum_smem[warp][8 * n + 2 * q + i % 2][r + i / 2 * 8] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < TOKENS * FEW_EXPERTS_OF_BLOCK; i += THREADS) {
    const int t = i / FEW_EXPERTS_OF_BLOCK, e = i % FEW_EXPERTS_OF_BLOCK;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += sum_smem[w][t][e];
    if (token + t < tokens && expert + e < stride_t) {
      logits_gmem[(token + t) * stride_t + expert + e] = sum;
    }
  }
}

// Whether the other blocks that count there have stored what they had to; leaves the counter at 0.
__device__ __forceinline__ bool is_last(int* counter_gmem, int blocks) {
  __shared__ bool last_smem;
  __syncthreads();
  if (threadIdx.x == 0) {
    last_smem = atomic_add_acq_rel(counter_gmem, 1) == blocks - 1;
    if (last_smem) *counter_gmem = 0;
  }
  __syncthreads();
  return last_smem;
}
