// The router's product, logits = x @ gate_weight^T in float32, in pieces that moe_route.cpp puts
// together.
//
// For one token every row of the weight is read once and multiplied with it: bound by reading the
// weight. More tokens are packed into panels of 32 columns (product.h), and rows of the weight are
// multiplied with them as they lie in memory:
//
//   logits[panel][expert][32 tokens] = weight[expert][D] * panel[D][32]
//
// in chunks of kChunk of D that are summed on their own: a single sum of 7,168 products would lose
// more than torch's matrix product does. Where x and the weight are both bfloat16 their products
// are exact and are summed in float32 by AMX or VDPBF16PS, which take subnormal inputs and sums for
// 0: off by less than 2^-126 times D times the largest factor. All others are multiplied as
// float32.
#pragma once

#include <algorithm>

#include "cpu/math.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace kimi::KIMI_ISA {

inline constexpr int64_t kChunk = 512;      // of D
inline constexpr int64_t kGateRows = 128;   // of a block's product, at most
inline constexpr int64_t kTokenPanels = 4;  // of a block of many tokens

struct Gate {
  int64_t dtype_x, dtype_weight;
  const void *x, *weight;  // [tokens, depth], [experts, depth]
  int64_t stride_x, stride_weight;
  int64_t tokens, depth, experts;
};

// to[row][i] = from[row][i] in float32 or as it is.
template <class O>
void copy_rows(O* to, int64_t stride_to, int64_t dtype, const void* from, int64_t start,
               int64_t stride, int64_t rows, int64_t width) {
  with_element(dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t row = 0; row < rows; ++row) {
      const E* source = static_cast<const E*>(from) + start + row * stride;
      if constexpr (std::is_same_v<E, O>) {
        std::copy(source, source + width, to + row * stride_to);
      } else if constexpr (std::is_same_v<O, float>) {
        for_each_piece(width, [&](int64_t i, auto n) {
          store_piece(to + row * stride_to + i, load_piece(source + i, n), n);
        });
      }
    }
  });
}

// What a thread needs for products of operands O.
template <class O>
class GateProduct {
 public:
  explicit GateProduct(const Gate& gate)
      : gate_(gate), rows_(kGateRows * kChunk), sums_(kGateRows * kPanel) {}

  // One panel of the chunk that starts at k0, of up to 32 tokens.
  void pack(O* panel, int64_t token, int64_t k0) {
    const int64_t columns = std::min<int64_t>(kPanel, gate_.tokens - token);
    const int64_t start = token * gate_.stride_x + k0, k = depth(k0);
    if (gate_.dtype_x == dtype_of_operand()) {
      pack_rows_as_columns(panel, static_cast<const O*>(gate_.x) + start, gate_.stride_x, columns,
                           k);
    } else {
      copy_rows(rows_.get(), kChunk, gate_.dtype_x, gate_.x, start, gate_.stride_x, columns, k);
      pack_rows_as_columns(panel, rows_.get(), kChunk, columns, k);
    }
  }

  // Of the experts from `expert` on, up to kGateRows: adds the chunk's sums to logits[expert][32]
  // of each panel; those of the first chunk are stored.
  void multiply_chunk(float* logits, const O* panels, int64_t stride_panel, int64_t count,
                      int64_t expert, int64_t rows, int64_t k0) {
    const int64_t start = expert * gate_.stride_weight + k0, k = depth(k0);
    const O* a = static_cast<const O*>(gate_.weight) + start;
    int64_t stride = gate_.stride_weight;
    if (gate_.dtype_weight != dtype_of_operand() || padded_depth<O>(k) != k) {
      stride = kChunk;
      a = rows_.get();
      copy_rows(rows_.get(), kChunk, gate_.dtype_weight, gate_.weight, start, gate_.stride_weight,
                rows, k);
      for (int64_t row = 0; row < rows; ++row) {
        O* end = rows_.get() + row * kChunk;
        std::fill(end + k, end + padded_depth<O>(k), O{});
      }
    }
    for (int64_t p = 0; p < count; ++p) {
      float* to = logits + (p * gate_.experts + expert) * kPanel;
      float* sums = k0 == 0 ? to : sums_.get();
      multiply(sums, kPanel, a, stride, panels + p * stride_panel, rows, padded_depth<O>(k), false);
      if (k0 == 0) continue;
      for (int64_t i = 0; i < rows * kPanel; i += W) store(to + i, load(to + i) + load(sums + i));
    }
  }

 private:
  static constexpr int64_t dtype_of_operand() { return kPairs<O> ? KIMI_BF16 : KIMI_F32; }
  int64_t depth(int64_t k0) const { return std::min(kChunk, gate_.depth - k0); }

  const Gate& gate_;
  const Buffer<O> rows_;
  const Buffer<float> sums_;
  [[maybe_unused]] Tiles tiles_;
};

// logits[first .. last) of one token x[depth] in float32, each in 64 partial sums.
inline void multiply_one(float* logits, const Gate& gate, const float* x, int64_t first,
                         int64_t last) {
  with_element(gate.dtype_weight, [&](auto element) {
    const auto* weight = static_cast<const decltype(element)*>(gate.weight);
    constexpr int kSums = 64 / W;
    for (int64_t e = first; e < last; ++e) {
      const auto* row = weight + e * gate.stride_weight;
      F sums[kSums] = {};
      int64_t i = 0;
      for (; i + 64 <= gate.depth; i += 64) {
        for (int j = 0; j < kSums; ++j) sums[j] += load(row + i + j * W) * load(x + i + j * W);
      }
      for_each_piece(gate.depth - i, [&](int64_t j, auto n) {
        sums[j / W] += load_piece(row + i + j, n) * load_piece(x + i + j, n);
      });
      for (int half = kSums / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
      }
      logits[e] = sum(sums[0]);
    }
  });
}

}  // namespace kimi::KIMI_ISA
