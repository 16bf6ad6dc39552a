// CUDA C++ kernel of kimi_ops.patch_merge: LayerNorm, mean over frames, 2x2 merge, LayerNorm.
//
//   y[token, 2a + b] = LN_pre(mean over frames f of LN_final(x[f, 2i + a, 2j + b]))
//
// Grid: (merged_length), one block a token. WARPS warps have one corner of the 2x2 square each, in
// every frame, and write that quarter of the token's row:
//
//   x  frame 0   . . . . . .       y  token (i, j)
//                . A B . . .          [ A | B | C | D ]   4 x D, one contiguous row
//                . C D . . .            warps 0 .. WARPS - 1 have A, the next ones B, ..
//      frame 1   . . . . . .
//
// A lane holds the elements of its corner, and as many sums over frames, in registers: D of up to
// 1,280 with one warp a corner, which then needs no shared memory, and up to 2,048 with four.
// Bytes: every patch once, every token once, 2 L D + 8 L' D in 16-bit dtypes, the floor; the four
// norm vectors come from L2.
// Numerics: two-pass statistics and everything else in float32, one rounding at the end.
//
// Source: MoonViT-3D and the patch merger in the Kimi K2.5 report, arXiv 2602.02276.
#include "grid.cuh"

constexpr int CORNERS = 4;

// Elements of a corner that a lane holds; more with four warps would spill.
template <int WARPS>
constexpr int EACH = WARPS == 1 ? 40 : 16;

// Sum over the WARPS warps of this thread's corner; every thread of the block calls it.
template <int WARPS>
__device__ __forceinline__ float corner_sum(float value, float* partial_smem) {  // [WARPS]
  value = warp_sum(value);
  if constexpr (WARPS == 1) return value;
  __syncthreads();  // what the call before left there has been read
  if (threadIdx.x % WARP == 0) partial_smem[threadIdx.x / WARP % WARPS] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) sum += partial_smem[warp];
  return sum;
}

// Mean 0 and variance 1 over a corner's elements; lanes past D keep what they have.
template <class T, int N, int WARPS>
__device__ __forceinline__ void normalise(float (&x)[EACH<WARPS>], int first, int width, float eps,
                                          float* partial_smem) {  // [WARPS] of this corner
  constexpr int STEP = WARPS * WARP * N;
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < EACH<WARPS>; ++k) {
    if (first + k / N * STEP < width) sum += x[k];
  }
  const float mean = corner_sum<WARPS>(sum, partial_smem) / width;
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < EACH<WARPS>; ++k) {
    x[k] -= mean;
    if (first + k / N * STEP < width) squares += x[k] * x[k];
  }
  const float deviation = sqrtf(corner_sum<WARPS>(squares, partial_smem) / width + eps);
  // A rounded reciprocal is one float32 unit off: nothing to a 16-bit result, and cheaper.
  const float reciprocal = 1.0f / deviation;
#pragma unroll
  for (int k = 0; k < EACH<WARPS>; ++k) {
    x[k] = sizeof(T) == 4 ? x[k] / deviation : x[k] * reciprocal;
  }
}

// x * weight + bias of the elements d .. d + N.
template <class T, int N>
__device__ __forceinline__ void scale_and_shift(float* x, const T* weight_gmem, const T* bias_gmem,
                                                int d) {
  const Vec<T, N> weight = load_vec<T, N>(weight_gmem + d);
  const Vec<T, N> bias = load_vec<T, N>(bias_gmem + d);
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = x[e] * to_float(weight.at[e]) + to_float(bias.at[e]);
}

