// Softmax attention of packed sequences, for the ops that are no more than that.
//
//   out = softmax(scale * q k^T) v,  lse = log(sum(e^(scale * q k^T)))   within each sequence
//
// An item is kBlockQueries queries of one head of one sequence; it takes the keys kBlockKeys at a
// time, so that a block of keys and values stays in L2 while the queries pass over it, 32 (a group)
// at a time: scores[32][keys] = q x k^T, the softmax along each row, sums[32][V] += weights x v.
// The scores of the next group are computed between the rows of a softmax, so that AMX's tiles
// multiply while the vectors exponentiate (5 % of prefill). Causal groups end at the last key that
// one of their queries sees.
//
// Keys and values are packed (product.h) before: of a sequence of several items by a region of its
// own, for all its items, as many heads in turn as kSharedBytes hold; else by the item.
// 2 (width + V) flops for each query and each key it sees.
//
// 4,096 patches, 16 heads of 72, one thread with AMX: 130 ms, of which the products take 57 (33 at
// the tiles' peak, the depth of 72 counted as 96), the softmax 35 and reading q, k and v 18. Steps
// of 32 of the depth interleaved with the rows (tiles and vectors wholly side by side) gave
// nothing: both wait for L2.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/attention_softmax.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace kimi::KIMI_ISA {

inline constexpr int64_t kBlockQueries = 256;  // of an item
inline constexpr int64_t kBlockKeys = 256;
inline constexpr int64_t kSharedBytes = int64_t{24} << 20;  // of packed keys and values at a time

// Shapes of a call, and where its tensors are; strides in elements.
struct AttentionCall {
  const void* q;  // [T, H, width]
  int64_t stride_q_t, stride_q_h;
  const void* k;  // [L, H, width]
  int64_t stride_k_t, stride_k_h;
  const void* v;  // [L, H, value_width]
  int64_t stride_v_t, stride_v_h;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [B+1]
  int64_t sequences, tokens, keys, heads, width, value_width;
  float scale;
  bool causal;
};

// Rows of one sequence, within the tensors whatever the offsets are.
struct Sequence {
  int64_t q0, n, k0, m;  // queries q0 .. q0 + n, keys k0 .. k0 + m

  Sequence(const AttentionCall& call, int64_t b) {
    const auto span = [b](const int32_t* offsets, int64_t rows, int64_t& start, int64_t& count) {
      start = std::clamp<int64_t>(offsets[b], 0, rows);
      count = std::clamp<int64_t>(offsets[b + 1], start, rows) - start;
    };
    span(call.cu_seqlens_q, call.tokens, q0, n);
    span(call.cu_seqlens_k, call.keys, k0, m);
  }
  int64_t query_blocks() const { return (n + kBlockQueries - 1) / kBlockQueries; }
  int64_t key_blocks() const { return (m + kBlockKeys - 1) / kBlockKeys; }
};

inline int64_t padded_to_panel(int64_t x) { return (x + kPanel - 1) / kPanel * kPanel; }

// Rows of a head are a page or more apart, which nothing but this foresees: prefill's queries took
// 62 of 170 ms to read without it.
template <class E>
void prefetch_rows(const E* x, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; j += 64 / static_cast<int64_t>(sizeof(E))) {
      __builtin_prefetch(x + i * stride + j);
    }
  }
}

// Keys and values of a block, packed: keys [panel of keys][depth][kPanel] and, behind them, values
// [panel of columns][kBlockKeys][kPanel].
template <class E>
struct KeyBlocks {
  using O = Operand<E>;
  explicit KeyBlocks(const AttentionCall& call)
      : depth(padded_depth<O>(call.width)),
        value_columns(padded_to_panel(call.value_width)),
        elements(kBlockKeys * (depth + value_columns)) {}

  const int64_t depth, value_columns, elements;  // of a block

