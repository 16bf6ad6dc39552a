// The shared expert: 16-bit weights times up to 16 tokens, in blocks shaped like those of
// int4_product.cuh. A lane loads 16 bytes of a row, eight columns, and its quad's 32 columns are
// two steps of the matrix instruction, x straight from its rows in the same order:
//
//   lane q of a quad   columns 8 q .. 8 q + 7 of 32;   instruction 0: the first four, 1: the others
#pragma once
#include "moe_experts_int4_experts.cuh"

constexpr int DENSE_TOKENS = 16;  // of a block

template <class T>
__device__ __forceinline__ void dense_product(Sums sums_smem, const DenseWeights<T>& w,
                                              const LaneRows& rows,
                                              const T* x_gmem,  // [tokens, K]
                                              int64 x_stride, int first_token, int tokens,
                                              int split) {
  const int part = threadIdx.x / WARP & (split - 1);
  const int q = lane_of_quad();
  constexpr int NT = DENSE_TOKENS / 8;
  float sums[NT][4] = {};
  const T *w_gmem[SIDES], *x_row_gmem[NT];
#pragma unroll
  for (int side = 0; side < SIDES; ++side) w_gmem[side] = w.gmem + rows.at(side) * w.stride;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    x_row_gmem[n] = x_gmem + min(first_token + n * 8 + lane_row(), tokens - 1) * x_stride;
  }
#pragma unroll 4
  for (int from = part * GROUP; from < w.columns; from += split * GROUP) {
    const int k = from + q * PIECE;
    uint4 r = {0, 0, 0, 0}, s = {0, 0, 0, 0}, b[NT];
    if (k < w.columns) {
      r = load_words(w_gmem[0] + k);
      s = load_words(w_gmem[1] + k);
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      b[n] = {0, 0, 0, 0};
      if (k < w.columns) b[n] = load_words(x_row_gmem[n] + k);
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      Codes<T>::mma(sums[n], sums[n], r.x, s.x, r.y, s.y, b[n].x, b[n].y);
      Codes<T>::mma(sums[n], sums[n], r.z, s.z, r.w, s.w, b[n].z, b[n].w);
    }
  }
  store_sums(sums_smem, sums);
  __syncthreads();
}
