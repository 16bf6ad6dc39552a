// Softmax attention of packed sequences, for the ops that are no more than that.
//
//   out = softmax(scale * q k^T) v,  lse = log(sum(e^(scale * q k^T)))   within each sequence
//
// An item is kBlockQueries queries of one head of one sequence; it takes the keys kBlockKeys at a
// time, so that a block of keys and values stays in L2 while the queries pass over it, 32 (a group)
// at a time: scores[32][keys] = q x k^T, the softmax along each row, sums[32][V] += weights x v.
// With AMX the scores of the next group are begun in between: tiles multiply while the vectors
// exponentiate. Causal groups end at the last key that one of their queries sees.
//
// Keys and values are packed (product.h) before: of a sequence of several items by a region of its
// own, for all its items, as many heads in turn as kSharedBytes hold; else by the item.
// 2 (width + V) flops for each query and each key it sees.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/attention_softmax.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace kimi::KIMI_ISA {

inline constexpr int64_t kGroup = 32;          // queries of a group
inline constexpr int64_t kBlockQueries = 256;  // of an item
inline constexpr int64_t kBlockKeys = 512;
inline constexpr int64_t kSharedBytes = int64_t{40} << 20;  // of packed keys and values at a time

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
    for (int64_t key = 0; key < count; key += kPanel) {
      pack_rows_as_columns(to + key * depth, k + key * call.stride_k_t, call.stride_k_t,
                           std::min<int64_t>(kPanel, count - key), call.width);
    }
    const E* v = static_cast<const E*>(call.v) + (sequence.k0 + first) * call.stride_v_t +
                 head * call.stride_v_h;
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
template <class E>
class QueryBlock {
 public:
  using O = Operand<E>;

  explicit QueryBlock(const AttentionCall& call)
      : call_(call),
        blocks_(call),
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
    // The factor of the scores is taken as positive: the maximum comes before it.
    const float sign = call_.scale < 0.0f ? -1.0f : 1.0f;
    const E* q = static_cast<const E*>(call_.q) + (sequence.q0 + first_) * call_.stride_q_t +
                 head * call_.stride_q_h;
    for (int64_t i = 0; i < queries_; ++i) {
      const E* from = q + i * call_.stride_q_t;
      O* to = &q_[i * stride_q_];
      for_each_piece(call_.width, [&](int64_t j, auto n) {
        store_piece(to + j, load_piece(from + j, n) * sign, n);
      });
      std::fill(to + call_.width, to + blocks_.depth, O{});
    }
    std::fill_n(softmax_, queries_, RowSoftmax());
  }

  // Whether no query of the block sees key `first_key` or later ones.
  bool past(int64_t first_key) const { return visible(queries_ - 1, first_key, 1) == 0; }

  // Adds the keys first_key .. + keys, packed.
  void add(const O* block, int64_t first_key, int64_t keys) {
    const int64_t groups = (queries_ + kGroup - 1) / kGroup;
    const float factor = std::abs(call_.scale) * 1.44269504f;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = group * kGroup, rows = std::min(kGroup, queries_ - row);
      const int64_t seen = visible(row + rows - 1, first_key, keys);
      if (seen == 0) continue;
      float* scores = &scores_[0];
      for (int64_t key = 0; key < seen; key += kPanel) {
        multiply(scores + key, kScoreStride, &q_[row * stride_q_], stride_q_,
                 block + key * blocks_.depth, rows, blocks_.depth, false);
      }
      float* sums = &sums_[row * blocks_.value_columns];
      for (int64_t i = 0; i < rows; ++i) {
        const float fade =
            softmax_[row + i].add(&weights_[i * kWeightStride], scores + i * kScoreStride,
                                  visible(row + i, first_key, keys), padded_to_panel(seen), factor);
        if (first_key > 0 && fade != 1.0f) {
          float* sum = sums + i * blocks_.value_columns;
          for (int64_t j = 0; j < blocks_.value_columns; j += W)
            store(sum + j, load(sum + j) * fade);
        }
      }
      for (int64_t column = 0; column < blocks_.value_columns; column += kPanel) {
        multiply(sums + column, blocks_.value_columns, weights_.get(), kWeightStride,
                 blocks_.values(block) + column * kBlockKeys, rows,
                 kPairs<O> ? padded_to_panel(seen) : seen, first_key > 0);
      }
    }
  }

  // Writes the results of the block's queries: out [T, H, value_width], lse [T, H] or null.
  void end(E* out, float* lse, const Sequence& sequence, int64_t head) const {
    for (int64_t i = 0; i < queries_; ++i) {
      const int64_t row = (sequence.q0 + first_ + i) * call_.heads + head;
      const float* sum = &sums_[i * blocks_.value_columns];
      const bool any = visible(i, 0, sequence.m) > 0;
      const F share = splat(1.0f / softmax_[i].total);
      for_each_piece(call_.value_width, [&](int64_t j, auto n) {
        store_piece(out + row * call_.value_width + j, any ? load_piece(sum + j, n) * share : F{},
                    n);
      });
      if (lse) lse[row] = softmax_[i].lse();
    }
  }

 private:
  static constexpr int64_t kScoreStride = kBlockKeys + 16;  // no power of two: other sets of L1
  static constexpr int64_t kWeightStride = kBlockKeys + 32;

  // How many of the keys first_key .. + keys query i of the block sees: the first ones.
  int64_t visible(int64_t i, int64_t first_key, int64_t keys) const {
    return call_.causal ? std::clamp<int64_t>(hidden_ + i - first_key, 0, keys) : keys;
  }

  const AttentionCall& call_;
  const KeyBlocks<E> blocks_;
  const int64_t stride_q_;
  Buffer<O> q_;           // [kBlockQueries][stride_q]
  Buffer<float> sums_;    // [kBlockQueries][value_columns]
  Buffer<float> scores_;  // [2][kGroup][kScoreStride]
  Buffer<O> weights_;     // [kGroup][kWeightStride]
  RowSoftmax softmax_[kBlockQueries];
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
    for (int64_t head = 0; head < call.heads && sequence.n > 0; ++head) {
      if (attend.size() >= 65536 || (shared && used + elements > most)) turn();
      for (int64_t block = 0; shared && block < sequence.key_blocks(); ++block) {
        pack.push_back({b, head, block, used + block * blocks.elements});
      }
      // From the last one, which sees the most keys: what is left at the end is short.
      for (int64_t block = sequence.query_blocks() - 1; block >= 0; --block) {
        attend.push_back({b, head, block, shared ? used : -1});
      }
      used += shared ? elements : 0;
    }
  }
  turn();
}

template <class E>
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
      QueryBlock<E> queries(call);
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