  void pack(O* to, const AttentionCall& call, const Sequence& sequence, int64_t head,
            int64_t block) const {
    const int64_t first = block * kBlockKeys;
    const int64_t count = std::min(kBlockKeys, sequence.m - first);
    const E* k = static_cast<const E*>(call.k) + (sequence.k0 + first) * call.stride_k_t +
                 head * call.stride_k_h;
    prefetch_rows(k, call.stride_k_t, std::min<int64_t>(kPanel, count), call.width);
    for (int64_t key = 0; key < count; key += kPanel) {
      prefetch_rows(k + (key + kPanel) * call.stride_k_t, call.stride_k_t,
                    std::min<int64_t>(kPanel, count - key - kPanel), call.width);
      pack_rows_as_columns(to + key * depth, k + key * call.stride_k_t, call.stride_k_t,
                           std::min<int64_t>(kPanel, count - key), call.width);
    }
    const E* v = static_cast<const E*>(call.v) + (sequence.k0 + first) * call.stride_v_t +
                 head * call.stride_v_h;
    prefetch_rows(v, call.stride_v_t, count, call.value_width);
    for (int64_t column = 0; column < call.value_width; column += kPanel) {
      pack_rows(values(to) + column * kBlockKeys, v + column, call.stride_v_t,
                std::min<int64_t>(kPanel, call.value_width - column), count);
    }
  }
  template <class P>
  P* values(P* block) const {
    return block + kBlockKeys * depth;
  }
};

// A thread's own: a block of queries and what it has so far.
template <class E, bool kExact>
class QueryBlock {
 public:
  using O = Operand<E>;

  explicit QueryBlock(const AttentionCall& call)
      : call_(call),
        blocks_(call),
        scale_(std::max(std::abs(call.scale), 1e-30f)),
        stride_q_(blocks_.depth + 64 / static_cast<int64_t>(sizeof(O))),
        q_(kBlockQueries * stride_q_),
        sums_(kBlockQueries * blocks_.value_columns),
        scores_(2 * kGroup * kScoreStride),
        weights_(kGroup * kWeightStride) {}

  // Begins queries block * kBlockQueries .. of a sequence and a head.
  void begin(const Sequence& sequence, int64_t head, int64_t block) {
    first_ = block * kBlockQueries;
    queries_ = std::min(kBlockQueries, sequence.n - first_);
    hidden_ = sequence.m - sequence.n + 1 + first_;
    const float sign = call_.scale < 0.0f ? -1.0f : 1.0f;
    const E* q = static_cast<const E*>(call_.q) + (sequence.q0 + first_) * call_.stride_q_t +
                 head * call_.stride_q_h;
    for (int64_t i = 0; i < queries_; ++i) {
      prefetch_rows(q + (i + 16) * call_.stride_q_t, 0, i + 16 < queries_, call_.width);
      const E* from = q + i * call_.stride_q_t;
      O* to = &q_[i * stride_q_];
      for_each_piece(call_.width, [&](int64_t j, auto n) {
        store_piece(to + j, load_piece(from + j, n) * sign, n);
      });
      std::fill(to + call_.width, to + blocks_.depth, O{});
    }
    std::fill_n(softmax_, kBlockQueries / kGroup, GroupSoftmax<kExact>());
  }

  // Whether no query of the block sees key `first_key` or later ones.
  bool past(int64_t first_key) const { return visible(queries_ - 1, first_key, 1) == 0; }

  // Adds the keys first_key .. + keys, packed.
  void add(const O* block, int64_t first_key, int64_t keys) {
    for (int64_t key = 0; key < seen(0, first_key, keys); key += kPanel) score(0, block, key);
    for (int64_t group = 0; group * kGroup < queries_; ++group) {
      // The next group's scores are begun between this one's rows.
      const int64_t rows = rows_of(group), next = seen(group + 1, first_key, keys);
      int64_t key = 0;
      if (const int64_t padded = padded_to_panel(seen(group, first_key, keys)); padded > 0) {
        float* scores = scores_of(group);
        for (int64_t i = 0; i < rows; ++i) {
          float* row = scores + i * kScoreStride;
          std::fill(row + visible(group * kGroup + i, first_key, keys), row + padded, -kInfinity);
        }
        softmax_[group].add(weights_.get(), kWeightStride, scores, kScoreStride, rows, padded,
                            scale_, [&](int64_t i) {
                              if (i % kRowsBetween != 0 || key >= next) return;
                              score(group + 1, block, key);
                              key += kPanel;
                            });
        weigh(group, blocks_.values(block), kPairs<O> ? padded : seen(group, first_key, keys),
              first_key > 0);
      }
      for (; key < next; key += kPanel) score(group + 1, block, key);
    }
  }

