// Weights of int4 in groups of 32, as the checkpoint stores them, times few rows of x.
//
// A row of weights is words of 32 bits; column c is nibble c % 8 (lowest first) of word c / 8,
// stored plus 8, and column c's scale is that of group c / 32 (4 words). Nobody copies the weights:
// a vector of W words is loaded as it lies, its nibbles become numbers by shifting and masking, and
// x is rearranged to match, once per call.
//
//   float   block of W words: vector j (of 8) holds nibble j of every word      x[8 w + j]
//   bf16    block of 16 words, taken as 32 halves: vector j (of 4) holds nibble j of every half,
//           looked up in a table of bf16; VDPBF16PS adds two halves of a word    x[4 h + j]
//
// Either way lane w of a sum holds columns of word w, so that one vector of scales, each four
// times, finishes a block. The products are exact, the sums float32.
#pragma once

#include "cpu/math.h"
#include "cpu/product.h"

namespace kimi::KIMI_ISA {

inline constexpr int kGroup = 32;             // weights of one scale
inline constexpr int kGroupWords = 4;         // and their words
inline constexpr int64_t kScalesOfLine = 32;  // scales of a cache line, of 16 bits

// What x of elements E is multiplied as: without VDPBF16PS bfloat16 gains nothing over float.
#if defined(__AVX512BF16__)
template <class E>
using Int4Operand = Operand<E>;
#else
template <class E>
using Int4Operand = float;
#endif

// A matrix of such weights.
struct Int4Rows {
  const uint32_t* packed;  // [rows, groups * 4]
  int64_t stride_packed;
  const void* scale;  // [rows, groups]
  int64_t stride_scale;
  int64_t scale_dtype, groups;

  const uint32_t* words(int64_t row) const { return packed + row * stride_packed; }

  // Fetches the n-th cache line of the rows from `row` on, and their scales at the same pace. In
  // the order in which the lines lie and into the second cache: fetched row beside row they arrive
  // at half the speed.
  // Inlined always: GCC takes a function that only fetches for one without an effect.
  __attribute__((always_inline)) void fetch(int64_t row, int64_t n) const {
    __builtin_prefetch(reinterpret_cast<const char*>(words(row)) + n * 64, 0, 2);
    if (n % 8 == 0) {  // 16 bytes of weights have one scale
      const int64_t bytes = scale_dtype == KIMI_F32 ? 4 : 2;
      __builtin_prefetch(
          static_cast<const char*>(scale) + (row * stride_scale + n / 8 * 32) * bytes, 0, 2);
    }
  }

  // Fetches the cache line of a row's scales that has that of `group`.
  __attribute__((always_inline)) void fetch_scales(int64_t row, int64_t group) const {
    const int64_t bytes = scale_dtype == KIMI_F32 ? 4 : 2;
    __builtin_prefetch(static_cast<const char*>(scale) + (row * stride_scale + group) * bytes, 0,
                       2);
  }

  // The scales of a row as float32.
  void scales(float* to, int64_t row) const {
    with_element(scale_dtype, [&](auto element) {
      const auto* from = static_cast<const decltype(element)*>(scale) + row * stride_scale;
      for_each_piece(groups,
                     [&](int64_t i, auto n) { store_piece(to + i, load_piece(from + i, n), n); });
    });
  }
};

// Columns of a block of rearranged x.
template <class O>
inline constexpr int64_t kBlock = kPairs<O> ? 128 : 8 * W;

template <class O>
inline int64_t arranged_size(int64_t columns) {
  return (columns + kBlock<O> - 1) / kBlock<O> * kBlock<O>;
}

// Where column c of x is in its rearranged form.
template <class O>
inline int64_t arranged_position(int64_t c) {
  constexpr int64_t kNibbles = kPairs<O> ? 4 : 8;
  const int64_t within = c % kBlock<O>;
  return c - within + within % kNibbles * (kBlock<O> / kNibbles) + within / kNibbles;
}

// Rearranges a row of x, and pads the last block with 0.
template <class O, class E>
inline void arrange(O* to, const E* x, int64_t columns) {
  const int64_t size = arranged_size<O>(columns);
  for (int64_t c = 0; c < columns; ++c) {
    to[arranged_position<O>(c)] = narrow<O>(widen(x[c]));
  }
  for (int64_t c = columns; c < size; ++c) to[arranged_position<O>(c)] = O{};
}

// W / 4 scales (the first `groups` of them; the others count as 0), each in four lanes.
inline F spread_scales(const float* scales, int64_t groups) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  // Zen 4 makes a masked load wait until what was stored there has left the store queue.
  const __m128 four = groups == 4
                          ? _mm_loadu_ps(scales)
                          : _mm_maskz_loadu_ps(static_cast<__mmask8>((1u << groups) - 1), scales);
  return (F)_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(four));
#else
  F spread = {};
  for (int lane = 0; lane < W; ++lane) {
    spread[lane] = lane / kGroupWords < groups ? scales[lane / kGroupWords] : 0.0f;
  }
  return spread;
#endif
}

#if defined(__AVX512F__)
// -8 .. 7, to be looked up by nibble: the look-up takes the lowest four bits of a lane.
inline F nibble_table() {
  return (F)_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}
inline F look_up(U lanes, F table) {
  return (F)_mm512_permutexvar_ps((__m512i)lanes, (__m512)table);
}
#endif

