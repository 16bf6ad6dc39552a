// The softmax of attention along rows of scores, block of keys by block of keys: a row is a query.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/math.h"
#include "cpu/pack.h"

namespace kimi::KIMI_ISA {

// 2^x for x <= 0 (or a rounding above), relative error 1.6e-7, or 8e-5 unless kExact: then a
// twentieth of what rounding to bfloat16 adds. Next to nothing below 2^-125; a NaN stays one.
template <bool kExact>
inline F exp2_of_negative(F x) {
#if defined(__AVX512F__)
  const F r = (F)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  x = x < -125.0f ? splat(-125.0f) : x;
  const F shifted = (x - 0.5f) + kRounder;  // its low bits are floor(x)
  const F r = x - (shifted - kRounder);
#endif
  F p;  // 2^r, r within 0 .. 1: least largest relative error
  if constexpr (kExact) {
    p = 1.877576674e-3f * r + 8.989340094e-3f;
    p = p * r + 5.582631805e-2f;
    p = p * r + 2.40153617e-1f;
    p = p * r + 6.931530732e-1f;
    p = p * r + 9.999999251e-1f;
  } else {
    p = 7.802452229e-2f * r + 2.260671559e-1f;
    p = p * r + 6.958335403e-1f;
    p = p * r + 9.999252186e-1f;
  }
#if defined(__AVX512F__)
  return (F)_mm512_scalef_ps((__m512)p, (__m512)x);  // by 2^floor(x)
#else
  return (F)((U)p + ((U)shifted << 23));
#endif
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

inline constexpr int kGroup = 32;  // queries that are taken together

// The results of fold(x[row][W]) for W rows: row r's in lane r.
template <class Fold>
inline F across(const float (*x)[W], const Fold& fold) {
  U rows[W];
  std::memcpy(rows, x, sizeof rows);
  transpose(rows);
  F folded[W];
  for (int i = 0; i < W; ++i) folded[i] = (F)rows[i];
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) folded[i] = fold(folded[i], folded[i + half]);
  }
  return folded[0];
}

// What the queries of a group have seen so far; kExact where their lse is wanted.
template <bool kExact>
struct alignas(64) GroupSoftmax {
  float high[kGroup];   // largest score
  float total[kGroup];  // sum of e^(scale * (score - high))
  float fade[kGroup];   // what the weighted sums of blocks before the last are to be multiplied by

  GroupSoftmax() {
    std::fill_n(high, kGroup, -kInfinity);
    std::fill_n(total, kGroup, 0.0f);
    std::fill_n(fade, kGroup, 1.0f);
  }

  // weights[rows][keys] = e^(scale * (score - high)) of a block of keys, a multiple of kPanel of
  // them; scores that are -inf weigh next to nothing. scale > 0. Calls between(row) before each
  // row's weights.
  template <class O, class Between>
  void add(O* weights, int64_t stride_weights, const float* scores, int64_t stride_scores,
           int64_t rows, int64_t keys, float scale, const Between& between) {
    alignas(64) float lanes[kGroup][W] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const float* x = scores + row * stride_scores;
      F most[2] = {load(x), load(x + W)};
      for (int64_t i = 2 * W; i < keys; i += 2 * W) {
        most[0] = maximum(load(x + i), most[0]);
        most[1] = maximum(load(x + i + W), most[1]);
      }
      store(lanes[row], maximum(most[0], most[1]));
    }
    for (int row = 0; row < kGroup; row += W) {
      const F before = load(high + row);
      const F now = maximum(across(lanes + row, [](F a, F b) { return maximum(a, b); }), before);
      store(high + row, now);
      store(fade + row, before == now ? F{} + 1.0f : exp((before - now) * scale));
    }
    for (int64_t row = 0; row < rows; ++row) {
      between(row);
      const float* x = scores + row * stride_scores;
      O* to = weights + row * stride_weights;
      // A NaN query's scores have no maximum.
      const float subtracted = high[row] == -kInfinity ? 0.0f : high[row];
      const float factor = scale * 1.44269504f, shift = subtracted * factor;
      auto weight = [&](int64_t at) {
        const F score = load(x + at);
        if constexpr (kPairs<O>) {
          return exp2_of_negative<kExact>(score * factor - shift);
        } else {
          return exp((score - subtracted) * scale);  // without the error of the factor
        }
      };
      F sums[2] = {};
      for (int64_t i = 0; i < keys; i += 2 * W) {
        const F a = weight(i), b = weight(i + W);
        sums[0] += a;
        sums[1] += b;
        store_weights(to + i, a, b);
      }
      store(lanes[row], sums[0] + sums[1]);
    }
    for (int row = 0; row < kGroup; row += W) {
      const F added = across(lanes + row, [](F a, F b) { return a + b; });
      store(total + row, load(total + row) * load(fade + row) + added);
    }
  }

  // Natural logarithm of the sum of e^(scale * score), of scale > 0; -inf without a key.
  float lse(int64_t row, float scale) const {
    return high[row] == -kInfinity && total[row] == total[row]
               ? -kInfinity
               : high[row] * scale + std::log(total[row]);
  }
};

}  // namespace kimi::KIMI_ISA