  // Writes the results of the block's queries: out [T, H, value_width], lse [T, H] or null.
  void end(E* out, float* lse, const Sequence& sequence, int64_t head) const {
    for (int64_t i = 0; i < queries_; ++i) {
      const int64_t row = (sequence.q0 + first_ + i) * call_.heads + head;
      const float* sum = &sums_[i * blocks_.value_columns];
      const bool any = visible(i, 0, sequence.m) > 0;
      const F share = splat(1.0f / softmax_[i / kGroup].total[i % kGroup]);
      for_each_piece(call_.value_width, [&](int64_t j, auto n) {
        store_piece(out + row * call_.value_width + j, any ? load_piece(sum + j, n) * share : F{},
                    n);
      });
      if (lse) lse[row] = softmax_[i / kGroup].lse(i % kGroup, scale_);
    }
  }

 private:
  static constexpr int64_t kScoreStride = kBlockKeys + 16;  // no power of two: other sets of L1
  static constexpr int64_t kWeightStride = kBlockKeys + 32;
  static constexpr int64_t kRowsBetween = kGroup / (kBlockKeys / kPanel);  // of two panels' scores

  // How many of the keys first_key .. + keys query i of the block sees: the first ones.
  int64_t visible(int64_t i, int64_t first_key, int64_t keys) const {
    return call_.causal ? std::clamp<int64_t>(hidden_ + i - first_key, 0, keys) : keys;
  }

  int64_t rows_of(int64_t group) const {
    return std::clamp<int64_t>(queries_ - group * kGroup, 0, kGroup);
  }
  // How many of the keys first_key .. + keys any query of a group sees: the first ones.
  int64_t seen(int64_t group, int64_t first_key, int64_t keys) const {
    const int64_t rows = rows_of(group);
    return rows > 0 ? visible(group * kGroup + rows - 1, first_key, keys) : 0;
  }
  float* scores_of(int64_t group) const { return &scores_[group % 2 * kGroup * kScoreStride]; }

  // A group's scores of the panel of keys that begins at `key`.
  void score(int64_t group, const O* block, int64_t key) {
    multiply(scores_of(group) + key, kScoreStride, &q_[group * kGroup * stride_q_], stride_q_,
             block + key * blocks_.depth, rows_of(group), blocks_.depth, false);
  }

  // A group's sums += weights x values; the first block of keys begins them.
  void weigh(int64_t group, const O* values, int64_t keys, bool accumulate) {
    const int64_t columns = blocks_.value_columns, rows = rows_of(group);
    float* sums = &sums_[group * kGroup * columns];
    for (int64_t i = 0; i < rows && accumulate; ++i) {
      const float fade = softmax_[group].fade[i];
      if (fade == 1.0f) continue;
      for (int64_t j = i * columns; j < (i + 1) * columns; j += W) {
        store(sums + j, load(sums + j) * fade);
      }
    }
    for (int64_t column = 0; column < columns; column += kPanel) {
      multiply(sums + column, columns, weights_.get(), kWeightStride, values + column * kBlockKeys,
               rows, keys, accumulate);
    }
  }

  const AttentionCall& call_;
  const KeyBlocks<E> blocks_;
  const float scale_;  // its sign is in q_, and with 0 a hidden score of -inf would be NaN
  const int64_t stride_q_;
  Buffer<O> q_;           // [kBlockQueries][stride_q]
  Buffer<float> sums_;    // [kBlockQueries][value_columns]
  Buffer<float> scores_;  // [2][kGroup][kScoreStride]
  Buffer<O> weights_;     // [kGroup][kWeightStride]
  GroupSoftmax<kExact> softmax_[kBlockQueries / kGroup];
  int64_t first_ = 0, queries_ = 0;
  int64_t hidden_ = 0;  // the first key that query 0 of the block does not see, if causal
};