inline U load_words(const uint32_t* p) {
  U words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// sums[r][t] += the products of a block of R rows' weights with T tokens' x, lane w those of word
// w. What is loaded of x serves all rows: x of several tokens comes from the second cache.
template <int R, int T>
inline void add_block(F (&sums)[R][T], const U (&words)[R], const float* const (&x)[T],
                      int64_t at) {
  for (int j = 0; j < 8; ++j) {
    F q[R];
    for (int r = 0; r < R; ++r) {
#if defined(__AVX512F__)
      q[r] = look_up(words[r] >> (4 * j), nibble_table());
#else
      q[r] = __builtin_convertvector((I)((words[r] >> (4 * j)) & 15), F) - 8.0f;
#endif
    }
    for (int t = 0; t < T; ++t) {
      const F xs = load(x[t] + at + j * W);
      for (int r = 0; r < R; ++r) sums[r][t] += q[r] * xs;
    }
  }
}

#if defined(__AVX512BF16__)
template <int R, int T>
inline void add_block(F (&sums)[R][T], const U (&words)[R], const bf16* const (&x)[T], int64_t at) {
  // -8 .. 7 as bf16, twice: the look-up takes five bits, of which the highest is the next nibble's.
  static constexpr uint16_t kTable[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
      0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
      0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  const __m512i table = _mm512_loadu_si512(kTable);
  __m512i q[R][4];
  for (int r = 0; r < R; ++r) {
    const auto halves = (__m512i)words[r];
    q[r][0] = _mm512_permutexvar_epi16(halves, table);
    q[r][1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(halves, 4), table);
    q[r][2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(halves, 8), table);
    q[r][3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(halves, 12), table);
  }
  for (int j = 0; j < 4; ++j) {
    for (int t = 0; t < T; ++t) {
      const auto xs = (__m512bh)_mm512_loadu_si512(x[t] + at + j * 32);
      for (int r = 0; r < R; ++r) {
        sums[r][t] = (F)_mm512_dpbf16_ps((__m512)sums[r][t], (__m512bh)q[r][j], xs);
      }
    }
  }
}
#endif

inline constexpr int64_t kAhead = 3072;  // bytes that weights are fetched ahead of their use

// Rows of weights that T tokens are multiplied with side by side. Four streams from memory arrive
// at up to twice the speed of two (Zen 4: 29 GB/s and 16); the sums of more tokens leave room for
// two.
template <int T>
inline constexpr int kRowsTogether = T <= 2 && W == 16 ? 4 : 2;
inline constexpr int kMostRowsTogether = 4;

// results[r][t] = weights[rows[r]] . x[t] for R rows and T rearranged tokens; `scratch` holds
// R * groups floats.
template <int R, int T, class O>
inline void dot_rows(float (&results)[R][T], const Int4Rows& weights, const int64_t (&rows)[R],
                     const O* const (&x)[T], float* scratch) {
  const uint32_t* words[R];
  for (int r = 0; r < R; ++r) {
    words[r] = weights.words(rows[r]);
    weights.scales(scratch + r * weights.groups, rows[r]);
  }
  F totals[R][T] = {};
  constexpr int64_t kGroups = W / kGroupWords;
  auto block = [&](int64_t group, int64_t count, auto&& load_block) {
    U block_words[R];
    for (int r = 0; r < R; ++r) block_words[r] = load_block(words[r] + group * kGroupWords);
    F sums[R][T] = {};
    add_block<R, T>(sums, block_words, x, group * kGroup);
    for (int r = 0; r < R; ++r) {
      const F scale = spread_scales(scratch + r * weights.groups + group, count);
      for (int t = 0; t < T; ++t) totals[r][t] += scale * sums[r][t];
    }
  };
  int64_t group = 0;
  for (; group + kGroups <= weights.groups; group += kGroups) {
    for (int r = 0; r < R; ++r) {
      const uint32_t* ahead = words[r] + group * kGroupWords + kAhead / 4;
      __builtin_prefetch(ahead, 0, 2);  // into the second cache
      if (group % kScalesOfLine == 0) weights.fetch_scales(rows[r] + 1, group);
    }
    block(group, kGroups, [](const uint32_t* p) { return load_words(p); });
  }
  if (const int64_t rest = weights.groups - group; rest > 0) {
    block(group, rest, [&](const uint32_t* p) {
      return (U)load_first(reinterpret_cast<const float*>(p), rest * kGroupWords);
    });
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) results[r][t] = sum(totals[r][t]);
  }
}

// Calls body({i, i + n, i + 2 n, ..}) for the P parts of first .. last, n long each, and body({i})
// for what is left over.
template <int P, class Body>
inline void for_parts(int64_t first, int64_t last, const Body& body) {
  const int64_t n = (last - first) / P;
  for (int64_t i = 0; i < n; ++i) {
    int64_t at[P];
    for (int p = 0; p < P; ++p) at[p] = first + p * n + i;
    body(at);
  }
  for (int64_t i = first + P * n; i < last; ++i) body({i});
}

// Calls body<T>(first) for pieces of 0 .. count of 4, 2 and 1.
template <class Body>
inline void for_few(int64_t count, const Body& body) {
  int64_t first = 0;
  for (; first + 4 <= count; first += 4) body(std::integral_constant<int, 4>(), first);
  for (; first + 2 <= count; first += 2) body(std::integral_constant<int, 2>(), first);
  for (; first < count; ++first) body(std::integral_constant<int, 1>(), first);
}

}  // namespace kimi::KIMI_ISA
