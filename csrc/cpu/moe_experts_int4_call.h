// What a call of moe_experts_int4 is given, and a row of its shared expert.
#pragma once

#include "cpu/int4.h"

namespace kimi::KIMI_ISA {

// The tensors and sizes of a call.
template <class E>
struct Call {
  E* y;
  const E* x;
  int64_t stride_x, tokens, depth;
  Int4Rows gate_up, down;  // of expert 0; the others are strides apart
  int64_t stride_gate_up_e, stride_gate_up_scale_e, stride_down_e, stride_down_scale_e;
  const E *shared_gate_up, *shared_down;
  int64_t stride_shared_gate_up, stride_shared_down;

  static Int4Rows of_expert(Int4Rows rows, int64_t expert, int64_t stride, int64_t stride_scale) {
    rows.packed += expert * stride;
    const int64_t bytes = rows.scale_dtype == KIMI_F32 ? 4 : 2;
    rows.scale = static_cast<const char*>(rows.scale) + expert * stride_scale * bytes;
    return rows;
  }
  Int4Rows gate_up_of(int64_t expert) const {
    return of_expert(gate_up, expert, stride_gate_up_e, stride_gate_up_scale_e);
  }
  Int4Rows down_of(int64_t expert) const {
    return of_expert(down, expert, stride_down_e, stride_down_scale_e);
  }
};

// weights[0 .. width) . x[0 .. width) of a dense row, in 64 partial sums.
template <class E, class O>
inline float dot_dense(const E* weights, const O* x, int64_t width) {
  constexpr int kVectors = 64 / W;
  F totals[kVectors] = {};
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<E> && kPairs<O>) {
    for (; i + 128 <= width; i += 128) {
      for (int j = 0; j < 4; ++j) {
        totals[j] = (F)_mm512_dpbf16_ps((__m512)totals[j],
                                        (__m512bh)_mm512_loadu_si512(weights + i + 32 * j),
                                        (__m512bh)_mm512_loadu_si512(x + i + 32 * j));
      }
    }
  }
#endif
  for (; i + 64 <= width; i += 64) {
    for (int j = 0; j < kVectors; ++j) totals[j] += load(weights + i + j * W) * load(x + i + j * W);
  }
  for_each_piece(width - i, [&](int64_t j, auto n) {
    totals[j / W] += load_piece(weights + i + j, n) * load_piece(x + i + j, n);
  });
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) totals[j] += totals[j + half];
  }
  return sum(totals[0]);
}

inline float silu_times(float gate, float up) { return silu(splat(gate))[0] * up; }

}  // namespace kimi::KIMI_ISA
