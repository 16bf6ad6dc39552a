// CUDA C++ kernel of kimi_ops.rms_norm: y = weight * round(x / sqrt(mean(x^2) + eps)), one launch.
//
// Grid: (cdiv(rows, ROWS)); WARPS warps share a row, and a block of one warp a row holds four:
//
//   x [rows, D]   block 0: |row 0 ............ D|    WARPS = 4, 8: thread t has vectors
//                 block 1: |row 1 ............ D|    t, t + 32 * WARPS, ... of its row
//
// A thread holds its first HELD vectors in registers, so that rows of up to HELD * 32 * WARPS
// vectors are read once; the rest of a longer row is read again, from L2. So it holds the weight,
// whose way from memory would else come after that of x, which counts where rows are few. Bytes: x
// once, y once, the weight from L2 after the first block. Bound by memory everywhere. Numerics:
// squares and sum in float32 (double for float32 rows), rounded to the dtype of x before the
// weight, as the model has it, and once more after.
//
// Source: Zhang and Sennrich, arXiv 1910.07467.
#include "rows.cuh"

template <class T, int N, int WARPS>
__device__ __forceinline__ void rms_norm(const T* x_gmem,       // [rows, D]
                                         const T* weight_gmem,  // [D]
                                         T* y_gmem,             // [rows, D], contiguous
                                         int64 rows, int columns, Rows x_rows, int64 weight_stride,
                                         float eps) {
  using Sum = typename Statistic<T>::type;
  __shared__ Sum partial_smem[WARPS];
  const int64 row = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // whole warps, and only where WARPS is 1
  HeldRow<T, N, WARPS * WARP> x(x_gmem + x_rows.offset(row), x_rows.d_stride, threadIdx.x, columns);
  HeldRow<T, N, WARPS * WARP> weight(weight_gmem, weight_stride, threadIdx.x, columns);
  Sum squares = 0;
  x.each([&](int, const Vec<T, N>& vec) { squares += sum_of_squares<Sum>(vec); });
  const Factor factor = rms_factor(block_sum<WARPS>(squares, partial_smem), columns, eps);
  x.make_anew();
  weight.make_anew();
  T* y_row_gmem = y_gmem + row * columns;
  x.each_with(weight, [&](int d, const Vec<T, N>& vec, const Vec<T, N>& scale) {
    store_vec<T, N>(y_row_gmem + d, normalised<T, N>(vec, scale, factor));
  });
}

#define KERNEL(T, N, WARPS, NAME)                                                                \
  extern "C" __global__ void __launch_bounds__(WARPS == 1 ? 4 * WARP : WARPS * WARP, 1)          \
      rms_norm_kernel_##NAME##_##WARPS(const T* x_gmem, const T* weight_gmem, T* y_gmem,         \
                                       int64 rows, int columns, int64 inner, int64 outer_stride, \
                                       int64 inner_stride, int64 d_stride, int64 weight_stride,  \
                                       float eps) {                                              \
    rms_norm<T, N, WARPS>(x_gmem, weight_gmem, y_gmem, rows, columns,                            \
                          {inner, outer_stride, inner_stride, d_stride}, weight_stride, eps);    \
  }
#define KERNELS(T, N, NAME) KERNEL(T, N, 1, NAME) KERNEL(T, N, 4, NAME) KERNEL(T, N, 8, NAME)

KERNELS(bf16, 8, bf16_vec)
KERNELS(fp16, 8, fp16_vec)
KERNELS(float, 4, fp32_vec)
KERNELS(bf16, 1, bf16_each)
KERNELS(fp16, 1, fp16_each)
KERNELS(float, 1, fp32_each)