// What one thread does at a time: packs a block of keys, or attends for a block of queries.
struct AttentionItem {
  int64_t sequence, head, block;
  int64_t place;  // of the sequence's first packed block, in elements; -1 if nobody packed it
};

// Calls body(pack, attend) with the items of one turn after the other.
template <class E, class Body>
void for_each_turn(const AttentionCall& call, const Body& body) {
  const KeyBlocks<E> blocks(call);
  const int64_t most = kSharedBytes / static_cast<int64_t>(sizeof(Operand<E>));
  std::vector<AttentionItem> pack, attend;
  int64_t used = 0;
  auto turn = [&] {
    if (!attend.empty()) body(pack, attend, used);
    pack.clear();
    attend.clear();
    used = 0;
  };
  for (int64_t b = 0; b < call.sequences; ++b) {
    const Sequence sequence(call, b);
    const int64_t elements = sequence.key_blocks() * blocks.elements;
    const bool shared = sequence.query_blocks() > 1 && elements > 0 && elements <= most;
    for (int64_t head = 0, count; head < call.heads && sequence.n > 0; head += count) {
      if (attend.size() >= 65536 || (shared && used + elements > most)) turn();
      count = call.heads - head;
      if (shared) count = std::min(count, (most - used) / elements);
      // Head after head of the same tokens, which lie side by side.
      for (int64_t block = 0; shared && block < sequence.key_blocks(); ++block) {
        for (int64_t i = 0; i < count; ++i) {
          pack.push_back({b, head + i, block, used + i * elements + block * blocks.elements});
        }
      }
      // A head's blocks find its keys in L2 (20 of 160 ms for 4,096 patches). From the last block,
      // which sees the most keys: what is left at the end is short.
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t block = sequence.query_blocks() - 1; block >= 0; --block) {
          attend.push_back({b, head + i, block, shared ? used + i * elements : -1});
        }
      }
      if (shared) used += count * elements;
    }
  }
  turn();
}

template <bool kExact, class E>
void attention(const kimi_team* team, E* out, float* lse, const AttentionCall& call) {
  using O = Operand<E>;
  const KeyBlocks<E> blocks(call);
  for_each_turn<E>(call, [&](const std::vector<AttentionItem>& pack,
                             const std::vector<AttentionItem>& attend, int64_t elements) {
    Buffer<O> shared(elements);
    for_each_item(team, static_cast<int64_t>(pack.size()), [&](int64_t i) {
      const AttentionItem& item = pack[static_cast<size_t>(i)];
      blocks.pack(&shared[item.place], call, Sequence(call, item.sequence), item.head, item.block);
    });
    run_items(team, static_cast<int64_t>(attend.size()), [&](Items& items) {
      [[maybe_unused]] Tiles tiles;
      QueryBlock<E, kExact> queries(call);
      Buffer<O> own(blocks.elements);
      for (int64_t i; items.take(i);) {
        const AttentionItem& item = attend[static_cast<size_t>(i)];
        const Sequence sequence(call, item.sequence);
        queries.begin(sequence, item.head, item.block);
        for (int64_t block = 0; block < sequence.key_blocks(); ++block) {
          if (queries.past(block * kBlockKeys)) break;
          const O* packed = own.get();
          if (item.place >= 0) {
            packed = &shared[item.place + block * blocks.elements];
          } else {
            blocks.pack(own.get(), call, sequence, item.head, block);
          }
          queries.add(packed, block * kBlockKeys,
                      std::min(kBlockKeys, sequence.m - block * kBlockKeys));
        }
        queries.end(out, lse, sequence, item.head);
      }
    });
  });
  const int64_t last = call.sequences > 0
                           ? std::clamp<int64_t>(call.cu_seqlens_q[call.sequences], 0, call.tokens)
                           : 0;
  std::fill(out + last * call.heads * call.value_width,
            out + call.tokens * call.heads * call.value_width, E{});
  if (lse) std::fill(lse + last * call.heads, lse + call.tokens * call.heads, -kInfinity);
}

}  // namespace kimi::KIMI_ISA
