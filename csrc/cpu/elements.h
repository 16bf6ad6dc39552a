// The element types of tensors, and vectors of W floats loaded from them.
//
// Arithmetic is float32 on GCC's vector extension, which compiles for every instruction set; what
// the extension cannot say (conversions, masked access) is an intrinsic where there is one.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kimi.h"

namespace kimi::KIMI_ISA {

#if defined(__AVX512F__)
inline constexpr int W = 16;
#elif defined(__AVX2__)
inline constexpr int W = 8;
#else
inline constexpr int W = 4;  // SSE2, NEON, or what the compiler makes of it
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline F splat(float x) { return x - F{}; }

#if defined(__FMA__)
// a * b + c, rounded once; written out, since without -O2 GCC joins no product with its sum.
inline F multiply_add(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}
#endif

inline F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline H load_halves(const void* p) {
  H h;
  std::memcpy(&h, p, sizeof h);
  return h;
}

// Between 16 and 32 bits; of these conversions GCC makes twice the instructions.
inline U widen_halves(H h) {
#if defined(__AVX512F__)
  return (U)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, U);
#endif
}
inline H narrow_halves(U u) {  // below 2^16
#if defined(__AVX512F__)
  return (H)_mm512_cvtepi32_epi16((__m512i)u);
#elif defined(__AVX2__)
  const auto x = (__m256i)u;
  return (H)_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
#else
  return __builtin_convertvector(u, H);
#endif
}

inline F widen_bf16(H h) { return (F)(widen_halves(h) << 16); }

inline F widen_fp16(H h) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (F)_mm256_cvtph_ps((__m128i)h);
#else
  // Exponent and mantissa shifted into place are the value times 2^-112, subnormals included;
  // what is then 2^16 or more was infinite or NaN.
  const U u = __builtin_convertvector(h, U);
  const F scaled = (F)((u & 0x7fff) << 13) * 0x1p112f;
  const U special = (U)(scaled >= 65536.0f) & 0x7f800000;
  return (F)((U)scaled | special | (u & 0x8000) << 16);
#endif
}

inline F load(const bf16* p) { return widen_bf16(load_halves(p)); }
inline F load(const fp16* p) { return widen_fp16(load_halves(p)); }

// Rounds to nearest even and keeps subnormals. A NaN stays one.
inline H narrow_bf16(F x) {
#if defined(__AVX512BF16__)
  // VCVTNEPS2BF16 flushes subnormals, so it is for vectors without any.
  constexpr int kSubnormal = 0x20;  // of VFPCLASSPS
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)x, kSubnormal) == 0, 1)) {
    return (H)_mm512_cvtneps_pbh((__m512)x);
  }
#endif
  const U u = (U)x;
  const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const U quiet = u >> 16 | 0x40;
  return narrow_halves(x == x ? rounded : quiet);
}

inline H narrow_fp16(F x) {
#if defined(__AVX512F__)
  return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const U sign = (U)x & 0x80000000;
  const U u = (U)x ^ sign;
  // Below 2^-14 adding 0.5 leaves the rounded multiple of 2^-24 in the low bits of the mantissa.
  const U subnormal = (U)((F)u + 0.5f) - 0x3f000000;
  const U normal = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
  U half = u < 0x38800000 ? subnormal : normal;
  half = u >= 0x477ff000 ? U{} + 0x7c00 : half;  // 65520 and more
  half = u > 0x7f800000 ? U{} + 0x7e00 : half;
  return __builtin_convertvector(half | sign >> 16, H);
#endif
}

inline void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }

inline void store_halves(void* p, H h) { std::memcpy(p, &h, sizeof h); }

inline void store(bf16* p, F x) { store_halves(p, narrow_bf16(x)); }
inline void store(fp16* p, F x) { store_halves(p, narrow_fp16(x)); }

