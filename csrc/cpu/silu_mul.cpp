// y = silu(gate) * up with silu(z) = z / (1 + exp(-z)), in float32, rounded once.
//
// An item is a few rows, or a part of a long one: about 64 KiB of float32. Bound by memory: 3 *
// width elements of traffic a row; some 25 operations an element.
#include "cpu/math.h"
#include "cpu/parallel.h"

namespace kimi::KIMI_ISA {
namespace {

constexpr int64_t kColumns = 8192;  // of an item at most

template <class E, class Stream>
void silu_mul(const kimi_team* team, E* y, const E* gate_up, const kimi_rows& rows_gate_up,
              int64_t rows, int64_t width, Stream) {
  const int64_t parts = (width + kColumns - 1) / kColumns;
  const int64_t at_once = std::max<int64_t>(1, kColumns / width);
  for_each_item(team, (rows + at_once - 1) / at_once * parts, [&](int64_t item) {
    const int64_t column = item % parts * kColumns, first = item / parts * at_once;
    const int64_t columns = std::min(kColumns, width - column);
    const int64_t last = std::min(rows, first + at_once);
    for (int64_t row = first; row < last; ++row) {
      const E* gate = gate_up + row_start(rows_gate_up, row) + column;
      const E* up = gate + width;
      E* to = y + row * width + column;
      const E* next =
          row + 1 < last ? gate_up + row_start(rows_gate_up, row + 1) + column : nullptr;
      for_each_piece(columns, [&](int64_t i, auto n) {
        fetch(next, i);
        fetch(next, width + i);
        write_piece<Stream::value>(to + i, silu(load_piece(gate + i, n)) * load_piece(up + i, n),
                                   n);
      });
    }
    if constexpr (Stream::value) stream_done();
  });
}

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(silu_mul)(const kimi_team* team, int64_t dtype, void* y,
                                   const void* gate_up, kimi_rows rows_gate_up, int64_t rows,
                                   int64_t width) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      with_streaming(y, rows, width * static_cast<int64_t>(sizeof(E)), [&](auto stream) {
        silu_mul(team, static_cast<E*>(y), static_cast<const E*>(gate_up), rows_gate_up, rows,
                 width, stream);
      });
    });
  });
}
