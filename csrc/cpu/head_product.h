// Products of every head's rows with the head's own matrix: y[t][h] = x[t][h] . w[h].
//
// With few tokens the weights are the work, 8.4 MB for 64 heads: they are read once, front to back,
// multiplied as vectors. With more, a panel of kPanel columns of one head is packed for multiply()
// and serves all tokens. An item is a head and kItemColumns columns.
#pragma once

#include "cpu/math.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"

namespace kimi::KIMI_ISA {

inline constexpr int64_t kItemColumns = 128;
inline constexpr int64_t kFewTokens = 3;    // up to so many, weights are not packed
inline constexpr int64_t kTokenBlock = 64;  // tokens of a product

// Strides in elements; last dimensions are dense.
struct HeadProduct {
  void* y;  // [T, H, columns]
  int64_t stride_y_t, stride_y_h;
  const void* x;  // [T, H, depth]
  int64_t stride_x_t, stride_x_h;
  const void* w;  // [H, depth, columns], or [H, columns, depth] if `turned`
  int64_t stride_w_h, stride_w_row;
  bool turned;
  int64_t tokens, heads, columns, depth;
  bool one_path;  // the same order of sums for any number of tokens

  int64_t items() const { return heads * ((columns + kItemColumns - 1) / kItemColumns); }
};

// What the low and the high halves of W words of bfloat16 are.
inline F low_bf16(U words) { return (F)(words << 16); }
inline F high_bf16(U words) { return (F)(words & 0xffff0000u); }
inline U load_words(const bf16* p) {
  U words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// y[columns] = x[depth] w[depth][columns], columns a multiple of 8 W.
inline void few_rows(bf16* y, const bf16* x, const bf16* w, int64_t stride_w, int64_t columns,
                     int64_t depth) {
  constexpr int kWords = 4;
  for (int64_t column = 0; column < columns; column += 2 * W * kWords) {
    F low[kWords] = {}, high[kWords] = {};
    for (int64_t i = 0; i < depth; ++i) {
      const F factor = splat(widen(x[i]));
      for (int j = 0; j < kWords; ++j) {
        const U words = load_words(w + i * stride_w + column + j * 2 * W);
        __builtin_prefetch(w + (i + 16) * stride_w + column + j * 2 * W);
        low[j] += factor * low_bf16(words);
        high[j] += factor * high_bf16(words);
      }
    }
    for (int j = 0; j < kWords; ++j) {
      const U even = __builtin_convertvector(narrow_bf16(low[j]), U);
      const U words = even | __builtin_convertvector(narrow_bf16(high[j]), U) << 16;
      std::memcpy(y + column + j * 2 * W, &words, sizeof words);
    }
  }
}

// y[columns] = w[columns][depth] x[depth], depth a multiple of 2 W.
inline void few_rows_turned(bf16* y, const bf16* x, const bf16* w, int64_t stride_w,
                            int64_t columns, int64_t depth) {
  constexpr int kRowsAtOnce = 4;
  int64_t column = 0;
  auto dot = [&]<int R>(std::integral_constant<int, R>) {
    for (; column + R <= columns; column += R) {
      F low[R] = {}, high[R] = {};
      for (int64_t i = 0; i < depth; i += 2 * W) {
        const U factors = load_words(x + i);
        for (int r = 0; r < R; ++r) {
          const U words = load_words(w + (column + r) * stride_w + i);
          __builtin_prefetch(w + (column + r + 2 * R) * stride_w + i);
          low[r] += low_bf16(factors) * low_bf16(words);
          high[r] += high_bf16(factors) * high_bf16(words);
        }
      }
      for (int r = 0; r < R; ++r) y[column + r] = narrow<bf16>(sum(low[r] + high[r]));
    }
  };
  dot(std::integral_constant<int, kRowsAtOnce>());
  dot(std::integral_constant<int, 1>());
}

// What a thread needs for the items of many tokens.
template <class E>
struct HeadWorkspace {
  using O = Operand<E>;
  explicit HeadWorkspace(const HeadProduct& p)
      : depth(padded_depth<O>(p.depth)),
        in_place(std::is_same_v<E, O> && depth == p.depth),
        panels(kItemColumns * depth),
        rows(in_place ? 0 : kTokenBlock * depth),
        sums(kTokenBlock * kPanel) {}

  const int64_t depth;
  const bool in_place;  // x is an operand where it is
  Buffer<O> panels;     // [panel][depth][kPanel]
  Buffer<O> rows;       // [kTokenBlock][depth]
  Buffer<float> sums;   // [kTokenBlock][kPanel]
};

// Columns first .. + columns of one head for all tokens.
template <class E>
void many_tokens(HeadWorkspace<E>& work, const HeadProduct& p, int64_t head, int64_t first,
                 int64_t columns) {
  using O = Operand<E>;
  const E* w = static_cast<const E*>(p.w) + head * p.stride_w_h;
  const E* x = static_cast<const E*>(p.x) + head * p.stride_x_h;
  E* y = static_cast<E*>(p.y) + head * p.stride_y_h + first;
  for (int64_t i = 0; i < columns; i += kPanel) {
    O* panel = work.panels.get() + i * work.depth;
    const int64_t width = std::min<int64_t>(kPanel, columns - i);
    if (p.turned) {
      pack_rows_as_columns(panel, w + (first + i) * p.stride_w_row, p.stride_w_row, width, p.depth);
    } else {
      pack_rows(panel, w + first + i, p.stride_w_row, width, p.depth);
    }
  }
  for (int64_t token = 0; token < p.tokens; token += kTokenBlock) {
    const int64_t tokens = std::min(kTokenBlock, p.tokens - token);
    const O* rows = work.rows.get();
    int64_t stride = work.depth;
    if constexpr (std::is_same_v<E, O>) {
      if (work.in_place) rows = x + token * p.stride_x_t, stride = p.stride_x_t;
    }
    for (int64_t t = 0; t < tokens && !work.in_place; ++t) {
      O* to = &work.rows[t * work.depth];
      const E* from = x + (token + t) * p.stride_x_t;
      for (int64_t i = p.depth; i < work.depth; ++i) to[i] = O{};
      for_each_piece(p.depth,
                     [&](int64_t i, auto n) { store_piece(to + i, load_piece(from + i, n), n); });
    }
    for (int64_t i = 0; i < columns; i += kPanel) {
      multiply(work.sums.get(), kPanel, rows, stride, work.panels.get() + i * work.depth, tokens,
               work.depth, false);
      const int64_t width = std::min<int64_t>(kPanel, columns - i);
      for (int64_t t = 0; t < tokens; ++t) {
        E* to = y + (token + t) * p.stride_y_t + i;
        for_each_piece(width, [&](int64_t j, auto n) {
          store_piece(to + j, load(&work.sums[t * kPanel + j]), n);
        });
      }
    }
  }
}

// Takes items of p from `first` on until body(item) has had those before it and there are no more.
template <class E, class Body>
void take_head_products(Items& taken, const HeadProduct& p, int64_t first, const Body& before) {
  constexpr bool kVectors = std::is_same_v<E, bf16>;
  const bool few = kVectors && !p.one_path && p.tokens <= kFewTokens &&
                   (p.turned ? p.depth % (2 * W) : p.columns % kItemColumns) == 0;
  const int64_t parts = p.items() / p.heads;
  Tiles tiles;
  HeadWorkspace<E> work(p);
  for (int64_t item; taken.take(item);) {
    if (item < first) {
      before(item);
      continue;
    }
    const int64_t head = (item - first) / parts, column = (item - first) % parts * kItemColumns;
    const int64_t columns = std::min(kItemColumns, p.columns - column);
    if (!few) {
      many_tokens(work, p, head, column, columns);
      continue;
    }
    if constexpr (kVectors) {
      const E* w = static_cast<const E*>(p.w) + head * p.stride_w_h;
      for (int64_t t = 0; t < p.tokens; ++t) {
        const E* x = static_cast<const E*>(p.x) + t * p.stride_x_t + head * p.stride_x_h;
        E* y = static_cast<E*>(p.y) + t * p.stride_y_t + head * p.stride_y_h + column;
        if (p.turned) {
          few_rows_turned(y, x, w + column * p.stride_w_row, p.stride_w_row, columns, p.depth);
        } else {
          few_rows(y, x, w + column, p.stride_w_row, columns, p.depth);
        }
      }
    }
  }
}

}  // namespace kimi::KIMI_ISA
