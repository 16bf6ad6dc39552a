// The paged latent cache: rows of C latent and R rope values, found by page id, as operands.
//
// A plain cache has rows of the operands' own type; where they lie well for multiply() it is read
// in place. Otherwise the rows of a block are copied or, from fp8 (kimi_ops/quant/latent_fp8.py),
// widened into a dense one.
#pragma once

#include <algorithm>

#include "cpu/product.h"

namespace kimi::KIMI_ISA {

inline constexpr int kGroup = 32;  // keys that one step of multiply() takes

struct MlaCache {
  const char* data;  // [num_pages, P] rows
  bool fp8;          // rows of C codes, 16 bytes of scale, R bfloat16
  int64_t num_pages, page_size;
  int64_t page_bytes, token_bytes;  // strides
  int64_t rank, rope;               // C, R

  const char* row(const int32_t* pages, int64_t token) const {
    return data + pages[token / page_size] * page_bytes + token % page_size * token_bytes;
  }

  // Whether tokens first .. last - 1 all lie in pages of the cache.
  bool holds(const int32_t* pages, int64_t first, int64_t last) const {
    for (int64_t page = first / page_size; page * page_size < last; ++page) {
      if (pages[page] < 0 || pages[page] >= num_pages) return false;
    }
    return true;
  }

  // Whether groups of kGroup tokens can be operands where they are.
  template <class E>
  bool in_place() const {
    return !fp8 && std::is_same_v<E, Operand<E>> && page_size % kGroup == 0 &&
           (rank + rope) == padded_depth<Operand<E>>(rank + rope) &&
           token_bytes % static_cast<int64_t>(sizeof(E)) == 0;
  }
};

// Strides in elements of the cache's own.
template <class E>
inline MlaCache cache_of(const void* data, int64_t fp8, int64_t num_pages, int64_t page_size,
                         int64_t stride_page, int64_t stride_token, int64_t rank, int64_t rope) {
  const int64_t bytes = fp8 ? 1 : static_cast<int64_t>(sizeof(E));
  return {static_cast<const char*>(data), fp8 != 0, num_pages, page_size, stride_page * bytes,
          stride_token * bytes,           rank,     rope};
}

// W codes of e4m3, as the float16 whose value is 2^-8 times theirs. NaN codes become numbers: their
// row's scale is NaN.
inline F widen_e4m3(const uint8_t* codes) {
  typedef int8_t Codes __attribute__((vector_size(W)));
  typedef int16_t Halves __attribute__((vector_size(2 * W)));
  Codes c;
  std::memcpy(&c, codes, sizeof c);
  return widen_fp16((H)(__builtin_convertvector(c, Halves) << 7) & 0xbfff);
}

// to[0 .. C) = codes * scale and to[C .. C+R) = rope, of one row of the fp8 format.
template <class O>
inline void unpack_fp8(O* to, const char* row, int64_t rank, int64_t rope) {
  float scale;
  std::memcpy(&scale, row + rank, sizeof scale);
  const F factor = splat(scale * 256.0f);
  const auto* codes = reinterpret_cast<const uint8_t*>(row);
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<O>) {
    for (; i + 2 * W <= rank; i += 2 * W) {
      const __m512 low = (__m512)(widen_e4m3(codes + i) * factor);
      const __m512 high = (__m512)(widen_e4m3(codes + i + W) * factor);
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      std::memcpy(to + i, &both, sizeof both);
    }
  }
#endif
  for (; i + W <= rank; i += W) store(to + i, widen_e4m3(codes + i) * factor);
  if (i < rank) {
    uint8_t last[W] = {};
    std::memcpy(last, codes + i, static_cast<size_t>(rank - i));
    store_first(to + i, widen_e4m3(last) * factor, rank - i);
  }
  const auto* from = reinterpret_cast<const bf16*>(row + rank + 16);
  if constexpr (kPairs<O>) {
    std::memcpy(to + rank, from, static_cast<size_t>(rope) * sizeof(bf16));
  } else {
    for_each_piece(
        rope, [&](int64_t j, auto n) { store_piece(to + rank + j, load_piece(from + j, n), n); });
  }
}

// The keys of a block of a sequence, by groups of kGroup.
template <class E>
class KeyBlock {
  using O = Operand<E>;

 public:
  // `dense` has room for `keys` rows of padded depth where the cache cannot be read in place, and
  // is null where it can.
  KeyBlock(const MlaCache& cache, const int32_t* pages, int64_t first, int64_t keys, O* dense)
      : cache_(cache), pages_(pages), first_(first), keys_(keys), dense_(dense) {
    if (dense) copy();
  }

  int64_t keys() const { return keys_; }
  // Where the group's first row is; the next ones are stride() further each.
  const O* group(int64_t key) const {
    if (dense_) return dense_ + key * depth();
    return reinterpret_cast<const O*>(cache_.row(pages_, first_ + key));
  }
  int64_t stride() const {
    return dense_ ? depth() : cache_.token_bytes / static_cast<int64_t>(sizeof(O));
  }
  int64_t depth() const { return padded_depth<O>(cache_.rank + cache_.rope); }

 private:
  void copy() {
    const int64_t width = cache_.rank + cache_.rope;
    for (int64_t key = 0; key < keys_; ++key) {
      const char* row = cache_.row(pages_, first_ + key);
      O* to = dense_ + key * depth();
      if (cache_.fp8) {
        unpack_fp8(to, row, cache_.rank, cache_.rope);
      } else if constexpr (std::is_same_v<E, O>) {
        std::memcpy(to, row, static_cast<size_t>(width) * sizeof(O));
      } else {
        const auto* from = reinterpret_cast<const E*>(row);
        for_each_piece(width,
                       [&](int64_t i, auto n) { store_piece(to + i, load_piece(from + i, n), n); });
      }
      std::fill(to + width, to + depth(), O{});
    }
  }

  const MlaCache& cache_;
  const int32_t* pages_;
  const int64_t first_, keys_;
  O* dense_;
};

}  // namespace kimi::KIMI_ISA
