// What the row norms share: where a strided row is, and the factor of its root mean square.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

// Row i starts i / inner * outer_stride + i % inner * inner_stride elements behind the first;
// the elements of a row are `d_stride` apart. As kimi_ops/_strided_rows.py has it.
struct Rows {
  int64 inner, outer_stride, inner_stride, d_stride;

  __device__ __forceinline__ int64 offset(int64 row) const {
    return row / inner * outer_stride + row % inner * inner_stride;
  }
};

// Nothing rounds after the factor in float32, and its error is one of the whole row to one side:
// there sum and root are taken in double, and the factor in two parts.
template <class T>
struct Statistic {
  using type = float;
};
template <>
struct Statistic<float> {
  using type = double;
};

template <class Sum, class T, int N>
__device__ __forceinline__ Sum sum_of_squares(const Vec<T, N>& vec) {
  Sum sum = 0;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const Sum x = to_float(vec.at[e]);
    sum += x * x;
  }
  return sum;
}

struct Factor {
  float high, low;  // low is 0 except in float32

  __device__ __forceinline__ float times(float x) const { return fmaf(x, high, x * low); }
};

__device__ __forceinline__ Factor rms_factor(float squares, int columns, float eps) {
  return {1.0f / sqrtf(squares / columns + eps), 0.0f};
}
__device__ __forceinline__ Factor rms_factor(double squares, int columns, float eps) {
  const double factor = 1.0 / sqrt(squares / columns + eps);
  const float high = static_cast<float>(factor);
  // Of an infinite or NaN factor there is no lower part.
  const float low = static_cast<float>(factor - high);
  return {high, fabsf(low) <= fabsf(high) * 1e-6f ? low : 0.0f};
}

// A row that THREADS threads share: a thread has vectors t, t + THREADS, ... and keeps the first
// HELD of them in registers from construction on, all loads in flight; longer rows are read again.
constexpr int HELD = 4;

template <class T, int N, int THREADS>
struct HeldRow {
  static constexpr int STEP = THREADS * N;
  Vec<T, N> held[HELD];
  const T* row_gmem;  // [columns]
  int64 stride_d;
  int first, columns;

  __device__ __forceinline__ HeldRow(const T* row, int64 stride, int thread, int width)
      : row_gmem(row), stride_d(stride), first(thread * N), columns(width) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int d = first + i * STEP;
      if (d < columns) held[i] = load_vec<T, N>(row_gmem + d * stride_d);
    }
  }

  // visit(d, elements d .. d + N) for each vector of this thread.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int d = first + i * STEP;
      if (d < columns) visit(d, held[i]);
    }
    for (int d = first + HELD * STEP; d < columns; d += STEP) {
      visit(d, load_vec<T, N>(row_gmem + d * stride_d));
    }
  }

  // See `make_anew`: between two visits that are far apart.
  __device__ __forceinline__ void make_anew() {
#pragma unroll
    for (int i = 0; i < HELD; ++i) ::make_anew(held[i]);
  }

  // visit(d, elements of this row, elements of `other`), for a row that is held by the same
  // threads.
  template <class Visit>
  __device__ __forceinline__ void each_with(const HeldRow& other, Visit visit) const {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int d = first + i * STEP;
      if (d < columns) visit(d, held[i], other.held[i]);
    }
    for (int d = first + HELD * STEP; d < columns; d += STEP) {
      visit(d, load_vec<T, N>(row_gmem + d * stride_d),
            load_vec<T, N>(other.row_gmem + d * other.stride_d));
    }
  }
};

// round(x / rms) * weight, rounded: the two roundings that the model has.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> normalised(const Vec<T, N>& x, const Vec<T, N>& weight,
                                                Factor factor) {
  Vec<T, N> y;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float normal = rounded<T>(factor.times(to_float(x.at[e])));
    y.at[e] = from_float<T>(to_float(weight.at[e]) * normal);
  }
  return y;
}
