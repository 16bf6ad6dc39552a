// Rotation of adjacent pairs (x[2i], x[2i+1]) by angles, as every RoPE of the model has it:
//
//   y = x * cosines + swapped(x) * sines
//
// with cosines (c0, c0, c1, c1, ...), sines (-s0, s0, -s1, s1, ...) and neighbours swapped.
#pragma once

#include <utility>

#include "cpu/math.h"

namespace kimi::KIMI_ISA {

template <int... kLane>
inline F permuted(F x, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, kLane...);
#else
  return __builtin_shuffle(x, I{kLane...});
#endif
}

template <int... kLane>
inline F swapped(F x, std::integer_sequence<int, kLane...>) {
  return permuted(x, std::integer_sequence<int, (kLane ^ 1)...>());
}
inline F swapped(F x) { return swapped(x, std::make_integer_sequence<int, W>()); }

// Each lane from kFirst on twice.
template <int kFirst, int... kLane>
inline F doubled(F x, std::integer_sequence<int, kLane...>) {
  return permuted(x, std::integer_sequence<int, (kFirst + kLane / 2)...>());
}

template <int... kLane>
inline F odd_signs(std::integer_sequence<int, kLane...>) {
  return F{(kLane % 2 ? 1.0f : -1.0f)...};
}

// Elements that tables of `pairs` angles need: they are written in pieces of 2 W.
inline int64_t turns_size(int64_t pairs) { return (pairs + W - 1) / W * 2 * W; }

// cosines and sines of the angles position * frequency[i] for i < pairs.
inline void turns(float* cosines, float* sines, float position, const float* frequency,
                  int64_t pairs) {
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  for_each_piece(pairs, [&](int64_t i, auto n) {
    F s, c;
    sine_cosine(position * load_piece(frequency + i, n), s, c);
    store(cosines + 2 * i, doubled<0>(c, lanes));
    store(cosines + 2 * i + W, doubled<W / 2>(c, lanes));
    store(sines + 2 * i, doubled<0>(s, lanes) * odd_signs(lanes));
    store(sines + 2 * i + W, doubled<W / 2>(s, lanes) * odd_signs(lanes));
  });
}

// One piece of n elements, whole pairs.
template <class E, class N>
inline F rotated(const E* x, const float* cosines, const float* sines, N n) {
  const F v = load_piece(x, n);
  return v * load_piece(cosines, n) + swapped(v) * load_piece(sines, n);
}

}  // namespace kimi::KIMI_ISA
