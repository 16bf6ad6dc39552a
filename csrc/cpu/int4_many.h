// Weights of int4 times many rows of x: weights unpacked in chunks, x in panels of 32 tokens.
//
// The weights are the operand that stays as it lies, row by row (product.h's A): 32 rows of a chunk
// of the depth are unpacked, scaled and rounded to the operand's type into the cache, and
// multiplied with every panel of tokens. A result is [row][token], tokens in the lanes.
//
// Within a group of 32 columns bf16 operands are in the order in which nibbles leave a vector:
// first the columns 0, 4, 8 .. 28, then 1, 5 .. 29, and so on. Panels of x have it too; a sum does
// not mind.
#pragma once

#include "cpu/int4.h"
#include "cpu/pack.h"

namespace kimi::KIMI_ISA {

inline constexpr int64_t kChunk = 512;                          // columns unpacked at a time
inline constexpr int64_t kTileRows = 32;                        // rows of weights at a time
inline constexpr int64_t kTileSize = kTileRows * kPanel;        // of a result of one panel
inline constexpr int64_t kScratch = kTileRows * (kChunk + 32);  // of unpacked weights

// Tokens up to which rows of weights are multiplied with one token after the other. With tiles a
// panel costs little more than unpacking the weights for it; VDPBF16PS does as many products either
// way, but for the columns of a panel without a token. In float32 a panel costs as much as 21
// tokens one after the other (Intel, AVX-512, 4,096 x 7,168).
#if defined(__AMX_BF16__)
inline constexpr int64_t kFewTokens = 4;
#elif defined(__AVX512BF16__)
inline constexpr int64_t kFewTokens = 24;
#elif defined(__AVX512F__)
inline constexpr int64_t kFewTokens = 20;
#else
inline constexpr int64_t kFewTokens = 12;
#endif

#if defined(__AVX512BF16__)
// 32 columns of a group in the order of their nibbles, from their natural one.
inline __m512i permute_group(__m512i x) {
  static constexpr uint16_t kFrom[32] = {0,  4,  8,  12, 16, 20, 24, 28, 1,  5,  9,
                                         13, 17, 21, 25, 29, 2,  6,  10, 14, 18, 22,
                                         26, 30, 3,  7,  11, 15, 19, 23, 27, 31};
  return _mm512_permutexvar_epi16(_mm512_loadu_si512(kFrom), x);
}

// Columns first .. last (of whole groups) of `rows` rows from `row` on, scaled and rounded: rows
// `stride_row` apart, groups `stride_group`. `scales` are those rows', of all groups. Meanwhile
// fetches as many cache lines of the rows from `next_row` on, or nothing where that is negative.
inline void unpack_rows(bf16* to, int64_t stride_row, int64_t stride_group, const Int4Rows& weights,
                        int64_t row, int64_t rows, int64_t first, int64_t last, const float* scales,
                        int64_t next_row) {
  const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i low = _mm512_set1_epi16(15);
  const __m512i shifts = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_setr_m128i(_mm_set1_epi16(0), _mm_set1_epi16(4))),
      _mm256_setr_m128i(_mm_set1_epi16(8), _mm_set1_epi16(12)), 1);
  // The group's sixteen values in a table, and four copies of its nibbles to look them up with.
  auto unpack_group = [&](bf16* out, const uint32_t* words, float scale) {
    const auto table = (__m256i)_mm512_cvtneps_pbh(numbers * _mm512_set1_ps(scale));
    const __m128i nibbles = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
    const __m512i index =
        _mm512_and_si512(_mm512_srlv_epi16(_mm512_broadcast_i32x4(nibbles), shifts), low);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, _mm512_castsi256_si512(table)));
  };
  const int64_t groups = (last - first) / kGroup;
  const uint32_t* words = weights.words(row) + first / 8;
  scales += first / kGroup;
  for (int64_t r = 0; r < rows; ++r) {
    if (next_row >= 0) weights.fetch(next_row, first / 128 * rows + r);
    int64_t group = 0;
    for (; group + 4 <= groups; group += 4) {
      for (int i = 0; i < 4; ++i) {
        unpack_group(to + (group + i) * stride_group, words + (group + i) * kGroupWords,
                     scales[group + i]);
      }
    }
    for (; group < groups; ++group) {
      unpack_group(to + group * stride_group, words + group * kGroupWords, scales[group]);
    }
    words += weights.stride_packed;
    scales += weights.groups;
    to += stride_row;
  }
}

