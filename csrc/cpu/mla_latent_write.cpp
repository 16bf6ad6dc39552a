// Of each row (q | c | k) of qkv_a: q_a = rms_norm(q), kv_cache[slot] = (rms_norm(c) | rope(k)).
//
// An item is a few tokens. A token's sines are taken once, of float32 angles. A cache in the fp8
// format (kimi_ops/quant/latent_fp8.py) gets e4m3 codes of the latent as it is in the dtype of
// qkv_a, the scale four times, and the rope values in bfloat16. Bound by memory: a token is read
// and written once.
#include "cpu/indices.h"
#include "cpu/parallel.h"
#include "cpu/rotate.h"
#include "cpu/row_norm.h"

namespace kimi::KIMI_ISA {
namespace {

// What is stored as an E, in float32.
template <class E>
F rounded(F x) {
  if constexpr (std::is_same_v<E, bf16>) return widen_bf16(narrow_bf16(x));
  if constexpr (std::is_same_v<E, fp16>) return widen_fp16(narrow_fp16(x));
  return x;
}

// float8_e4m3fn of |x| <= 448, to nearest even, in 32 bits.
U e4m3(F x) {
  const U u = (U)x, magnitude = u & 0x7fffffff;
  // Below 2^-6 adding 2^14 leaves the rounded multiple of 2^-9 in the low bits of the mantissa.
  const U subnormal = (U)((F)magnitude + 16384.0f) - 0x46800000;
  const U normal = (magnitude - 0x3c000000 + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  return (magnitude < 0x3c800000 ? subnormal : normal) | (u >> 24 & 0x80);
}

void store_bytes(uint8_t* p, U codes, int64_t n) {
  typedef uint8_t Bytes __attribute__((vector_size(W)));
#if defined(__AVX512F__)
  const auto bytes = (Bytes)_mm512_cvtepi32_epi8((__m512i)codes);
#else
  const auto bytes = __builtin_convertvector(codes, Bytes);
#endif
  std::memcpy(p, &bytes, static_cast<size_t>(n));
}

// codes[rank] and four times the scale of latents whose largest is `largest`: a NaN if one is not
// finite.
void quantise(uint8_t* to, const float* latent, int64_t rank, float largest) {
  constexpr float kLargest = 448.0f, kSmallestScale = 0x1p-126f, kInfinity = __builtin_inff();
  const bool finite = largest < kInfinity;
  const float scale = finite ? std::max(largest / kLargest, kSmallestScale) : __builtin_nanf("");
  const F inverse = splat(1.0f / scale);
  for_each_piece(rank, [&](int64_t i, auto n) {
    const F x = load_piece(latent + i, n) * inverse;
    store_bytes(to + i, finite ? e4m3(x) : U{} + 0x7f, n);
  });
  for (int copy = 0; copy < 4; ++copy) std::memcpy(to + rank + 4 * copy, &scale, sizeof scale);
}

template <class E>
struct Call {
  E* q_a;                         // [tokens, Q]
  const E* qkv_a;                 // [tokens, Q + C + R]
  const E *q_weight, *kv_weight;  // [Q], [C]
  const float* inv_freq;          // [R / 2]
  Indices positions, slots;       // [tokens]
  void* cache;                    // [pages, P, C + R], or bytes [pages, P, C + 16 + 2 R]
  int64_t stride_qkv_a, stride_page, stride_row;
  int64_t tokens, q, c, r, pages, page_size;
  float eps;
  bool fp8;

  // Latent and rope values of a token; `latent`, `cosines` and `sines` are the thread's own.
  void write(int64_t slot, int64_t token, float* latent, float* cosines, float* sines,
             const E* next) const {
    const E *x = qkv_a + token * stride_qkv_a + q, *k = x + c;
    const int64_t at = slot / page_size * stride_page + slot % page_size * stride_row;
    const Factor<E> factor = rms_factor(x, c, eps);
    turns(cosines, sines, static_cast<float>(positions[token]), inv_freq, r / 2);
    if (!fp8) {
      E* to = static_cast<E*>(cache) + at;
      scale_row<false>(to, x, kv_weight, c, factor, next);
      for_each_piece(r, [&](int64_t i, auto n) {
        store_piece(to + c + i, rotated(k + i, cosines + i, sines + i, n), n);
      });
      return;
    }
    uint8_t* to = static_cast<uint8_t*>(cache) + at;
    I most = {};  // bits of the largest size: they order as sizes do, NaN above infinity
    for_each_piece(c, [&](int64_t i, auto n) {
      fetch(next, i);
      const F v = rounded<E>(factor * load_piece(x + i, n) * load_piece(kv_weight + i, n));
      store_piece(latent + i, v, n);
      const I size = (I)v & 0x7fffffff;
      most = size > most ? size : most;
    });
    int32_t bits = 0;
    for (int lane = 0; lane < W; ++lane) bits = std::max(bits, most[lane]);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    quantise(to, latent, c, largest);
    auto* rope = reinterpret_cast<bf16*>(to + c + 16);
    for_each_piece(r, [&](int64_t i, auto n) {
      store_piece(rope + i, rounded<E>(rotated(k + i, cosines + i, sines + i, n)), n);
    });
  }

  template <class Stream>
  void run(const kimi_team* team, Stream) const {
    const int64_t at_once = rows_at_once(q + c + r);
    run_items(team, (tokens + at_once - 1) / at_once, [&](Items& items) {
      const Buffer<float> latent(c), cosines(turns_size(r / 2)), sines(turns_size(r / 2));
      for (int64_t item; items.take(item);) {
        const int64_t last = std::min(tokens, (item + 1) * at_once);
        for (int64_t token = item * at_once; token < last; ++token) {
          const E* x = qkv_a + token * stride_qkv_a;
          const E* next = token + 1 < last ? x + stride_qkv_a : nullptr;
          const int64_t slot = slots[token];
          const bool inside = slot >= 0 && slot < pages * page_size;
          if (inside || slot == -1) {
            scale_row<Stream::value>(q_a + token * q, x, q_weight, q, rms_factor(x, q, eps), next);
          } else {
            std::fill(q_a + token * q, q_a + (token + 1) * q, narrow<E>(__builtin_nanf("")));
          }
          if (inside) {
            write(slot, token, latent.get(), cosines.get(), sines.get(),
                  next == nullptr ? nullptr : next + q);
          }
        }
      }
      if constexpr (Stream::value) stream_done();
    });
  }
};

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(mla_latent_write)(const kimi_team* team, int64_t dtype, int64_t fp8,
                                           void* q_a, const void* qkv_a, int64_t stride_qkv_a,
                                           const void* q_norm_weight, const void* kv_norm_weight,
                                           const void* positions, int64_t position_bytes,
                                           const float* inv_freq, const void* slot_mapping,
                                           int64_t slot_bytes, void* kv_cache, int64_t stride_page,
                                           int64_t stride_row, int64_t tokens, int64_t q, int64_t c,
                                           int64_t r, int64_t pages, int64_t page_size, float eps) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      const Call<E> call{static_cast<E*>(q_a),
                         static_cast<const E*>(qkv_a),
                         static_cast<const E*>(q_norm_weight),
                         static_cast<const E*>(kv_norm_weight),
                         inv_freq,
                         {positions, position_bytes},
                         {slot_mapping, slot_bytes},
                         kv_cache,
                         stride_qkv_a,
                         stride_page,
                         stride_row,
                         tokens,
                         q,
                         c,
                         r,
                         pages,
                         page_size,
                         eps,
                         fp8 != 0};
      with_streaming(q_a, tokens, q * static_cast<int64_t>(sizeof(E)),
                     [&](auto stream) { call.run(team, stream); });
    });
  });
}
