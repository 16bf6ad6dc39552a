// LayerNorm of every patch, mean over the frames of its clip, LayerNorm, and 2 x 2 patches side by
// side in one row: y[token] = (corner 00 | 01 | 10 | 11), tokens of an entry in row order.
//
// An item is a few tokens. A row is widened once into the thread's own float32 row; mean and
// variance take a pass each (a variance from sums of squares would cancel), with 64 partial sums as
// in row_norm.h. Weights are widened once. Bound by memory for one frame: x is read, y written
// once.
#include <cmath>

#include "cpu/grid.h"
#include "cpu/math.h"

namespace kimi::KIMI_ISA {
namespace {

// The sum of value(i, n) over a row in 64 partial sums.
template <class Value>
float sum_of(int64_t width, const Value& value) {
  constexpr int kVectors = 64 / W;
  F total[kVectors] = {};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
    for (int j = 0; j < kVectors; ++j) {
      total[j] += value(i + j * W, std::integral_constant<int64_t, W>());
    }
  }
  for_each_piece(width - i, [&](int64_t j, auto n) { total[j / W] += value(i + j, n); });
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) total[j] += total[j + half];
  }
  return sum(total[0]);
}

// What (x - mean) is multiplied by, of a row whose sum is `total`; the mean too.
float layer_factor(const float* x, int64_t width, float total, float eps, float& mean) {
  mean = total / static_cast<float>(width);
  const F middle = splat(mean);
  const float squares = sum_of(width, [&](int64_t i, auto n) {
    F d = load_piece(x + i, n) - middle;
    if constexpr (std::is_same_v<decltype(n), int64_t>) {
      for (int64_t lane = n; lane < W; ++lane) d[lane] = 0.0f;  // not -mean
    }
    return d * d;
  });
  return static_cast<float>(
      1.0 / std::sqrt(static_cast<double>(squares) / static_cast<double>(width) + eps));
}

template <class E>
struct Call {
  E* y;        // [tokens, 4, width]
  const E* x;  // [length, width]
  int64_t stride_x, length, tokens, width;
  const float *final_weight, *final_bias, *pre_weight, *pre_bias;  // [width]
  float eps;

  // mean(+)= the final norm of a patch over `frames`, in merged; returns the sum of merged. `row`
  // is the thread's own.
  float add_frame(float* merged, float* row, const E* patch, bool first, float share,
                  const E* next) const {
    const float total = sum_of(width, [&](int64_t i, auto n) {
      const F v = load_piece(patch + i, n);
      store_piece(row + i, v, n);
      return v;
    });
    float mean;
    const F factor = splat(layer_factor(row, width, total, eps, mean)), middle = splat(mean);
    return sum_of(width, [&](int64_t i, auto n) {
      fetch(next, i);
      const F normal = (load_piece(row + i, n) - middle) * factor;
      const F v =
          (normal * load_piece(final_weight + i, n) + load_piece(final_bias + i, n)) * share;
      const F all = first ? v : load_piece(merged + i, n) + v;
      store_piece(merged + i, all, n);
      return all;
    });
  }

  template <bool kStream>
  void merge(E* to, const Entry& entry, int64_t row, int64_t column, float* own,
             const E* next) const {
    float* merged = own + width;
    const int64_t plane = entry.h * entry.w;
    const float share = 1.0f / static_cast<float>(entry.t);
    float total = 0.0f;
    bool first = true;
    for (int64_t at = entry.patch(0, row, column), f = 0; f < entry.t && at < length;
         ++f, at += plane) {
      total = add_frame(merged, own, x + at * stride_x, first, share, next);
      first = false;
    }
    if (first) std::fill(merged, merged + width, 0.0f);
    float mean;
    const F factor = splat(layer_factor(merged, width, total, eps, mean)), middle = splat(mean);
    for_each_piece(width, [&](int64_t i, auto n) {
      const F normal = (load_piece(merged + i, n) - middle) * factor;
      write_piece<kStream>(to + i,
                           normal * load_piece(pre_weight + i, n) + load_piece(pre_bias + i, n), n);
    });
  }

  template <class Stream>
  void run(const kimi_team* team, const Grid& grid, Stream) const {
    constexpr int64_t kElements = 16384;  // of an item, about
    const int64_t at_once = 1 + kElements / (4 * width);
    run_items(team, (tokens + at_once - 1) / at_once, [&](Items& items) {
      const Buffer<float> own(2 * width);
      for (int64_t item; items.take(item);) {
        const int64_t last = std::min(tokens, (item + 1) * at_once);
        for (int64_t token = item * at_once; token < last; ++token) {
          E* to = y + token * 4 * width;
          if (token >= grid.items()) {
            std::fill(to, to + 4 * width, E{});
            continue;
          }
          const Entry& entry = grid.of_item(token);
          const int64_t place = token - entry.items, columns = entry.w / 2;
          const int64_t row = place / columns * 2, column = place % columns * 2;
          for (int64_t corner = 0; corner < 4; ++corner) {
            const int64_t ahead = corner + 1;  // the last one is the next token's first
            const int64_t coming = ahead == 4 ? entry.patch(0, row, column + 2)
                                              : entry.patch(0, row + ahead / 2, column + ahead % 2);
            const E* next = coming < length ? x + coming * stride_x : nullptr;
            merge<Stream::value>(to + corner * width, entry, row + corner / 2, column + corner % 2,
                                 own.get(), next);
          }
        }
      }
      if constexpr (Stream::value) stream_done();
    });
  }
};

template <class E>
Buffer<float> widened(const void* from, int64_t count) {
  Buffer<float> to(count);
  for_each_piece(count, [&](int64_t i, auto n) {
    store_piece(to.get() + i, load_piece(static_cast<const E*>(from) + i, n), n);
  });
  return to;
}

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(patch_merge)(const kimi_team* team, int64_t dtype, void* y, const void* x,
                                      int64_t stride_x, const void* grid_thws, int64_t grid_bytes,
                                      int64_t entries, const void* final_weight,
                                      const void* final_bias, const void* pre_weight,
                                      const void* pre_bias, int64_t length, int64_t merged_length,
                                      int64_t width, float eps) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    // An entry's items are its tokens; those of patches that are not there count too.
    const Grid grid({grid_thws, grid_bytes}, entries, length,
                    [](const Entry& entry) { return (entry.h / 2) * (entry.w / 2); });
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      const auto fw = widened<E>(final_weight, width), fb = widened<E>(final_bias, width);
      const auto pw = widened<E>(pre_weight, width), pb = widened<E>(pre_bias, width);
      const Call<E> call{static_cast<E*>(y),
                         static_cast<const E*>(x),
                         stride_x,
                         length,
                         merged_length,
                         width,
                         fw.get(),
                         fb.get(),
                         pw.get(),
                         pb.get(),
                         eps};
      with_streaming(y, 4 * merged_length, width * static_cast<int64_t>(sizeof(E)),
                     [&](auto stream) { call.run(team, grid, stream); });
    });
  });
}
