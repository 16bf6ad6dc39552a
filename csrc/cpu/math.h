// Functions of vectors of floats.
#pragma once

#include "cpu/elements.h"

namespace kimi::KIMI_ISA {

inline constexpr float kInfinity = __builtin_inff();

// Sum and maximum of the lanes, always in the same order: halves onto halves.
inline float sum(F x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}

inline F maximum(F a, F b) { return a > b ? a : b; }

inline float maximum(F x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    }
  }
  return lanes[0];
#endif
}

// x * 2^n for whole n within -300 .. 300.
inline F scale_by_power(F x, F n) {
#if defined(__AVX512F__)
  return (F)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  // In two steps, since 2^n alone leaves the range where the result is subnormal.
  const I whole = __builtin_convertvector(n, I);
  const I half = whole >> 1;
  return x * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
#endif
}

// Adding and subtracting it rounds |x| < 2^22 to a whole number.
inline constexpr float kRounder = 12582912.0f;

// e^x within 1.5 units in the last place; infinity, 0 and NaN where they belong.
inline F exp(F x) {
  // Beyond these the result is 0 or infinite; a NaN passes both by, as it is the second operand.
#if defined(__AVX512F__)
  x = (F)_mm512_max_ps(_mm512_set1_ps(-130.0f), _mm512_min_ps(_mm512_set1_ps(130.0f), (__m512)x));
#else
  x = x > 130.0f ? splat(130.0f) : x;
  x = x < -130.0f ? splat(-130.0f) : x;
#endif
  const F n = (x * 1.44269504f + kRounder) - kRounder;
  F r = x - n * 0.693359375f;  // ln 2 in two parts, the first with few bits: the product is exact
  r = r + n * 2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return scale_by_power(p * (r * r) + r + 1.0f, n);
}

// 1 / x for x of at least 1, infinity and NaN included, within a unit in the last place. A division
// takes 16 cycles a vector, more than all of `exp`.
inline F reciprocal(F x) {
#if defined(__AVX512F__)
  const __m512 d = (__m512)x, one = _mm512_set1_ps(1.0f);
  const __m512 r = _mm512_rcp14_ps(d);
  const __m512 rest = _mm512_fnmadd_ps(d, r, one);
  // Of an infinite d, r is 0 and the rest is NaN.
  const __mmask16 finite = _mm512_cmp_ps_mask(d, splat(__builtin_inff()), _CMP_LT_OQ);
  return (F)_mm512_mask_fmadd_ps(r, finite, rest, r);
#else
  return 1.0f / x;
#endif
}

inline F sigmoid(F x) { return reciprocal(1.0f + exp(-x)); }

inline F silu(F x) { return x * sigmoid(x); }

// Sine and cosine of angles in radians up to 2^31, within 2 units in the last place of 1.
inline void sine_cosine(F angle, F& sine, F& cosine) {
  // The quarter turns are taken off in float64: at position 262,143 float32 has no digits left.
  typedef double D __attribute__((vector_size(4 * W)));  // half as many lanes
  typedef float Half __attribute__((vector_size(2 * W)));
  F rest, turns;
  for (int part = 0; part < 2; ++part) {
    Half a;
    std::memcpy(&a, reinterpret_cast<const char*>(&angle) + part * sizeof a, sizeof a);
    const D wide = __builtin_convertvector(a, D);
    constexpr double kRounder64 = 6755399441055744.0;
    const D n = (wide * 0.63661977236758134) + kRounder64 - kRounder64;
    const D r = (wide - n * 1.57079632673412561417e+00) - n * 6.07710050650619224932e-11;
    const D quarter = n - 4.0 * ((n * 0.25 + kRounder64 - kRounder64));  // -2 .. 2
    const Half r32 = __builtin_convertvector(r, Half);
    const Half n32 = __builtin_convertvector(quarter, Half);
    std::memcpy(reinterpret_cast<char*>(&rest) + part * sizeof a, &r32, sizeof a);
    std::memcpy(reinterpret_cast<char*>(&turns) + part * sizeof a, &n32, sizeof a);
  }
  const F z = rest * rest;
  const F s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * rest + rest;
  const F c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      0.5f * z + 1.0f;
  const auto odd = turns * turns == 1.0f;  // -1 and 1
  const F swapped_s = odd ? c : s, swapped_c = odd ? s : c;
  sine = (turns == -1.0f) | (turns * turns == 4.0f) ? -swapped_s : swapped_s;
  cosine = (turns == 1.0f) | (turns * turns == 4.0f) ? -swapped_c : swapped_c;
}

}  // namespace kimi::KIMI_ISA
