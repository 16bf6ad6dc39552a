// RMSNorm of one row, for the ops that end or begin with one.
#pragma once

#include <cmath>

#include "cpu/math.h"

namespace kimi::KIMI_ISA {

// Rows that one thread takes at a time: about 64 KiB of float32, so that a turn costs nothing.
inline int64_t rows_at_once(int64_t width) { return 1 + 16384 / (width + 1); }

// The sum of squares of value(i, n), the piece of n elements from element i on of a row. In 64
// partial sums whatever the width of a vector: fewer would round more often than torch does.
template <class Value>
float sum_of_squares(int64_t width, const Value& value) {
  constexpr int kVectors = 64 / W;
  F total[kVectors] = {};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
    for (int j = 0; j < kVectors; ++j) {
      const F v = value(i + j * W, std::integral_constant<int64_t, W>());
      total[j] += v * v;
    }
  }
  for_each_piece(width - i, [&](int64_t j, auto n) {
    const F v = value(i + j, n);
    total[j / W] += v * v;
  });
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) total[j] += total[j + half];
  }
  return sum(total[0]);
}

// What a row is multiplied by. In two parts for float32, where the rounding of one would be most of
// an element's error, and the same in the whole row.
template <class E>
struct Factor {
  F high, low;

  explicit Factor(double factor) {
    const float rounded = static_cast<float>(factor);
    high = splat(rounded);
    low = splat(std::isfinite(rounded) ? static_cast<float>(factor - rounded) : 0.0f);
  }

  F operator*(F x) const {
    if constexpr (std::is_same_v<E, float>) return x * high + x * low;
    return x * high;
  }
};

template <class E>
Factor<E> rms_factor(float squares, int64_t width, float eps) {
  const double mean = width > 0 ? squares / static_cast<double>(width) : 0.0;
  return Factor<E>(1.0 / std::sqrt(mean + static_cast<double>(eps)));
}

template <class E>
Factor<E> rms_factor(const E* x, int64_t width, float eps) {
  const auto value = [&](int64_t i, auto n) { return load_piece(x + i, n); };
  return rms_factor<E>(sum_of_squares(width, value), width, eps);
}

// y = x * factor * weight. `next` is the row that is read next, or null.
template <bool kStream, class E>
void scale_row(E* y, const E* x, const E* weight, int64_t width, const Factor<E>& factor,
               const E* next) {
  for_each_piece(width, [&](int64_t i, auto n) {
    fetch(next, i);
    write_piece<kStream>(y + i, factor * load_piece(x + i, n) * load_piece(weight + i, n), n);
  });
}

}  // namespace kimi::KIMI_ISA
