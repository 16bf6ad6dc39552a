// y = x W^T, W of int4 in groups of 32.
//
// Items are tiles of 32 rows of W. With few tokens each row meets every token's x (int4.h); with
// more the tile is unpacked once for all panels of 32 tokens (int4_many.h). x is rearranged or
// packed before, by all threads. Tokens beyond 1,024 go in turns, so that the workspace stays
// small.
//
// Bytes: W and its scales once for every 1,024 tokens. FLOP: 2 * tokens * rows * columns.
#include <vector>

#include "cpu/int4_many.h"
#include "cpu/parallel.h"

namespace kimi::KIMI_ISA {
namespace {

template <class E>
struct Linear {
  using O = Int4Operand<E>;

  const kimi_team* team;
  E* y;  // [tokens, weight_rows]
  const E* x;
  int64_t stride_x, tokens, weight_rows, columns;
  Int4Rows weights;

  void few() const {
    const int64_t size = arranged_size<O>(columns);
    const Buffer<O> arranged(tokens * size);
    for_each_item(team, tokens, [&](int64_t t) {
      arrange(arranged.get() + t * size, x + t * stride_x, columns);
    });
    run_items(team, (weight_rows + kTileRows - 1) / kTileRows, [&](Items& items) {
      const Buffer<float> scales(kMostRowsTogether * weights.groups);
      for (int64_t item; items.take(item);) {
        const int64_t first = item * kTileRows, last = std::min(weight_rows, first + kTileRows);
        for_few(tokens, [&]<int T>(std::integral_constant<int, T>, int64_t from) {
          const O* xs[T];
          for (int t = 0; t < T; ++t) xs[t] = arranged.get() + (from + t) * size;
          for_parts<kRowsTogether<T>>(first, last, [&]<int P>(const int64_t (&rows)[P]) {
            float products[P][T];
            dot_rows<P, T>(products, weights, rows, xs, scales.get());
            for (int t = 0; t < T; ++t) {
              for (int p = 0; p < P; ++p) {
                y[(from + t) * weight_rows + rows[p]] = narrow<E>(products[p][t]);
              }
            }
          });
        });
      }
    });
  }

  void many() const {
    const int64_t panels = (tokens + kPanel - 1) / kPanel;
    const Buffer<O> packed(panels * kPanel * columns);
    std::vector<int32_t> numbers(static_cast<size_t>(tokens));
    for (int64_t t = 0; t < tokens; ++t) numbers[t] = static_cast<int32_t>(t);
    for_each_item(team, panels, [&](int64_t p) {
      pack_tokens(packed.get() + p * kPanel * columns, x, stride_x, numbers.data() + p * kPanel,
                  std::min<int64_t>(kPanel, tokens - p * kPanel), columns);
    });
    run_items(team, (weight_rows + kTileRows - 1) / kTileRows, [&](Items& items) {
      const Tiles tiles;
      const Buffer<float> scales(kTileRows * weights.groups), results((panels + 1) * kTileSize);
      const Buffer<O> scratch(kScratch);
      std::fill_n(scratch.get(), kScratch, O{});
      for (int64_t item; items.take(item);) {
        const int64_t row = item * kTileRows, rows = std::min(kTileRows, weight_rows - row);
        for (int64_t r = 0; r < rows; ++r) {
          weights.scales(scales.get() + r * weights.groups, row + r);
        }
        // Rows past the end are those of some other tile: nobody looks at their products.
        auto fill = [&](O* to, int64_t stride_row, int64_t stride_group, int64_t, int64_t first,
                        int64_t last) {
          unpack_rows(to, stride_row, stride_group, weights, row, rows, first, last, scales.get(),
                      -1);
        };
        multiply_panels(results.get(), packed.get(), tokens, columns, 1, scratch.get(), fill);
        float* turned = results.get() + panels * kTileSize;
        for (int64_t p = 0; p < panels; ++p) {
          transpose_words(reinterpret_cast<uint32_t*>(turned),
                          reinterpret_cast<const uint32_t*>(results.get() + p * kTileSize), kPanel,
                          kTileRows, kPanel);
          for (int64_t t = p * kPanel; t < std::min(tokens, (p + 1) * kPanel); ++t) {
            const float* from = turned + t % kPanel * kPanel;
            for_each_piece(rows, [&](int64_t i, auto n) {
              store_piece(y + t * weight_rows + row + i, load_piece(from + i, n), n);
            });
          }
        }
      }
    });
  }
};

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(int4_linear)(const kimi_team* team, int64_t dtype, void* y, const void* x,
                                      const void* packed, const void* scale, int64_t tokens,
                                      int64_t rows, int64_t columns, int64_t stride_x,
                                      int64_t stride_packed, int64_t stride_scale,
                                      int64_t scale_dtype, int64_t one_path) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    const Int4Rows weights{static_cast<const uint32_t*>(packed),
                           stride_packed,
                           scale,
                           stride_scale,
                           scale_dtype,
                           columns / kGroup};
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      constexpr int64_t kMost = 32 * kPanel;
      for (int64_t first = 0; first < tokens; first += kMost) {
        const Linear<E> linear{.team = team,
                               .y = static_cast<E*>(y) + first * rows,
                               .x = static_cast<const E*>(x) + first * stride_x,
                               .stride_x = stride_x,
                               .tokens = std::min(kMost, tokens - first),
                               .weight_rows = rows,
                               .columns = columns,
                               .weights = weights};
        if (one_path == 0 && tokens <= kFewTokens) {
          linear.few();
        } else {
          linear.many();
        }
      }
    });
  });
}