// Stores past the caches: `p` is on a multiple of the vector's size. Lines that are written whole
// are not read first. Other threads see them after `stream_done`.
template <class E>
inline void stream(E* p, F x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) {
    _mm512_stream_ps(p, (__m512)x);
  } else if constexpr (std::is_same_v<E, bf16>) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow_bf16(x));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow_fp16(x));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(E) == 4) {
    _mm256_stream_ps(p, (__m256)x);
  } else if constexpr (std::is_same_v<E, bf16>) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow_bf16(x));
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow_fp16(x));
  }
#else
  store(p, x);
#endif
}
inline void stream_done() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Asks for element i of the row that comes next, or of none if `next` is null: reading a row and
// writing it in turns leaves the memory idle in between.
template <class E>
inline void fetch(const E* next, int64_t i) {
  if (next != nullptr) __builtin_prefetch(next + i);
}

// The first n < W elements, the others 0; and their store.
template <class E>
inline F load_first(const E* p, int64_t n) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(E) == 4) {
    return (F)_mm512_maskz_loadu_ps(mask, p);
  } else {
    const H h = (H)_mm256_maskz_loadu_epi16(mask, p);
    if constexpr (std::is_same_v<E, bf16>) return widen_bf16(h);
    return widen_fp16(h);
  }
#else
  E padded[W] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(E));
  return load(padded);
#endif
}

template <class E>
inline void store_first(E* p, F x, int64_t n) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(E) == 4) {
    _mm512_mask_storeu_ps(p, mask, (__m512)x);
  } else if constexpr (std::is_same_v<E, bf16>) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow_bf16(x));
  } else {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow_fp16(x));
  }
#else
  E padded[W];
  store(padded, x);
  std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(E));
#endif
}

// One element.
inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
inline float widen(fp16 x) { return widen_fp16(H{} + x.bits)[0]; }

template <class E>
inline E narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  return {narrow_bf16(splat(x))[0]};
}
template <>
inline fp16 narrow<fp16>(float x) {
  return {narrow_fp16(splat(x))[0]};
}

// Calls body(p, n) for the pieces of 0 .. width, W elements each but for the last; `n` is a
// constant W in all the others, so that the compiler drops the masks.
template <class Body>
inline void for_each_piece(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + W <= width; i += W) body(i, std::integral_constant<int64_t, W>());
  if (i < width) body(i, width - i);
}

// Loads and stores of such a piece.
template <class E, class N>
inline F load_piece(const E* p, N n) {
  if constexpr (std::is_same_v<N, int64_t>) {
    return load_first(p, n);
  } else {
    return load(p);
  }
}
template <class E, class N>
inline void store_piece(E* p, F x, N n) {
  if constexpr (std::is_same_v<N, int64_t>) {
    store_first(p, x, n);
  } else {
    store(p, x);
  }
}

// The same, past the caches if kStream and the piece is a whole vector.
template <bool kStream, class E, class N>
inline void write_piece(E* p, F x, N n) {
  if constexpr (kStream && !std::is_same_v<N, int64_t>) {
    stream(p, x);
  } else {
    store_piece(p, x, n);
  }
}

// Calls body(bool_constant): whether to write a tensor of `rows` rows of `row_bytes` past the
// caches. It pays where the tensor would not stay in them: a row norm of 115 MB gains 1.3x (two
// threads), and what reads a small one next finds it there.
template <class Body>
inline void with_streaming(const void* p, int64_t rows, int64_t row_bytes, const Body& body) {
  constexpr int64_t kBeyondCaches = 32 << 20;
  const bool whole_lines =
      (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(row_bytes)) % 64 == 0;
  if (whole_lines && rows * row_bytes >= kBeyondCaches) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

// Calls body(E{}) with the element type that `dtype` names.
template <class Body>
inline void with_element(int64_t dtype, const Body& body) {
  if (dtype == KIMI_BF16) {
    body(bf16{});
  } else if (dtype == KIMI_F16) {
    body(fp16{});
  } else {
    body(float{});
  }
}

}  // namespace kimi::KIMI_ISA
