// Second stage of `mla_decode`: the results of a row's splits, weighted by exp(lse - max), added
// up.
//
// Grid (B * S * H, column parts), W warps a block: warp w has splits w, w + W, .., up to 16 of
// them. A lane has N columns of 32 * N, 4 or, where C is no multiple of that, 1; gridDim.y of these
// chunks are worked on at a time, all loads of a chunk in flight:
//
//   part_lse[b, r, 0..n]  ->  weight[n] = exp(lse[n] - max)        every warp for itself
//   part[b, 0..n, r, columns]  ->  out = sum_n weight[n] * part[n] / sum_n weight[n]
#pragma once
#include "mla_decode_split.cuh"

constexpr int MAX_SPLITS = 128, SPLITS_A_WARP = 16;
constexpr int MAX_COMBINE_WARPS = MAX_SPLITS / SPLITS_A_WARP;

// The weights of a row's splits, in shared memory; and what they add up to.
struct Weights {
  float total, base;
  const float* smem;  // [splits], of this warp

  // `weight_smem` [MAX_SPLITS] is this warp's own.
  __device__ __forceinline__ Weights(const float* lse_gmem, int used, float* weight_smem)
      : smem(weight_smem) {
    const int lane = threadIdx.x % WARP;
    float lse[MAX_SPLITS / WARP], top = -infinity();
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / WARP; ++i) {
      const int split = i * WARP + lane;
      lse[i] = split < used ? lse_gmem[split] : -infinity();
      top = fmaxf(top, lse[i]);
    }
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, lanes));
    }
    base = top == -infinity() ? 0.0f : top;
    total = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / WARP; ++i) {
      if (i * WARP < used) {
        const float weight = exp2_approx((lse[i] - base) * LOG2_E);
        weight_smem[i * WARP + lane] = weight;
        total += weight;
      }
    }
    total = warp_sum(total);  // a NaN of the first stage goes through
    __syncwarp();
  }
  // What a weighted sum is multiplied by. Splits may have no keys for the row, all of them too.
  __device__ __forceinline__ float norm() const { return total == 0.0f ? 0.0f : 1.0f / total; }
};

// N columns of a row in up to MOST splits: number `first`, and others `step` on.
template <int N, int MOST>
struct Partials {
  Vec<float, N> part[MOST];

  __device__ __forceinline__ void load(const float* first_gmem, int64 stride, int first, int step,
                                       int used) {
#pragma unroll
    for (int i = 0; i < MOST; ++i, first_gmem += stride) {
      if (first + i * step < used) part[i] = load_vec<float, N>(first_gmem);
    }
  }
  __device__ __forceinline__ void add_to(Vec<float, N>& sum, const Weights& weights, int first,
                                         int step, int used) const {
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      const int split = first + i * step;
      if (split < used) {
        const float weight = weights.smem[split];
#pragma unroll
        for (int e = 0; e < N; ++e) sum.at[e] = fmaf(part[i].at[e], weight, sum.at[e]);
      }
    }
  }
};

template <class T, int N>
__device__ __forceinline__ void mla_decode_combine(const float* part_gmem,  // [B, splits, rows, C]
                                                   const float* part_lse_gmem,  // [B, rows, splits]
                                                   const int* length_gmem,      // [B]
                                                   T* out_gmem,                 // [B, rows, C]
                                                   float* lse_gmem,             // [B, rows]
                                                   int rows, int c, int capacity, int splits,
                                                   int min_blocks, int64 stride_length) {
  __shared__ float weight_smem[MAX_COMBINE_WARPS][MAX_SPLITS];
  __shared__ Vec<float, N> sum_smem[MAX_COMBINE_WARPS][WARP];
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const unsigned row = blockIdx.x, b = row / rows;
  const int length = min(max(length_gmem[b * stride_length], 0), capacity);
  const int used = Bounds(length, 0, splits, min_blocks).used;

  const int64 stride = static_cast<int64>(rows) * c;  // of a split
  const int64 first = (static_cast<int64>(b) * splits + warp) * stride + row % rows * c;
  int d = (blockIdx.y * WARP + lane) * N;
  Partials<N, SPLITS_A_WARP> partials;
  if (d < c) partials.load(part_gmem + first + d, warps * stride, warp, warps, used);
  const Weights weights(part_lse_gmem + static_cast<int64>(row) * splits, used, weight_smem[warp]);
  if (blockIdx.y == 0 && warp == 0 && lane == 0) {
    const float lse = weights.base + log2f(weights.total) * LN_2;
    lse_gmem[row] = weights.total == 0.0f ? -infinity() : lse;
  }
  const int chunk = gridDim.y * WARP * N;
  for (int start = blockIdx.y * WARP * N; start < c; start += chunk, d += chunk) {
    Vec<float, N> sum = {};
    if (d < c) {
      if (start >= chunk) {
        partials.load(part_gmem + first + d, warps * stride, warp, warps, used);
      }
      partials.add_to(sum, weights, warp, warps, used);
    }
    if (warps > 1) {
      __syncthreads();  // the sums of the chunk before have been read
      sum_smem[warp][lane] = sum;
      __syncthreads();
    }
    if (warp > 0 || d >= c) continue;
    for (int other = 1; other < warps; ++other) {
      const Vec<float, N> more = sum_smem[other][lane];
#pragma unroll
      for (int e = 0; e < N; ++e) sum.at[e] += more.at[e];
    }
    Vec<T, N> out;
#pragma unroll
    for (int e = 0; e < N; ++e) out.at[e] = from_float<T>(sum.at[e] * weights.norm());
    store_vec<T, N>(out_gmem + static_cast<int64>(row) * c + d, out);
  }
}
