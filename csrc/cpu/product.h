// Products of a row-major matrix and a packed one, the inner loops of the ops that multiply.
//
// The packed operand is cut into panels of 32 columns, so that a panel is read from front to back:
//
//   bf16   panel[k / 2][column][2]   two neighbours of the sum side by side, as VDPBF16PS and AMX
//                                    want them: a 32-bit word holds k = 2j (low half) and 2j + 1
//   float  panel[k][column]
//
// bfloat16 is multiplied as it is and summed in float32; float16 and float32 are multiplied in
// float32. With AMX one step takes 32 x 32 x 32, in four accumulator tiles; the other instruction
// sets keep kRows x 2 vectors of sums in registers.
#pragma once

#include <algorithm>
#include <atomic>
#include <utility>

#include "cpu/elements.h"

namespace kimi::KIMI_ISA {

inline constexpr int kPanel = 32;  // columns of a panel
inline constexpr int kDepth = 32;  // what k must be a multiple of for bf16; pad with zeros

// What elements E are multiplied as.
template <class E>
using Operand = std::conditional_t<std::is_same_v<E, bf16>, bf16, float>;

template <class O>
inline constexpr bool kPairs = std::is_same_v<O, bf16>;

// The least depth that holds k for operands O.
template <class O>
inline int64_t padded_depth(int64_t k) {
  return kPairs<O> ? (k + kDepth - 1) / kDepth * kDepth : k;
}

// Tile registers, for as long as a thread multiplies; nothing without AMX.
class [[maybe_unused]] Tiles {
#if defined(__AMX_BF16__)
 public:
  Tiles() { configure(16, 16); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // Tiles 0..3 are sums: (rows a | rows b) x (columns 0..15 | 16..31); 4, 5 hold A, 6, 7 hold B.
  static void configure(int rows_a, int rows_b) {
    const int rows[8] = {rows_a, rows_a, rows_b, rows_b, rows_a, rows_b, 16, 16};
    // Volatile, since GCC's _tile_loadconfig claims to read but the first eight bytes.
    alignas(64) volatile uint8_t layout[64] = {};
    layout[0] = 1;  // palette
    for (int i = 0; i < 8; ++i) {
      layout[16 + 2 * i] = 64;  // bytes of a row
      layout[48 + i] = static_cast<uint8_t>(rows[i]);
    }
    _tile_loadconfig(const_cast<const uint8_t*>(layout));
  }
#endif
};

#if defined(__AMX_BF16__)
// c[rows][32] (+)= a[rows][k] b[k][32] for 17 to 32 rows (kBoth) or 1 to 16.
template <bool kBoth>
inline void multiply_tiles(float* c, int64_t stride_c, const bf16* a, int64_t stride_a,
                           const bf16* panel, int64_t k, bool accumulate) {
  const int64_t bytes_c = stride_c * 4, bytes_a = stride_a * 2;
  // GCC's _tile_loadd does not say that it reads memory: what was stored there must be there.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  if (accumulate) {
    _tile_loadd(0, c, bytes_c);
    _tile_loadd(1, c + 16, bytes_c);
    if constexpr (kBoth) {
      _tile_loadd(2, c + 16 * stride_c, bytes_c);
      _tile_loadd(3, c + 16 * stride_c + 16, bytes_c);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kBoth) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t i = 0; i < k; i += kDepth) {
    _tile_loadd(6, panel + i * kPanel, kPanel * 4);
    _tile_loadd(4, a + i, bytes_a);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + i * kPanel + 32, kPanel * 4);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBoth) {
      _tile_loadd(5, a + 16 * stride_a + i, bytes_a);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, bytes_c);
  _tile_stored(1, c + 16, bytes_c);
  if constexpr (kBoth) {
    _tile_stored(2, c + 16 * stride_c, bytes_c);
    _tile_stored(3, c + 16 * stride_c + 16, bytes_c);
  }
}

inline void multiply(float* c, int64_t stride_c, const bf16* a, int64_t stride_a, const bf16* panel,
                     int64_t m, int64_t k, bool accumulate) {
  int64_t row = 0;
  for (; row + 32 <= m; row += 32) {
    multiply_tiles<true>(c + row * stride_c, stride_c, a + row * stride_a, stride_a, panel, k,
                         accumulate);
  }
  const int rest = static_cast<int>(m - row);
  if (rest == 0) return;
  c += row * stride_c;
  a += row * stride_a;
  const bool odd = rest % 16 != 0;
  if (rest > 16) {
    if (odd) Tiles::configure(16, rest - 16);
    multiply_tiles<true>(c, stride_c, a, stride_a, panel, k, accumulate);
  } else {
    if (odd) Tiles::configure(rest, 16);
    multiply_tiles<false>(c, stride_c, a, stride_a, panel, k, accumulate);
  }
  if (odd) Tiles::configure(16, 16);
}
#endif

inline constexpr int kRows = W == 16 ? 12 : 6;  // of sums in registers, 2 W wide

// Products that are summed one after the other; the sums of those are added up: a single chain of
// hundreds would round more often than torch does.
template <class O>
inline constexpr int64_t kChain = kPairs<O> ? 128 : 32;