// Columns first .. last of a row of `width` bf16, in the same order, with 0 after its end.
inline void unpack_dense(bf16* to, int64_t stride_group, const bf16* row, int64_t first,
                         int64_t last, int64_t width) {
  for (int64_t c = first; c < last; c += kGroup) {
    const int64_t n = std::clamp<int64_t>(width - c, 0, kGroup);
    const auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
    _mm512_storeu_si512(to + (c - first) / kGroup * stride_group,
                        permute_group(_mm512_maskz_loadu_epi16(mask, row + c)));
  }
}

// Panel of the rows x[tokens[0 .. count)]; the other columns are 0.
inline void pack_tokens(bf16* panel, const bf16* x, int64_t stride_x, const int32_t* tokens,
                        int64_t count, int64_t columns) {
  for (int64_t at = 0; at < columns; at += kGroup) {
    for (int64_t half = 0; half < kPanel; half += W) {
      U rows[W];
      for (int64_t r = 0; r < W; ++r) {
        const int64_t token = half + r;
        rows[r] = token < count
                      ? (U)permute_group(_mm512_loadu_si512(x + tokens[token] * stride_x + at))
                      : U{};
      }
      transpose(rows);
      for (int64_t j = 0; j < W; ++j) {
        std::memcpy(panel + ((at / 2 + j) * kPanel + half) * 2, &rows[j], sizeof rows[j]);
      }
    }
  }
}

// Rows f .. f + 16 of a panel from sixteen rows of 32 values, whose columns are tokens.
template <class Row>
inline void pack_sixteen(bf16* panel, int64_t f, const Row& row) {
  for (int pair = 0; pair < 8; ++pair) {
    const int step = pair % 4, i = pair / 4;  // columns 8 i + step and 4 more
    const int64_t at = f / 32 * 16 + step * 4 + f % 32 / 8 + i;
    for (int half = 0; half < kPanel; half += W) {
      const U a = __builtin_convertvector(narrow_bf16(row(8 * i + step, half)), U);
      const U b = __builtin_convertvector(narrow_bf16(row(8 * i + step + 4, half)), U);
      const U both = a | b << 16;
      std::memcpy(panel + (at * kPanel + half) * 2, &both, sizeof both);
    }
  }
}
#endif

inline void unpack_rows(float* to, int64_t stride_row, int64_t, const Int4Rows& weights,
                        int64_t row, int64_t rows, int64_t first, int64_t last, const float* scales,
                        int64_t) {
  U shifts;
  for (int lane = 0; lane < W; ++lane) shifts[lane] = 4 * (lane % 8);
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t* words = weights.words(row + r) + first / 8;
    const float* scale = scales + r * weights.groups + first / kGroup;
#if defined(__AVX512F__)
    // The group's sixteen values in a table, as for bf16.
    const auto half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    for (int64_t c = 0; c < last - first; c += kGroup) {
      const F table = nibble_table() * scale[c / kGroup];
      for (int64_t i = c; i < c + kGroup; i += W) {
        const auto two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(words + i / 8));
        const auto word = (U)_mm512_permutexvar_epi32(half, _mm512_castsi128_si512(two));
        store(to + r * stride_row + i, look_up(word >> shifts, table));
      }
    }
#else
    for (int64_t c = 0; c < last - first; c += W) {
      U word = U{} + words[c / 8];
      if constexpr (W == 4) word >>= 4 * static_cast<uint32_t>(c % 8);
      const F q = __builtin_convertvector((I)((word >> shifts) & 15), F) - 8.0f;
      store(to + r * stride_row + c, q * scale[c / kGroup]);
    }
#endif
  }
}

template <class E>
inline void unpack_dense(float* to, int64_t, const E* row, int64_t first, int64_t last,
                         int64_t width) {
  for (int64_t c = first; c < last; c += W) {
    const int64_t n = std::clamp<int64_t>(width - c, 0, W);
    store(to + c - first, n == W ? load(row + c) : n > 0 ? load_first(row + c, n) : F{});
  }
}

