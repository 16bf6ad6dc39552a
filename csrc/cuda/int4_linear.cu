// CUDA C++ kernels of kimi_ops.int4_linear: y = x W^T with int4 weights, two launches.
//
//   prepare   2,048 columns of a row of x: rearranged as the product wants it
//   product   64 rows of W for up to 16 rows of x; blocks of x fastest, so that
//             those of the same weights run at about the same time and all but the first find them
//             in L2
//
//                         rows of x ->  block 0 | block 1 | ..
//   W rows 0 .. 63                         0    |    1    |
//   W rows 64 ..                          ..    |   ..    |
//
// The forms, their registers and their numerics are those of int4_product.cuh; up to `few` rows of
// x scales meet the sums, above that the weights. For many rows of x a block is that of
// int4_many.cuh, 128 rows of W for up to 64 of x; then row tiles run fastest. Bytes: 0.5625 a
// weight with 16-bit scales, once per block of x. No sum is split over blocks of threads.
//
// Source: compressed-tensors ``pack-quantized``, as in the Kimi K2.5 checkpoint.
#include "int4_many.cuh"

constexpr int THREADS = ZEROS;  // of prepare

template <class T>
__device__ __forceinline__ void prepare(const T* x_gmem,    // [T, K]
                                        T* xr_gmem,         // [T, rearranged_columns]
                                        fp16* lifted_gmem,  // the same, then ZEROS; or null
                                        float* start_gmem,  // [T, start_columns]; or null
                                        int64 x_stride, int64 tokens, int groups) {
  const int64 token = blockIdx.x;
  const int piece = blockIdx.y * THREADS + threadIdx.x;
  const int64 columns = rearranged_columns(groups);
  const bool lift = lifted_gmem != nullptr;
  rearrange(x_gmem + token * x_stride, xr_gmem + token * columns,
            lift ? lifted_gmem + token * columns : nullptr,
            lift ? start_gmem + token * start_columns(groups) : nullptr, piece,
            piece < groups * WORDS);
  if (lift && blockIdx.x == 0 && blockIdx.y == 0) {
    lifted_gmem[tokens * columns + threadIdx.x] = {0};
  }
}

template <class T>
__device__ __forceinline__ void linear(const Int4Weights& w, const Rearranged<T>& x,
                                       T* y_gmem,  // [T, N], contiguous
                                       int tokens, int rows, int block_size, int few, int split,
                                       unsigned shift_factor) {
  const Sums sums_smem = block_sums();
  __shared__ Slots slots_smem;
  constexpr int BLOCK_ROWS = BLOCK_TILES * TILE_ROWS;
  const int first = blockIdx.y * BLOCK_ROWS, first_token = blockIdx.x * block_size;
  slots_smem.set(nullptr, first_token, min(block_size, tokens - first_token), 1);
  product<T>(sums_smem, w, plain_rows(first + tile_of_warp(split) * TILE_ROWS, rows), x, slots_smem,
             few, split, shift_factor);
  for (int i = thread_anew(); i < slots_smem.count * BLOCK_ROWS; i += blockDim.x) {
    const int token = i / BLOCK_ROWS, n = i % BLOCK_ROWS;
    const int row = first + n;
    if (row >= rows) continue;
    const float sum = sum_of_parts(sums_smem, n / TILE_ROWS, split, n % TILE_ROWS, token);
    y_gmem[static_cast<int64>(slots_smem.at[token]) * rows + row] = from_float<T>(sum);
  }
}

template <class T>
__device__ __forceinline__ void linear_many(ManyShared& shared, const Int4Weights& w,
                                            const T* xr_gmem,  // [T, rearranged_columns]
                                            T* y_gmem,         // [T, N], contiguous
                                            int tokens, int rows, int block_size, int row_tiles,
                                            unsigned shift_factor, bool vectors) {
  const int first = blockIdx.x % row_tiles * MANY_ROWS;
  const int first_token = blockIdx.x / row_tiles * block_size;
  begin_many(shared, {nullptr, first_token, min(block_size, tokens - first_token), 1}, w,
             {first, rows, 0}, xr_gmem);
  rows_tile<T>(shared, w.groups, vectors, Shift{shift_factor});
  copy_out<T, MANY_ROWS>(shared, y_gmem, 0, first, rows, rows % PIECE == 0);
}

#define KERNELS(T, NAME)                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS) int4_linear_prepare_kernel_##NAME(        \
      const T* x_gmem, T* xr_gmem, fp16* lifted_gmem, float* start_gmem, int64 x_stride,          \
      int64 tokens, int groups) {                                                                 \
    prepare<T>(x_gmem, xr_gmem, lifted_gmem, start_gmem, x_stride, tokens, groups);               \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) int4_linear_kernel_##NAME(         \
      const uint4* codes_gmem, const void* scale_gmem, const T* xr_gmem, const fp16* lifted_gmem, \
      const float* start_gmem, const fp16* zeros_gmem, T* y_gmem, int64 codes_stride,             \
      int64 scale_stride, int scale_kind, int groups, int chunks, int tokens, int rows,           \
      int block_size, int few, int split, unsigned shift_factor) {                                \
    linear<T>({codes_gmem, scale_gmem, codes_stride, scale_stride, scale_kind, groups, chunks},   \
              {xr_gmem, lifted_gmem, start_gmem, zeros_gmem}, y_gmem, tokens, rows, block_size,   \
              few, split, shift_factor);                                                          \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(MANY_THREADS, 2) int4_linear_many_kernel_##NAME(   \
      const uint4* codes_gmem, const void* scale_gmem, const T* xr_gmem, T* y_gmem,               \
      int64 codes_stride, int64 scale_stride, int groups, int tokens, int rows, int block_size,   \
      int row_tiles, unsigned shift_factor, int vectors) {                                        \
    linear_many<T>(many_shared(),                                                                 \
                   {codes_gmem, scale_gmem, codes_stride, scale_stride, 0, groups, 0}, xr_gmem,   \
                   y_gmem, tokens, rows, block_size, row_tiles, shift_factor, vectors != 0);      \
  }

KERNELS(bf16, bf16)
KERNELS(fp16, fp16)
