// One split of absorbed attention: a tile of query rows over some tokens of a sequence.
#pragma once

#include "cpu/mla_cache.h"
#include "cpu/parallel.h"
#include "cpu/softmax.h"

namespace kimi::KIMI_ISA {

inline constexpr int64_t kTileRows = 128;   // query rows of a tile at most
inline constexpr int64_t kBlockKeys = 256;  // tokens of a block: 576 KiB of bfloat16, in L2

// Shapes of a call, and where its tensors are; strides in elements.
struct MlaCall {
  const void* q;  // [B, S, H, C+R]
  int64_t stride_q_b, stride_q_s, stride_q_h;
  MlaCache cache;
  const int32_t* page_table;  // [B, max_pages]
  int64_t stride_table_b, max_pages;
  const int32_t* seq_lens;  // [B]
  int64_t batch, new_tokens, heads;
  float scale;

  int64_t rows() const { return new_tokens * heads; }  // r = s * H + h
  int64_t tiles() const { return (rows() + kTileRows - 1) / kTileRows; }
  // Rows of every tile but the last: as equal as whole panels can be.
  int64_t tile_rows() const {
    const int64_t even = (rows() + tiles() - 1) / tiles();
    return std::min(rows(), (even + kPanel - 1) / kPanel * kPanel);
  }
  int64_t value_panels() const { return (cache.rank + kPanel - 1) / kPanel; }

  int64_t length(int64_t b) const {
    return std::clamp<int64_t>(seq_lens[b], 0, max_pages * cache.page_size);
  }
  const int32_t* pages(int64_t b) const { return page_table + b * stride_table_b; }
};

// What a tile of rows has of a split: weighted sums of values and what they are relative to.
struct Partial {
  float* sums;       // [value panel][tile_rows][kPanel]
  Softmax* softmax;  // [panel of rows]

  // Floats of one; `softmax` follows `sums`.
  static int64_t floats(const MlaCall& call) {
    const int64_t panels = (call.tile_rows() + kPanel - 1) / kPanel;
    return call.value_panels() * call.tile_rows() * kPanel +
           panels * static_cast<int64_t>(sizeof(Softmax) / sizeof(float));
  }
  static Partial at(const MlaCall& call, float* place) {
    float* softmax = place + call.value_panels() * call.tile_rows() * kPanel;
    return {place, reinterpret_cast<Softmax*>(softmax)};
  }
};

// What a thread needs beside its results.
template <class E>
struct MlaWorkspace {
  using O = Operand<E>;
  static constexpr int64_t kStride = kBlockKeys + kDepth;  // no power of two: rows in other sets

  explicit MlaWorkspace(const MlaCall& call)
      : depth(padded_depth<O>(call.cache.rank + call.cache.rope)),
        panels((call.tile_rows() + kPanel - 1) / kPanel),
        queries(panels * kPanel * depth),
        scores(panels * kPanel * kBlockKeys),
        weights(panels * kPanel * kStride),
        values(kPanel * kBlockKeys),
        dense(call.cache.in_place<E>() ? 0 : kBlockKeys * depth),
        packed(kPanel * (call.cache.rank + call.cache.rope)),
        visible(panels * kPanel) {}

  const int64_t depth, panels;
  Buffer<O> queries;     // [panel][depth][kPanel], packed
  Buffer<float> scores;  // [panel][kBlockKeys][kPanel]
  Buffer<O> weights;     // [row][kStride]
  Buffer<O> values;      // [kBlockKeys][kPanel], packed
  Buffer<O> dense;       // [kBlockKeys][depth], what cannot be read in place
  Buffer<E> packed;      // [kPanel][C+R]
  Buffer<int32_t> visible;
};

// Packs the query rows first_row .. + rows as columns.
template <class E>
void pack_queries(MlaWorkspace<E>& work, const MlaCall& call, int64_t b, int64_t first_row,
                  int64_t rows) {
  const int64_t width = call.cache.rank + call.cache.rope;
  for (int64_t panel = 0; panel < work.panels; ++panel) {
    const int64_t first = first_row + panel * kPanel;
    const int64_t columns = std::clamp<int64_t>(first_row + rows - first, 0, kPanel);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t s = (first + i) / call.heads, h = (first + i) % call.heads;
      const E* row = static_cast<const E*>(call.q) + b * call.stride_q_b + s * call.stride_q_s +
                     h * call.stride_q_h;
      std::memcpy(work.packed.get() + i * width, row, static_cast<size_t>(width) * sizeof(E));
    }
    pack_rows_as_columns(work.queries.get() + panel * work.depth * kPanel, work.packed.get(), width,
                         columns, width);
  }
}