template <class E>
inline void pack_tokens(float* panel, const E* x, int64_t stride_x, const int32_t* tokens,
                        int64_t count, int64_t columns) {
  for (int64_t at = 0; at < columns; at += W) {
    for (int64_t part = 0; part < kPanel; part += W) {
      U rows[W];
      for (int64_t r = 0; r < W; ++r) {
        const int64_t token = part + r;
        rows[r] = token < count ? (U)load(x + tokens[token] * stride_x + at) : U{};
      }
      transpose(rows);
      for (int64_t j = 0; j < W; ++j) {
        store(panel + (at + j) * kPanel + part, (F)rows[j]);
      }
    }
  }
}

template <class Row>
inline void pack_sixteen(float* panel, int64_t f, const Row& row) {
  for (int r = 0; r < 16; ++r) {
    for (int part = 0; part < kPanel; part += W) {
      store(panel + (f + r) * kPanel + part, row(r, part));
    }
  }
}

#if defined(__AMX_BF16__)
// multiply_panels() of one tile and one panel, of which the first 16 columns or all are wanted; the
// others become 0. The weights of a step are unpacked while the tiles of the step before are
// multiplied: two units that do not wait for each other, and what lies between them stays in the
// first cache.
template <bool kBoth, class Fill>
inline void multiply_panel(float* c, const bf16* panel, int64_t depth, bf16* scratch,
                           const Fill& fill) {
  constexpr int64_t kStep = 128, kTile = kTileRows * kGroup;  // a group of all rows
  static_assert(2 * kStep * kTileRows <= kScratch);
  auto unpack_step = [&](int64_t first) {
    fill(scratch + first / kStep % 2 * kStep * kTileRows, kGroup, kTile, first,
         std::min(depth, first + kStep));
  };
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  unpack_step(0);
  for (int64_t first = 0; first < depth; first += kStep) {
    if (first + kStep < depth) unpack_step(first + kStep);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // as in product.h
    const bf16* a = scratch + first / kStep % 2 * kStep * kTileRows;
    for (int64_t k = first; k < std::min(depth, first + kStep); k += kGroup, a += kTile) {
      _tile_loadd(4, a, kGroup * 2);
      _tile_loadd(5, a + kTile / 2, kGroup * 2);
      _tile_loadd(6, panel + k * kPanel, kPanel * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kBoth) {
        _tile_loadd(7, panel + k * kPanel + 32, kPanel * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, kPanel * 4);
  _tile_stored(1, c + 16, kPanel * 4);
  _tile_stored(2, c + 16 * kPanel, kPanel * 4);
  _tile_stored(3, c + 16 * kPanel + 16, kPanel * 4);
}
#endif

// c[tile][panel][row][token] = `tiles` x 32 rows of weights x the panels of `tokens` tokens,
// `depth` long. `fill(to, stride_row, stride_group, tile, first, last)` unpacks columns first ..
// last of a tile's rows; `scratch` holds kScratch of them. With several panels a chunk of those
// serves all tiles while it is in the second cache.
template <class O, class Fill>
inline void multiply_panels(float* c, const O* panels, int64_t tokens, int64_t depth, int64_t tiles,
                            O* scratch, const Fill& fill) {
#if defined(__AMX_BF16__)
  if constexpr (kPairs<O>) {
    for (int64_t tile = 0; tile < tiles && tokens <= kPanel; ++tile) {
      auto fill_tile = [&](bf16* to, int64_t row, int64_t group, int64_t first, int64_t last) {
        fill(to, row, group, tile, first, last);
      };
      if (tokens <= 16) {
        multiply_panel<false>(c + tile * kTileSize, panels, depth, scratch, fill_tile);
      } else {
        multiply_panel<true>(c + tile * kTileSize, panels, depth, scratch, fill_tile);
      }
    }
    if (tokens <= kPanel) return;
  }
#endif
  constexpr int64_t kStride = kScratch / kTileRows;  // rows apart by no power of two
  const int64_t count = (tokens + kPanel - 1) / kPanel;
  for (int64_t first = 0; first < depth; first += kChunk) {
    const int64_t last = std::min(depth, first + kChunk);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      fill(scratch, kStride, kGroup, tile, first, last);
      for (int64_t p = 0; p < count; ++p) {
        multiply(c + (tile * count + p) * kTileSize, kPanel, scratch, kStride,
                 panels + (p * depth + first) * kPanel, kTileRows, last - first, first > 0);
      }
    }
  }
}

}  // namespace kimi::KIMI_ISA
