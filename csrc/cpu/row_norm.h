// RMSNorm of one row, for the ops that end or begin with one.
#pragma once

#include <cmath>

#include "cpu/math.h"

namespace kimi::KIMI_ISA {

// Rows that one thread takes at a time: about 64 KiB of float32, so that a turn costs nothing.
inline int64_t rows_at_once(int64_t width) { return 1 + 16384 / (width + 1); }

// In 64 partial sums whatever the width of a vector: fewer would round more often than torch does.
template <class E>
float sum_of_squares(const E* x, int64_t width) {
  constexpr int kVectors = 64 / W;
  F total[kVectors] = {};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
    for (int j = 0; j < kVectors; ++j) {
      const F v = load(x + i + j * W);
      total[j] += v * v;
    }
  }
  for_each_piece(width - i, [&](int64_t j, auto n) {
    const F v = load_piece(x + i + j, n);
    total[j / W] += v * v;
  });
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) total[j] += total[j + half];
  }
  return sum(total[0]);
}

template <class E>
void rms_norm_row(E* y, const E* x, const E* weight, int64_t width, float eps) {
  const float mean = width > 0 ? sum_of_squares(x, width) / static_cast<float>(width) : 0.0f;
  const F factor = splat(1.0f / std::sqrt(mean + eps));
  for_each_piece(width, [&](int64_t i, auto n) {
    store_piece(y + i, load_piece(x + i, n) * factor * load_piece(weight + i, n), n);
  });
}

}  // namespace kimi::KIMI_ISA
