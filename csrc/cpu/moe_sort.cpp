// order, offsets = the (token, expert) pairs by expert; see expert_sort.h.
#include "cpu/expert_sort.h"

extern "C" int KIMI_NAME(moe_sort)(const kimi_team*, int32_t* order, int32_t* offsets,
                                   const int32_t* ids, kimi_rows rows_ids, int64_t tokens,
                                   int64_t top_k, int64_t first, int64_t local) {
  using namespace kimi::KIMI_ISA;
  return entry([&] { sort_by_expert(order, offsets, ids, rows_ids, tokens, top_k, first, local); });
}