// sums[R][2] += a[R][k] b[k][2 W], from one step of the depth on to the next. Without fused
// multiply-adds in float64: each product would be rounded too, more often than torch does.
#if defined(__FMA__)
template <int R>
inline void multiply_rows(F (&sums)[R][2], const float* a, int64_t stride_a, const float* panel,
                          int64_t k) {
  for (int64_t i = 0; i < k; ++i) {
    const F b0 = load(panel + i * kPanel), b1 = load(panel + i * kPanel + W);
    for (int r = 0; r < R; ++r) {
      const F x = splat(a[r * stride_a + i]);
      sums[r][0] = multiply_add(x, b0, sums[r][0]);
      sums[r][1] = multiply_add(x, b1, sums[r][1]);
    }
  }
}
#else
template <int R>
inline void multiply_rows(F (&sums)[R][2], const float* a, int64_t stride_a, const float* panel,
                          int64_t k) {
  typedef double Wide __attribute__((vector_size(8 * W)));
  Wide wide[R][2] = {};
  for (int64_t i = 0; i < k; ++i) {
    const Wide b0 = __builtin_convertvector(load(panel + i * kPanel), Wide);
    const Wide b1 = __builtin_convertvector(load(panel + i * kPanel + W), Wide);
    for (int r = 0; r < R; ++r) {
      const Wide x = Wide{} + a[r * stride_a + i];
      wide[r][0] += x * b0;
      wide[r][1] += x * b1;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < 2; ++j) sums[r][j] += __builtin_convertvector(wide[r][j], F);
  }
}
#endif

template <int R>
inline void multiply_rows(F (&sums)[R][2], const bf16* a, int64_t stride_a, const bf16* panel,
                          int64_t k) {
#if !defined(__AVX512BF16__)
  // Widened first, so that an element in all lanes is a load: made from a pair it takes two
  // instructions of the units that multiply, for every two products.
  alignas(64) float wide[R][kChain<bf16>];
  for (int r = 0; r < R; ++r) {
    for (int64_t i = 0; i < k; i += W) store(wide[r] + i, load(a + r * stride_a + i));
  }
#endif
  for (int64_t i = 0; i < k; i += 2) {
    U b0, b1;
    std::memcpy(&b0, panel + i * kPanel, sizeof b0);
    std::memcpy(&b1, panel + i * kPanel + 2 * W, sizeof b1);
    for (int r = 0; r < R; ++r) {
#if defined(__AVX512BF16__)
      uint32_t pair;
      std::memcpy(&pair, a + r * stride_a + i, sizeof pair);
      const auto x = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
      sums[r][0] = (F)_mm512_dpbf16_ps((__m512)sums[r][0], x, (__m512bh)b0);
      sums[r][1] = (F)_mm512_dpbf16_ps((__m512)sums[r][1], x, (__m512bh)b1);
#else
      const F even = splat(wide[r][i]), odd = splat(wide[r][i + 1]);
      sums[r][0] += even * (F)(b0 << 16);
      sums[r][0] += odd * (F)(b0 & 0xffff0000u);
      sums[r][1] += even * (F)(b1 << 16);
      sums[r][1] += odd * (F)(b1 & 0xffff0000u);
#endif
    }
  }
}

template <int R, class O>
inline void multiply_block(float* c, int64_t stride_c, const O* a, int64_t stride_a, const O* panel,
                           int64_t k, bool accumulate) {
  constexpr int kWords = kPairs<O> ? 2 : 1;  // elements of a column in a panel's row
  for (int column = 0; column < kPanel; column += 2 * W) {
    int64_t first = 0;
    do {
      const bool add = accumulate || first > 0;
      F sums[R][2] = {};
      multiply_rows<R>(sums, a + first, stride_a, panel + first * kPanel + column * kWords,
                       std::min(kChain<O>, k - first));
      for (int r = 0; r < R; ++r) {
        float* to = c + r * stride_c + column;
        if (add) {
          sums[r][0] += load(to);
          sums[r][1] += load(to + W);
        }
        store(to, sums[r][0]);
        store(to + W, sums[r][1]);
      }
      first += kChain<O>;
    } while (first < k);
  }
}

// Without AMX, and for float operands.
template <class O>
inline void multiply_vectors(float* c, int64_t stride_c, const O* a, int64_t stride_a,
                             const O* panel, int64_t m, int64_t k, bool accumulate) {
  int64_t row = 0;
  auto blocks = [&]<int R>(std::integral_constant<int, R>) {
    for (; row + R <= m; row += R) {
      multiply_block<R>(c + row * stride_c, stride_c, a + row * stride_a, stride_a, panel, k,
                        accumulate);
    }
  };
  blocks(std::integral_constant<int, kRows>());
  blocks(std::integral_constant<int, kRows / 2>());
  blocks(std::integral_constant<int, 2>());
  blocks(std::integral_constant<int, 1>());
}

inline void multiply(float* c, int64_t stride_c, const float* a, int64_t stride_a,
                     const float* panel, int64_t m, int64_t k, bool accumulate) {
  multiply_vectors(c, stride_c, a, stride_a, panel, m, k, accumulate);
}

#if !defined(__AMX_BF16__)
// c[m][32] (+)= a[m][k] * panel[k][32], one panel. The rows of `a` and `c` are `stride_*` elements
// apart; c keeps its values and adds if `accumulate`. For bf16 k is a multiple of kDepth, and a
// thread has `Tiles` while it multiplies. A row of the result is the same for every m.
inline void multiply(float* c, int64_t stride_c, const bf16* a, int64_t stride_a, const bf16* panel,
                     int64_t m, int64_t k, bool accumulate) {
  multiply_vectors(c, stride_c, a, stride_a, panel, m, k, accumulate);
}
#endif

}  // namespace kimi::KIMI_ISA