// Adds the tokens of a block to a partial result; the first block of a split begins it.
template <class E>
void attend_block(const Partial& partial, MlaWorkspace<E>& work, const MlaCall& call,
                  const KeyBlock<E>& block, int64_t rows, const int32_t* visible, bool begins) {
  using O = Operand<E>;
  const int64_t keys = block.keys();
  for (int64_t key = 0; key < keys; key += kGroup) {
    for (int64_t panel = 0; panel < work.panels; ++panel) {
      multiply(work.scores.get() + (panel * kBlockKeys + key) * kPanel, kPanel, block.group(key),
               block.stride(), work.queries.get() + panel * work.depth * kPanel,
               std::min<int64_t>(kGroup, keys - key), work.depth, false);
    }
  }
  for (int64_t panel = 0; panel < work.panels; ++panel) {
    partial.softmax[panel].add(work.weights.get() + panel * kPanel * work.kStride, work.kStride,
                               work.scores.get() + panel * kBlockKeys * kPanel, keys, call.scale,
                               visible ? visible + panel * kPanel : nullptr);
  }
  for (int64_t column = 0; column < call.cache.rank; column += kPanel) {
    const int64_t columns = std::min<int64_t>(kPanel, call.cache.rank - column);
    for (int64_t key = 0; key < keys; key += kGroup) {
      pack_rows(work.values.get() + key * kPanel,
                reinterpret_cast<const O*>(block.group(key)) + column, block.stride(), columns,
                std::min<int64_t>(kGroup, keys - key));
    }
    float* sums = partial.sums + column * call.tile_rows();
    if (!begins) {
      for (int64_t panel = 0; panel < work.panels; ++panel) {
        partial.softmax[panel].fade_rows(sums + panel * kPanel * kPanel, kPanel,
                                         std::min<int64_t>(kPanel, rows - panel * kPanel), kPanel);
      }
    }
    multiply(sums, kPanel, work.weights.get(), work.kStride, work.values.get(), rows,
             padded_depth<O>(keys), !begins);
  }
}

// The rows first_row .. + rows of sequence b over the tokens first .. last - 1; NaN if one of them
// is in no page of the cache.
template <class E>
void attend_split(const Partial& partial, MlaWorkspace<E>& work, const MlaCall& call, int64_t b,
                  int64_t first_row, int64_t rows, int64_t first, int64_t last) {
  const int32_t* pages = call.pages(b);
  std::fill_n(partial.softmax, work.panels, Softmax());
  if (first >= last || !call.cache.holds(pages, first, last)) {
    for (int64_t panel = 0; panel < work.panels && first < last; ++panel) {
      std::fill_n(partial.softmax[panel].total, kPanel, __builtin_nanf(""));
    }
    std::fill_n(partial.sums, call.value_panels() * call.tile_rows() * kPanel, 0.0f);
    return;
  }
  pack_queries(work, call, b, first_row, rows);
  const int64_t hidden_from = call.length(b) - (call.new_tokens - 1);
  for (int64_t at = first; at < last; at += kBlockKeys) {
    const int64_t keys = std::min(kBlockKeys, last - at);
    const KeyBlock<E> block(call.cache, pages, at, keys,
                            call.cache.in_place<E>() ? nullptr : work.dense.get());
    const bool causal = at + keys > hidden_from;
    if (causal) {
      for (int64_t i = 0; i < work.panels * kPanel; ++i) {
        const int64_t s = std::min(call.new_tokens - 1, (first_row + i) / call.heads);
        work.visible[i] = static_cast<int32_t>(std::clamp<int64_t>(hidden_from + s - at, 0, keys));
      }
    }
    attend_block(partial, work, call, block, rows, causal ? work.visible.get() : nullptr,
                 at == first);
  }
}

}  // namespace kimi::KIMI_ISA
