// y = x + the learned table resampled to (h, w) by separable bicubic convolution + in a clip the
// frame's [sin(f w_i) | cos(f w_i)], w_i = 10000^(-2i / width).
//
// An item is a part of a row of an entry, the same in all of its frames: the position of a place is
// resampled once and added to every frame. Going along a row, the four table rows are joined at one
// column at a time, and the last four joined columns are kept: neighbouring places share them.
// About 16 to 32 operations an element where the table is finer, 8 where it is coarser. An entry of
// the table's own size takes the table as it is.
#include <cmath>

#include "cpu/grid.h"
#include "cpu/math.h"

namespace kimi::KIMI_ISA {
namespace {

// Four neighbouring places of a table of `size`, from `base` on, and their weights.
struct Taps {
  int64_t base;
  float weight[4];

  Taps(int64_t index, int64_t count, int64_t size) {
    constexpr double kA = -0.75;  // of the cubic convolution; torch's and the model's choice
    const double scale = static_cast<double>(size) / static_cast<double>(count);
    const double source = (static_cast<double>(index) + 0.5) * scale - 0.5;
    const double floor = std::floor(source);
    base = static_cast<int64_t>(floor) - 1;
    for (int i = 0; i < 4; ++i) {
      const double d = std::abs(source - (floor - 1 + i));
      const double near = ((kA + 2) * d - (kA + 3)) * d * d + 1;
      const double far = ((kA * d - 5 * kA) * d + 8 * kA) * d - 4 * kA;
      weight[i] = static_cast<float>(d <= 1 ? near : far);
    }
  }
};

template <class E>
struct Call {
  E* y;            // [length, width]
  const E* x;      // [length, width]
  const E* table;  // [rows, columns, width]
  int64_t stride_x, stride_row, stride_column;
  int64_t length, rows, columns, width;
  int64_t places;  // of an item at most

  // Items of a row: of its columns that can be there.
  int64_t parts(const Entry& entry) const {
    return (std::min(entry.w, length) + places - 1) / places;
  }

  // What a thread has of its own: the last four joined columns, the positions of an item's places,
  // the frame's sinusoid.
  struct Own {
    Buffer<float> joined, positions, time;
    int64_t column[4];

    Own(int64_t width, int64_t places)
        : joined(4 * width), positions(places * width), time(width) {}
  };

  // position[width] of a place: four joined columns by their weights.
  void resample(float* position, Own& own, const Taps& row, const Taps& column) const {
    const float* from[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t at = column.base + i, slot = at & 3;
      float* joined = own.joined.get() + slot * width;
      if (own.column[slot] != at) join(joined, row, std::clamp<int64_t>(at, 0, columns - 1));
      own.column[slot] = at;
      from[i] = joined;
    }
    for_each_piece(width, [&](int64_t d, auto n) {
      F total = column.weight[0] * load_piece(from[0] + d, n);
      for (int i = 1; i < 4; ++i) total += column.weight[i] * load_piece(from[i] + d, n);
      store_piece(position + d, total, n);
    });
  }

  void join(float* joined, const Taps& row, int64_t column) const {
    const E* from[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t at = std::clamp<int64_t>(row.base + i, 0, rows - 1);
      from[i] = table + at * stride_row + column * stride_column;
    }
    for_each_piece(width, [&](int64_t d, auto n) {
      F total = row.weight[0] * load_piece(from[0] + d, n);
      for (int i = 1; i < 4; ++i) total += row.weight[i] * load_piece(from[i] + d, n);
      store_piece(joined + d, total, n);
    });
  }

  // sin(frame * omega[i]), then cos.
  void sinusoid(float* time, const float* omega, int64_t frame) const {
    const int64_t half = width / 2;
    for_each_piece(half, [&](int64_t i, auto n) {
      F s, c;
      sine_cosine(static_cast<float>(frame) * load_piece(omega + i, n), s, c);
      store_piece(time + i, s, n);
      store_piece(time + half + i, c, n);
    });
  }

  // One patch, where `position` is resampled (floats) or of the table itself.
  template <class P>
  void add(int64_t patch, const P* position, const float* time) const {
    const E* from = x + patch * stride_x;
    E* to = y + patch * width;
    for_each_piece(width, [&](int64_t d, auto n) {
      F total = load_piece(position + d, n);
      if (time != nullptr) total += load_piece(time + d, n);
      store_piece(to + d, load_piece(from + d, n) + total, n);
    });
  }

  void resample_places(Own& own, const Entry& entry, int64_t row, int64_t first,
                       int64_t count) const {
    const Taps row_taps(row, entry.h, rows);
    std::fill(own.column, own.column + 4, INT64_MIN);
    for (int64_t i = 0; i < count; ++i) {
      resample(own.positions.get() + i * width, own, row_taps, Taps(first + i, entry.w, columns));
    }
  }

  void run_item(const Entry& entry, int64_t item, const float* omega, Own& own) const {
    const int64_t row = item / parts(entry), first = item % parts(entry) * places;
    if (entry.patch(0, row, first) >= length) return;
    const int64_t count = std::min({places, entry.w - first, length - entry.patch(0, row, first)});
    const bool own_size = entry.h == rows && entry.w == columns;
    if (!own_size) resample_places(own, entry, row, first, count);
    for (int64_t frame = 0; frame < entry.t; ++frame) {
      const int64_t patch = entry.patch(frame, row, first);
      if (patch >= length) break;
      const float* time = entry.t > 1 ? own.time.get() : nullptr;
      if (entry.t > 1) sinusoid(own.time.get(), omega, frame);
      for (int64_t i = 0; i < std::min(count, length - patch); ++i) {
        if (own_size) {
          add(patch + i, table + row * stride_row + (first + i) * stride_column, time);
        } else {
          add(patch + i, own.positions.get() + i * width, time);
        }
      }
    }
  }

  void run(const kimi_team* team, const Grid& grid) const {
    const Buffer<float> omega(width / 2);
    for (int64_t i = 0; i < width / 2; ++i) {
      const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(width);
      omega[i] = static_cast<float>(std::pow(10000.0, exponent));
    }
    run_items(team, grid.items(), [&](Items& items) {
      Own own(width, places);
      for (int64_t item; items.take(item);) {
        const Entry& entry = grid.of_item(item);
        run_item(entry, item - entry.items, omega.get(), own);
      }
    });
    for (int64_t patch = grid.patches(); patch < length; ++patch) {
      std::copy(x + patch * stride_x, x + patch * stride_x + width, y + patch * width);
    }
  }
};

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(vision_pos_embed)(const kimi_team* team, int64_t dtype, void* y,
                                           const void* x, int64_t stride_x, const void* table,
                                           int64_t stride_row, int64_t stride_column,
                                           const void* grid_thws, int64_t grid_bytes,
                                           int64_t entries, int64_t length, int64_t rows,
                                           int64_t columns, int64_t width) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    // Positions of an item are to stay in the second-level cache.
    const int64_t places = std::clamp<int64_t>(65536 / width, 1, 64);
    // An entry's items are those that begin with a patch that is there.
    const Grid grid({grid_thws, grid_bytes}, entries, length, [&](const Entry& entry) {
      const int64_t parts = (std::min(entry.w, length) + places - 1) / places;
      const int64_t there = std::min(entry.h * entry.w, length - entry.start);
      return (there + entry.w - 1) / entry.w * parts;
    });
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      Call<E>{static_cast<E*>(y),
              static_cast<const E*>(x),
              static_cast<const E*>(table),
              stride_x,
              stride_row,
              stride_column,
              length,
              rows,
              columns,
              width,
              places}
          .run(team, grid);
    });
  });
}
