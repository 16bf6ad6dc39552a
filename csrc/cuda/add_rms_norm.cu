// CUDA C++ kernel of kimi_ops.add_rms_norm: h = x + residual, y = rms_norm(h), one launch.
//
// Grid: as rms_norm.cu. A thread holds its first HELD vectors of h and of the weight in registers;
// the rest of a longer row it writes to h and reads again, which only it does.
// Bytes: x and residual once, y and h once, the weight from L2 after the first block.
// Numerics: the sum in float32, rounded to the dtype of x once; the norm is that of the rounded
// sum.
//
// Source: the pre-norm block of Kimi K2.5 (DeepSeek-V3 family).
#include "rows.cuh"

template <class T, int N>
__device__ __forceinline__ Vec<T, N> sum(const Vec<T, N>& a, const Vec<T, N>& b) {
  Vec<T, N> h;
#pragma unroll
  for (int e = 0; e < N; ++e) h.at[e] = from_float<T>(to_float(a.at[e]) + to_float(b.at[e]));
  return h;
}

template <class T, int N, int WARPS>
__device__ __forceinline__ void add_rms_norm(const T* x_gmem,         // [rows, D]
                                             const T* residual_gmem,  // [rows, D]
                                             const T* weight_gmem,    // [D]
                                             T* y_gmem,               // [rows, D], contiguous
                                             T* h_gmem,               // [rows, D], contiguous
                                             int64 rows, int columns, Rows x_rows,
                                             Rows residual_rows, int64 weight_stride, float eps) {
  using Sum = typename Statistic<T>::type;
  constexpr int STEP = WARPS * WARP * N;  // elements that the threads of a row take at once
  __shared__ Sum partial_smem[WARPS];
  const int64 row = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // whole warps, and only where WARPS is 1
  const T* x_row_gmem = x_gmem + x_rows.offset(row);
  const T* residual_row_gmem = residual_gmem + residual_rows.offset(row);
  T* y_row_gmem = y_gmem + row * columns;
  T* h_row_gmem = h_gmem + row * columns;
  const int first = threadIdx.x * N;

  auto add = [&](int d) {
    return sum<T, N>(load_vec<T, N>(x_row_gmem + d * x_rows.d_stride),
                     load_vec<T, N>(residual_row_gmem + d * residual_rows.d_stride));
  };
  const HeldRow<T, N, WARPS * WARP> x(x_row_gmem, x_rows.d_stride, threadIdx.x, columns);
  const HeldRow<T, N, WARPS * WARP> residual(residual_row_gmem, residual_rows.d_stride, threadIdx.x,
                                             columns);
  HeldRow<T, N, WARPS * WARP> weight(weight_gmem, weight_stride, threadIdx.x, columns);
  Vec<T, N> held[HELD];
  Sum squares = 0;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int d = first + i * STEP;
    if (d < columns) {
      held[i] = sum<T, N>(x.held[i], residual.held[i]);
      store_vec<T, N>(h_row_gmem + d, held[i]);
      squares += sum_of_squares<Sum>(held[i]);
    }
  }
  for (int d = first + HELD * STEP; d < columns; d += STEP) {
    const Vec<T, N> h = add(d);
    store_vec<T, N>(h_row_gmem + d, h);
    squares += sum_of_squares<Sum>(h);
  }
  const Factor factor = rms_factor(block_sum<WARPS>(squares, partial_smem), columns, eps);

#pragma unroll
  for (int i = 0; i < HELD; ++i) make_anew(held[i]);
  weight.make_anew();
  auto write = [&](int d, const Vec<T, N>& h, const Vec<T, N>& scale) {
    store_vec<T, N>(y_row_gmem + d, normalised<T, N>(h, scale, factor));
  };
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    if (first + i * STEP < columns) write(first + i * STEP, held[i], weight.held[i]);
  }
  for (int d = first + HELD * STEP; d < columns; d += STEP) {
    write(d, load_vec<T, N>(h_row_gmem + d), load_vec<T, N>(weight_gmem + d * weight_stride));
  }
}

#define KERNEL(T, N, WARPS, NAME)                                                                 \
  extern "C" __global__ void __launch_bounds__(WARPS == 1 ? 4 * WARP : WARPS * WARP, 1)           \
      add_rms_norm_kernel_##NAME##_##WARPS(                                                       \
          const T* x_gmem, const T* residual_gmem, const T* weight_gmem, T* y_gmem, T* h_gmem,    \
          int64 rows, int columns, int64 x_inner, int64 x_outer_stride, int64 x_inner_stride,     \
          int64 x_d_stride, int64 residual_inner, int64 residual_outer_stride,                    \
          int64 residual_inner_stride, int64 residual_d_stride, int64 weight_stride, float eps) { \
    add_rms_norm<T, N, WARPS>(                                                                    \
        x_gmem, residual_gmem, weight_gmem, y_gmem, h_gmem, rows, columns,                        \
        {x_inner, x_outer_stride, x_inner_stride, x_d_stride},                                    \
        {residual_inner, residual_outer_stride, residual_inner_stride, residual_d_stride},        \
        weight_stride, eps);                                                                      \
  }
#define KERNELS(T, N, NAME) KERNEL(T, N, 1, NAME) KERNEL(T, N, 4, NAME) KERNEL(T, N, 8, NAME)

KERNELS(bf16, 8, bf16_vec)
KERNELS(fp16, 8, fp16_vec)
KERNELS(float, 4, fp32_vec)
KERNELS(bf16, 1, bf16_each)
KERNELS(fp16, 1, fp16_each)
KERNELS(float, 1, fp32_each)
