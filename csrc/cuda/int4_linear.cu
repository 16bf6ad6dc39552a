// CUDA C++ kernels of kimi_ops.int4_linear: y = x W^T with int4 weights, two launches.
//
//   prepare   2,048 columns of a row of x: rearranged as the product wants it
//   product   8 / split tiles of 16 rows of W for up to 16 rows of x; blocks of x fastest, so that
//             those of the same weights run at about the same time and all but the first find them
//             in L2
//
//                         rows of x ->  block 0 | block 1 | ..
//   W rows 0 .. 16 * tiles - 1             0    |    1    |
//   W rows 16 * tiles ..                  ..    |   ..    |
//
// The forms, their registers and their numerics are those of int4_product.cuh; up to `few` rows of
// x scales meet the sums, above that the weights. Bytes: 0.5625 a weight with 16-bit scales, once
// per block of x. No sum is split over blocks of threads.
//
// Source: compressed-tensors ``pack-quantized``, as in the Kimi K2.5 checkpoint.
#include "int4_product.cuh"

constexpr int THREADS = WARPS * WARP;

template <class T>
__device__ __forceinline__ void prepare(const T* x_gmem,    // [T, K]
                                        T* xr_gmem,         // [T, rearranged_columns], then ZEROS
                                        float* start_gmem,  // [T, start_columns]
                                        int64 x_stride, int64 tokens, int groups) {
  const int64 token = blockIdx.x;
  const int piece = blockIdx.y * THREADS + threadIdx.x;
  const int64 columns = rearranged_columns(groups);
  rearrange(x_gmem + token * x_stride, xr_gmem + token * columns,
            start_gmem + token * start_columns(groups), piece, piece < groups * WORDS);
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    T* zeros_gmem = xr_gmem + tokens * columns;
    for (int i = threadIdx.x; i < ZEROS; i += THREADS) zeros_gmem[i] = from_float<T>(0.0f);
  }
}

template <class T>
__device__ __forceinline__ void linear(const Int4Weights& w, const Rearranged<T>& x,
                                       T* y_gmem,  // [T, N], contiguous
                                       int tokens, int rows, int block_size, int blocks, int few,
                                       int split, unsigned shift_factor) {
  __shared__ Sums sums_smem;
  __shared__ Slots slots_smem;
  const int block_rows = tiles_of(split) * TILE_ROWS;
  const int first = blockIdx.x / blocks * block_rows;
  const int first_token = blockIdx.x % blocks * block_size;
  slots_smem.set(nullptr, first_token, min(block_size, tokens - first_token), first, block_rows);
  const int tile = threadIdx.x / WARP >> (split / 2);
  product<T>(sums_smem, w, plain_rows(first + tile * TILE_ROWS, rows), x, slots_smem, few, split,
             shift_factor);
  for (int i = thread_anew(); i < slots_smem.count * slots_smem.rows; i += THREADS) {
    const int token = i / slots_smem.rows, n = i % slots_smem.rows;
    const int row = slots_smem.first_row + n;
    if (row >= rows) continue;
    const float sum = sum_of_parts(sums_smem, n / TILE_ROWS, split, n % TILE_ROWS, token);
    y_gmem[static_cast<int64>(slots_smem.at[token]) * rows + row] = from_float<T>(sum);
  }
}

#define KERNELS(T, NAME)                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS) int4_linear_prepare_kernel_##NAME(         \
      const T* x_gmem, T* xr_gmem, float* start_gmem, int64 x_stride, int64 tokens, int groups) {  \
    prepare<T>(x_gmem, xr_gmem, start_gmem, x_stride, tokens, groups);                             \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) int4_linear_kernel_##NAME(              \
      const uint4* codes_gmem, const void* scale_gmem, const T* xr_gmem, const float* start_gmem,  \
      const T* zeros_gmem, T* y_gmem, int64 codes_stride, int64 scale_stride, int scale_kind,      \
      int groups, int chunks, int tokens, int rows, int block_size, int blocks, int few,           \
      int split, unsigned shift_factor) {                                                          \
    linear<T>({codes_gmem, scale_gmem, codes_stride, scale_stride, scale_kind, groups, chunks},    \
              {xr_gmem, start_gmem, zeros_gmem, 1}, y_gmem, tokens, rows, block_size, blocks, few, \
              split, shift_factor);                                                                \
  }

KERNELS(bf16, bf16)
KERNELS(fp16, fp16)
