// y = x / sqrt(mean(x^2) + eps) * weight, statistics in float32.
//
// An item is a few rows; a row is read twice, the second time from the first-level cache. Bound by
// memory: a row is 2 * width elements of traffic and 3 * width operations.
#include "cpu/parallel.h"
#include "cpu/row_norm.h"

namespace kimi::KIMI_ISA {
namespace {

template <class E, class Stream>
void rms_norm(const kimi_team* team, E* y, const E* x, const kimi_rows& rows_x, const E* weight,
              int64_t rows, int64_t width, float eps, Stream) {
  for_each_range(team, rows, rows_at_once(width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const E* x_row = x + row_start(rows_x, row);
      const E* next = row + 1 < last ? x + row_start(rows_x, row + 1) : nullptr;
      const Factor<E> factor = rms_factor(x_row, width, eps);
      scale_row<Stream::value>(y + row * width, x_row, weight, width, factor, next);
    }
    if constexpr (Stream::value) stream_done();
  });
}

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(rms_norm)(const kimi_team* team, int64_t dtype, void* y, const void* x,
                                   kimi_rows rows_x, const void* weight, int64_t rows,
                                   int64_t width, float eps) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      with_streaming(y, rows, width * static_cast<int64_t>(sizeof(E)), [&](auto stream) {
        rms_norm(team, static_cast<E*>(y), static_cast<const E*>(x), rows_x,
                 static_cast<const E*>(weight), rows, width, eps, stream);
      });
    });
  });
}
