// Pictures and clips packed one after the other: which patches an entry (t, h, w) has, and where.
//
// Patches of an entry come in frame, row, column order. What the numbers say is bounded by the
// patches that there are; an entry with a number below 1, or too many patches to count, has none.
#pragma once

#include <algorithm>

#include "cpu/indices.h"
#include "cpu/parallel.h"

namespace kimi::KIMI_ISA {

struct Entry {
  int64_t start, t, h, w;  // first patch; sizes
  int64_t items;           // of work before it, as `Grid` was told

  int64_t patch(int64_t frame, int64_t row, int64_t column) const {
    return start + (frame * h + row) * w + column;
  }
};

class Grid {
 public:
  // Of grid_thws[count][3] and `length` patches. items(entry) is how much work an entry makes.
  template <class Items>
  Grid(Indices thws, int64_t count, int64_t length, const Items& items) : entries_(count) {
    for (int64_t i = 0; i < count; ++i) {
      Entry entry{patches_, thws[3 * i], thws[3 * i + 1], thws[3 * i + 2], items_};
      int64_t plane, patches;
      if (entry.t < 1 || entry.h < 1 || entry.w < 1 ||
          __builtin_mul_overflow(entry.h, entry.w, &plane) ||
          __builtin_mul_overflow(plane, entry.t, &patches) || patches > kMost) {
        continue;
      }
      patches_ += std::min(patches, length - patches_);
      items_ += std::min(items(entry), kMost - items_);
      entries_[kept_++] = entry;
    }
  }

  int64_t patches() const { return patches_; }  // of all entries that there are
  int64_t items() const { return items_; }
  const Entry* begin() const { return entries_.get(); }
  const Entry* end() const { return entries_.get() + kept_; }

  // The entry that an item belongs to.
  const Entry& of_item(int64_t item) const {
    return *(std::upper_bound(begin(), end(), item,
                              [](int64_t i, const Entry& entry) { return i < entry.items; }) -
             1);
  }

 private:
  static constexpr int64_t kMost = int64_t{1} << 61;  // what can be added up without overflow

  const Buffer<Entry> entries_;
  int64_t kept_ = 0, patches_ = 0, items_ = 0;
};

}  // namespace kimi::KIMI_ISA
