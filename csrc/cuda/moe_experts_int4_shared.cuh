// The shared expert: 16-bit weights times up to 16 tokens, in blocks shaped like those of
// int4_product.cuh. A lane loads 16 bytes of a row, eight columns, and its quad's 32 columns are
// two steps of the matrix instruction, x straight from its rows in the same order:
//
//   lane q of a quad   columns 8 q .. 8 q + 7 of 32;   instruction 0: the first four, 1: the others
//
// Weights of 256 columns are in flight, each register loaded again as soon as it is used; x comes
// from L1. At one token a block's chain over K is all that its time is, so its length in loads is
// what counts.
#pragma once
#include "moe_experts_int4_experts.cuh"

constexpr int DENSE_TOKENS = 16;  // of a block
constexpr int DENSE_STEPS = 8;    // of GROUP columns, in flight

template <class T>
struct Dense {
  static constexpr int NT = DENSE_TOKENS / 8;

  float sums[NT][4] = {};
  const T* w_gmem[SIDES];  // this lane's columns of its two rows
  const T* x_gmem[NT];     // and of its tokens

  // GROUP columns: weights of both rows times x of every token, from `at` on where it is inside.
  __device__ __forceinline__ void step(const uint4& r, const uint4& s, int at, bool inside) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint4 b = {0, 0, 0, 0};
      if (inside) b = load_words(x_gmem[n] + at);
      Codes<T>::mma(sums[n], sums[n], r.x, s.x, r.y, s.y, b.x, b.y);
      Codes<T>::mma(sums[n], sums[n], r.z, s.z, r.w, s.w, b.z, b.w);
    }
  }
};

template <class T>
__device__ __forceinline__ void dense_product(Sums sums_smem, const DenseWeights<T>& w,
                                              const LaneRows& rows,
                                              const T* x_gmem,  // [tokens, K]
                                              int64 x_stride, int first_token, int tokens,
                                              int split) {
  constexpr int COLUMNS = DENSE_STEPS * GROUP;
  const int part = threadIdx.x / WARP & (split - 1);
  const int offset = lane_of_quad() * PIECE;
  Dense<T> dense;
#pragma unroll
  for (int side = 0; side < SIDES; ++side) {
    dense.w_gmem[side] = w.gmem + rows.at(side) * w.stride + offset + part * COLUMNS;
  }
#pragma unroll
  for (int n = 0; n < Dense<T>::NT; ++n) {
    const int token = min(first_token + n * 8 + lane_row(), tokens - 1);
    dense.x_gmem[n] = x_gmem + token * x_stride + offset + part * COLUMNS;
  }
  const int chunks = w.columns / COLUMNS;
  int chunk = part;
  uint4 ahead[DENSE_STEPS][SIDES];
  if (chunk < chunks) {
#pragma unroll
    for (int i = 0; i < DENSE_STEPS; ++i) {
#pragma unroll
      for (int side = 0; side < SIDES; ++side) {
        ahead[i][side] = load_once(dense.w_gmem[side] + i * GROUP);
      }
    }
  }
#pragma unroll 1
  for (; chunk < chunks; chunk += split) {
    const bool more = chunk + split < chunks;
#pragma unroll
    for (int side = 0; side < SIDES; ++side) dense.w_gmem[side] += split * COLUMNS;
#pragma unroll
    for (int i = 0; i < DENSE_STEPS; ++i) {
      dense.step(ahead[i][0], ahead[i][1], i * GROUP, true);
#pragma unroll
      for (int side = 0; side < SIDES; ++side) {
        load_once_if(ahead[i][side], dense.w_gmem[side] + i * GROUP, more);
      }
    }
#pragma unroll
    for (int n = 0; n < Dense<T>::NT; ++n) dense.x_gmem[n] += split * COLUMNS;
  }
  // What is left of K, step by step: the parts take turns.
  const int back = chunk * COLUMNS + offset;  // to the start of a row, from where pointers are now
#pragma unroll 1
  for (int k = chunks * COLUMNS + part * GROUP + offset; k - offset < w.columns;
       k += split * GROUP) {
    uint4 r = {0, 0, 0, 0}, s = {0, 0, 0, 0};
    if (k < w.columns) {
      r = load_words(dense.w_gmem[0] + (k - back));
      s = load_words(dense.w_gmem[1] + (k - back));
    }
    dense.step(r, s, k - back, k < w.columns);
  }
  store_sums(sums_smem, dense.sums);
  __syncthreads();
}
