// The softmax of attention along rows of scores, block of keys by block of keys.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/math.h"

namespace kimi::KIMI_ISA {

// 2^x for x up to 1, within 1.5e-7 of it; 2^-125 at least. A NaN stays one.
inline F exp2_of_negative(F x) {
  x = x < -125.0f ? splat(-125.0f) : x;
  const F rounded = x + kRounder;  // its low bits are the whole number
  const F r = x - (rounded - kRounder);
  F p = splat(1.326472719e-3f);
  p = p * r + 9.67151264e-3f;
  p = p * r + 5.550733743e-2f;
  p = p * r + 2.402224209e-1f;
  p = p * r + 6.931469776e-1f;
  p = p * r + 1.0f;
  return (F)((U)p + ((U)rounded << 23));
}

// Weights of 2 W keys, in O. They lie within 0 .. 1 or are NaN, and those that VCVTNE2PS2BF16
// flushes to 0 count for nothing.
inline void store_weights(bf16* p, F a, F b) {
#if defined(__AVX512BF16__)
  const auto halves = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  std::memcpy(p, &halves, sizeof halves);
#else
  store(p, a);
  store(p + W, b);
#endif
}
inline void store_weights(float* p, F a, F b) {
  store(p, a);
  store(p + W, b);
}

// What one query has seen so far, in powers of two.
struct RowSoftmax {
  float high = -kInfinity;  // largest log2(e) * scale * score
  float total = 0.0f;       // sum of 2^(that - high)

  // weights[0 .. padded) of a block of keys: 2^(factor * score - high) for the first `visible` ones
  // and next to nothing behind them; `padded` is a multiple of kPanel, factor = log2(e) * scale >=
  // 0. Overwrites the scores that are not visible. Returns what the weighted sums of earlier blocks
  // are to be multiplied by.
  template <class O>
  float add(O* weights, float* scores, int64_t visible, int64_t padded, float factor) {
    if (visible == 0) {
      std::fill_n(weights, padded, O{});
      return 1.0f;
    }
    const int64_t filled = (visible + 2 * W - 1) / (2 * W) * (2 * W);
    std::fill(scores + visible, scores + filled, -kInfinity);
    F highest[4];
    for (F& x : highest) x = splat(-kInfinity);
    int64_t i = 0;
    for (; i + 4 * W <= filled; i += 4 * W) {
      for (int j = 0; j < 4; ++j) highest[j] = maximum(load(scores + i + j * W), highest[j]);
    }
    for (; i < filled; i += W) highest[0] = maximum(load(scores + i), highest[0]);
    const float block =
        maximum(maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3])));
    const float now = std::max(high, block * factor);
    const float shift = now == -kInfinity ? 0.0f : now;  // scores of a NaN query: no maximum

    F sums[2] = {};
    for (i = 0; i < filled; i += 2 * W) {
      const F a = exp2_of_negative(load(scores + i) * factor - shift);
      const F b = exp2_of_negative(load(scores + i + W) * factor - shift);
      sums[0] += a;
      sums[1] += b;
      store_weights(weights + i, a, b);
    }
    std::fill(weights + filled, weights + padded, O{});
    const float fade = std::exp2(high - shift);
    high = now;
    total = total * fade + sum(sums[0] + sums[1]);
    return fade;
  }

  // Natural logarithm of the sum of e^score; -inf without a key.
  float lse() const { return (high + std::log2(total)) * 0.693147181f; }
};

}  // namespace kimi::KIMI_ISA
