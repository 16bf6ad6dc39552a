// Packing of the panels that product.h reads.
#pragma once

#include <algorithm>

#include "cpu/product.h"

namespace kimi::KIMI_ISA {

template <int kStep, int... kLane>
inline void exchange(U& a, U& b, std::integer_sequence<int, kLane...>) {
  // Lanes whose bit kStep is set move from a to b and back.
#if defined(__clang__)
  const U low = __builtin_shufflevector(a, b, ((kLane & kStep) ? W + kLane - kStep : kLane)...);
  const U high = __builtin_shufflevector(a, b, ((kLane & kStep) ? W + kLane : kLane + kStep)...);
#else
  const U low = __builtin_shuffle(a, b, U{((kLane & kStep) ? W + kLane - kStep : kLane)...});
  const U high = __builtin_shuffle(a, b, U{((kLane & kStep) ? W + kLane : kLane + kStep)...});
#endif
  a = low;
  b = high;
}

template <int kStep>
inline void transpose_from(U (&rows)[W]) {
  if constexpr (kStep < W) {
    for (int i = 0; i < W; ++i) {
      if ((i & kStep) == 0) {
        exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, W>());
      }
    }
    transpose_from<2 * kStep>(rows);
  }
}

// W rows of W 32-bit words: word j of row i and word i of row j change places.
inline void transpose(U (&rows)[W]) { transpose_from<1>(rows); }

// to[j][i] = from[i][j], 32-bit words: `rows` x `words`, rows of `from` stride_from words apart,
// those of `to` kPanel words. Rows of `from` at and after `rows` count as 0, up to kPanel of them.
inline void transpose_words(uint32_t* to, const uint32_t* from, int64_t stride_from, int64_t rows,
                            int64_t words) {
  for (int64_t i = 0; i < kPanel; i += W) {
    for (int64_t j = 0; j < words; j += W) {
      U block[W];
      const int64_t width = std::min<int64_t>(W, words - j);
      for (int r = 0; r < W; ++r) {
        block[r] = U{};
        if (i + r < rows) {
          const auto* row = reinterpret_cast<const float*>(from + (i + r) * stride_from + j);
          block[r] = (U)(width == W ? load(row) : load_first(row, width));
        }
      }
      transpose(block);
      for (int64_t r = 0; r < width; ++r) {
        std::memcpy(to + (j + r) * kPanel + i, &block[r], sizeof block[r]);
      }
    }
  }
}

// One panel whose columns are the rows x[0 .. columns), k elements each: panel[k][column] =
// x[column][k]. Columns from `columns` (at most kPanel) on are 0, and the depth is padded with 0.
inline void pack_rows_as_columns(bf16* panel, const bf16* x, int64_t stride_x, int64_t columns,
                                 int64_t k) {
  auto* to = reinterpret_cast<uint32_t*>(panel);
  if (k % 2 == 0 && stride_x % 2 == 0) {
    transpose_words(to, reinterpret_cast<const uint32_t*>(x), stride_x / 2, columns, k / 2);
  } else {
    std::memset(panel, 0, static_cast<size_t>((k + 1) / 2 * kPanel) * sizeof(uint32_t));
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t i = 0; i < k; ++i) {
        panel[(i / 2 * kPanel + column) * 2 + i % 2] = x[column * stride_x + i];
      }
    }
  }
  const int64_t filled = (k + 1) / 2, depth = padded_depth<bf16>(k) / 2;
  std::memset(to + filled * kPanel, 0, static_cast<size_t>((depth - filled) * kPanel) * 4);
}

inline void pack_rows_as_columns(float* panel, const float* x, int64_t stride_x, int64_t columns,
                                 int64_t k) {
  transpose_words(reinterpret_cast<uint32_t*>(panel), reinterpret_cast<const uint32_t*>(x),
                  stride_x, columns, k);
}

inline void pack_rows_as_columns(float* panel, const fp16* x, int64_t stride_x, int64_t columns,
                                 int64_t k) {
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t column = 0; column < kPanel; ++column) {
      panel[i * kPanel + column] = column < columns ? widen(x[column * stride_x + i]) : 0.0f;
    }
  }
}

#if defined(__AVX512BW__)
// pack_rows of kPanel columns: words of two rows by an unpack and an exchange of quarters.
inline void pack_whole_rows(bf16* panel, const bf16* x, int64_t stride_x, int64_t k) {
  const __m512i left = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i right = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  auto pair = [&](int64_t i, __m512i even, __m512i odd) {
    const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    bf16* to = panel + i * kPanel;
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64(low, left, high));
    _mm512_storeu_si512(to + kPanel, _mm512_permutex2var_epi64(low, right, high));
  };
  auto row = [&](int64_t i) { return _mm512_loadu_si512(x + i * stride_x); };
  int64_t i = 0;
  for (; i + 2 <= k; i += 2) pair(i, row(i), row(i + 1));
  if (i < k) {
    pair(i, row(i), __m512i{});
    i += 2;
  }
  for (; i < padded_depth<bf16>(k); i += 2) pair(i, __m512i{}, __m512i{});
}
#endif

// One panel whose rows are the rows x[0 .. k), `columns` (at most kPanel) elements each:
// panel[k][column] = x[k][column]. Columns from `columns` on are 0, and the depth is padded with 0.
template <class E>
inline void pack_rows(Operand<E>* panel, const E* x, int64_t stride_x, int64_t columns, int64_t k) {
#if defined(__AVX512BW__)
  if constexpr (kPairs<Operand<E>>) {
    if (columns == kPanel) return pack_whole_rows(panel, x, stride_x, k);
  }
#endif
  for (int64_t column = 0; column < kPanel; column += W) {
    const int64_t width = std::clamp<int64_t>(columns - column, 0, W);
    auto row = [&](int64_t i) {
      if (i >= k || width == 0) return F{};
      const E* p = x + i * stride_x + column;
      return width == W ? load(p) : load_first(p, width);
    };
    if constexpr (kPairs<Operand<E>>) {
      for (int64_t i = 0; i < padded_depth<bf16>(k); i += 2) {
        const U pair = (U)row(i) >> 16 | (U)row(i + 1);
        std::memcpy(panel + (i / 2 * kPanel + column) * 2, &pair, sizeof pair);
      }
    } else {
      for (int64_t i = 0; i < k; ++i) store(panel + i * kPanel + column, row(i));
    }
  }
}

}  // namespace kimi::KIMI_ISA
