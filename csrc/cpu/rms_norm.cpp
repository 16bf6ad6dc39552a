// y = x / sqrt(mean(x^2) + eps) * weight, statistics in float32.
#include "cpu/parallel.h"
#include "cpu/row_norm.h"

namespace kimi::KIMI_ISA {
namespace {

template <class E>
void rms_norm(const kimi_team* team, E* y, const E* x, const kimi_rows& rows_x, const E* weight,
              int64_t rows, int64_t width, float eps) {
  for_each_range(team, rows, rows_at_once(width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      rms_norm_row(y + row * width, x + row_start(rows_x, row), weight, width, eps);
    }
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
      rms_norm(team, static_cast<E*>(y), static_cast<const E*>(x), rows_x,
               static_cast<const E*>(weight), rows, width, eps);
    });
  });
}
