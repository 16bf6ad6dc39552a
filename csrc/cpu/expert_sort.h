// The tables that group chosen (token, expert) pairs by expert: a counting sort, stable.
//
// One thread: 8,192 tokens of 8 are some 200 us, in a layer of a hundred milliseconds and more.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/parallel.h"

namespace kimi::KIMI_ISA {

// order[tokens * top_k] and offsets[local + 1] as the op moe_sort has them, of ids[tokens][top_k]
// for the experts first .. first + local - 1.
inline void sort_by_expert(int32_t* order, int32_t* offsets, const int32_t* ids,
                           const kimi_rows& rows_ids, int64_t tokens, int64_t top_k, int64_t first,
                           int64_t local) {
  // Calls body(expert, pair), the expert counted from `first` on and `local` for all others.
  auto for_each_pair = [&](auto body) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t* row = ids + row_start(rows_ids, t);
      for (int64_t k = 0; k < top_k; ++k) {
        const uint64_t expert = static_cast<uint64_t>(row[k] - first);
        body(std::min(expert, static_cast<uint64_t>(local)), t * top_k + k);
      }
    }
  };
  std::fill(offsets, offsets + local + 1, 0);
  for_each_pair([&](uint64_t expert, int64_t) { ++offsets[expert]; });
  int32_t start = 0;
  for (int64_t e = 0; e <= local; ++e) start += std::exchange(offsets[e], start);
  // Each offset moves on to where the next expert starts.
  for_each_pair([&](uint64_t expert, int64_t pair) {
    order[offsets[expert]++] = static_cast<int32_t>(pair);
  });
  std::copy_backward(offsets, offsets + local, offsets + local + 1);
  offsets[0] = 0;
}

}  // namespace kimi::KIMI_ISA