template <class T, int N, int WARPS>
__device__ __forceinline__ void patch_merge(const T* x_gmem,             // [L, D]
                                            Integers grid,               // [n, 3]
                                            const T* final_weight_gmem,  // [D], as the next three
                                            const T* final_bias_gmem, const T* pre_weight_gmem,
                                            const T* pre_bias_gmem,
                                            T* y_gmem,  // [L', 4 D]
                                            int64 length, int entries, int width, int64 stride_l,
                                            int64 stride_d, float eps) {
  constexpr int STEP = WARPS * WARP * N;
  __shared__ float partial_smem[CORNERS][WARPS];
  const int corner = threadIdx.x / (WARPS * WARP);  // 2a + b
  const int first = threadIdx.x % (WARPS * WARP) * N;
  // A token is four patches of one frame; the search counts in patches.
  const Place at = locate<true>(static_cast<int>(blockIdx.x) * CORNERS, grid, entries);
  const int token = at.place / CORNERS, across = max(at.w / 2, 1);
  const int i = token / across, j = token % across;
  int64 patch = at.first + static_cast<int64>(2 * i + corner / 2) * at.w + 2 * j + corner % 2;

  float total[EACH<WARPS>] = {};
  const int frames = at.found ? at.t : 0;
  for (int frame = 0; frame < frames; ++frame, patch += at.h * at.w) {
    // What an entry announces past the end of x counts as 0 in the mean. The corners of a token
    // may differ in that, and all have to reach the sums' barriers.
    const bool inside = patch >= 0 && patch < length;
    float x[EACH<WARPS>] = {};
#pragma unroll
    for (int k = 0; k < EACH<WARPS>; k += N) {
      const int d = first + k / N * STEP;
      if (inside && d < width) {
        const Vec<T, N> vec = load_vec<T, N>(x_gmem + patch * stride_l + d * stride_d);
#pragma unroll
        for (int e = 0; e < N; ++e) x[k + e] = to_float(vec.at[e]);
      }
    }
    normalise<T, N, WARPS>(x, first, width, eps, partial_smem[corner]);
#pragma unroll
    for (int k = 0; k < EACH<WARPS>; k += N) {
      const int d = first + k / N * STEP;
      if (inside && d < width) {
        scale_and_shift<T, N>(x + k, final_weight_gmem, final_bias_gmem, d);
#pragma unroll
        for (int e = 0; e < N; ++e) total[k + e] += x[k + e];
      }
    }
  }

#pragma unroll
  for (int k = 0; k < EACH<WARPS>; ++k) total[k] /= at.t;
  normalise<T, N, WARPS>(total, first, width, eps, partial_smem[corner]);
  T* y_row_gmem = y_gmem + (static_cast<int64>(blockIdx.x) * CORNERS + corner) * width;
#pragma unroll
  for (int k = 0; k < EACH<WARPS>; k += N) {
    const int d = first + k / N * STEP;
    if (d < width) {
      scale_and_shift<T, N>(total + k, pre_weight_gmem, pre_bias_gmem, d);
      Vec<T, N> y;
#pragma unroll
      for (int e = 0; e < N; ++e) y.at[e] = from_float<T>(at.found ? total[k + e] : 0.0f);
      store_vec<T, N>(y_row_gmem + d, y);
    }
  }
}

#define KERNEL(T, N, WARPS, NAME)                                                                 \
  extern "C" __global__ void __launch_bounds__(CORNERS * WARPS * WARP, 1)                         \
      patch_merge_kernel_##NAME##_##WARPS(                                                        \
          const T* x_gmem, const void* grid_gmem, int grid_bytes, const T* final_weight_gmem,     \
          const T* final_bias_gmem, const T* pre_weight_gmem, const T* pre_bias_gmem, T* y_gmem,  \
          int64 length, int entries, int width, int64 stride_l, int64 stride_d, float eps) {      \
    patch_merge<T, N, WARPS>(x_gmem, {grid_gmem, grid_bytes}, final_weight_gmem, final_bias_gmem, \
                             pre_weight_gmem, pre_bias_gmem, y_gmem, length, entries, width,      \
                             stride_l, stride_d, eps);                                            \
  }
#define KERNELS(T, N, NAME) KERNEL(T, N, 1, NAME) KERNEL(T, N, 4, NAME)

KERNELS(bf16, 8, bf16_vec)
KERNELS(fp16, 8, fp16_vec)
KERNELS(float, 4, fp32_vec)
KERNELS(bf16, 1, bf16_each)
KERNELS(fp16, 1, fp16_each)
KERNELS(float, 1, fp32_each)
