// h = x + residual, rounded once; y = h / sqrt(mean(h^2) + eps) * weight, statistics in float32.
//
// An item is a few rows. The first pass over a row adds and sums squares, the second one scales h,
// which then is in the first-level cache. Where h is written past the caches the first pass keeps
// it in a row of the thread's own. Bound by memory: 4 * width elements of traffic a row.
#include "cpu/parallel.h"
#include "cpu/row_norm.h"

namespace kimi::KIMI_ISA {
namespace {

template <class E, class Stream>
void add_rms_norm(const kimi_team* team, E* y, E* h, const E* x, const kimi_rows& rows_x,
                  const E* residual, const kimi_rows& rows_residual, const E* weight, int64_t rows,
                  int64_t width, float eps, Stream) {
  const int64_t at_once = rows_at_once(width);
  run_items(team, (rows + at_once - 1) / at_once, [&](Items& items) {
    const Buffer<E> own(Stream::value ? width : 0);
    for (int64_t item; items.take(item);) {
      const int64_t first = item * at_once, last = std::min(rows, first + at_once);
      for (int64_t row = first; row < last; ++row) {
        const E* x_row = x + row_start(rows_x, row);
        const E* residual_row = residual + row_start(rows_residual, row);
        E* kept = Stream::value ? own.get() : h + row * width;
        const float squares = sum_of_squares(width, [&](int64_t i, auto n) {
          store_piece(kept + i, load_piece(x_row + i, n) + load_piece(residual_row + i, n), n);
          return load_piece(kept + i, n);
        });
        const Factor<E> factor = rms_factor<E>(squares, width, eps);
        const bool more = row + 1 < last;
        const E* next_x = more ? x + row_start(rows_x, row + 1) : nullptr;
        const E* next_residual = more ? residual + row_start(rows_residual, row + 1) : nullptr;
        for_each_piece(width, [&](int64_t i, auto n) {
          fetch(next_x, i);
          fetch(next_residual, i);
          const F v = load_piece(kept + i, n);
          if constexpr (Stream::value) write_piece<true>(h + row * width + i, v, n);
          write_piece<Stream::value>(y + row * width + i, factor * v * load_piece(weight + i, n),
                                     n);
        });
      }
    }
    if constexpr (Stream::value) stream_done();
  });
}

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(add_rms_norm)(const kimi_team* team, int64_t dtype, void* y, void* h,
                                       const void* x, kimi_rows rows_x, const void* residual,
                                       kimi_rows rows_residual, const void* weight, int64_t rows,
                                       int64_t width, float eps) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      with_streaming(y, rows, width * static_cast<int64_t>(sizeof(E)), [&](auto stream) {
        add_rms_norm(team, static_cast<E*>(y), static_cast<E*>(h), static_cast<const E*>(x), rows_x,
                     static_cast<const E*>(residual), rows_residual, static_cast<const E*>(weight),
                     rows, width, eps, stream);
      });
    });
  });
}
