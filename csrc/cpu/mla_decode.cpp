// out = softmax(scale * q kv^T) kv[:, :C] over a sequence's cached tokens, and lse: mla_attend.h.
#include "cpu/mla_attend.h"

extern "C" int KIMI_NAME(mla_decode)(
    const kimi_team* team, int64_t dtype, void* out, float* lse, const void* q, int64_t stride_q_b,
    int64_t stride_q_s, int64_t stride_q_h, const void* kv_cache, int64_t fp8, int64_t num_pages,
    int64_t page_size, int64_t stride_cache_page, int64_t stride_cache_token,
    const int32_t* page_table, int64_t stride_table_b, int64_t max_pages, const int32_t* seq_lens,
    int64_t batch, int64_t new_tokens, int64_t heads, int64_t rank, int64_t rope, float scale) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      const MlaCache cache = cache_of<E>(kv_cache, fp8, num_pages, page_size, stride_cache_page,
                                         stride_cache_token, rank, rope);
      const MlaCall call = {q,          stride_q_b,     stride_q_s, stride_q_h, cache,
                            page_table, stride_table_b, max_pages,  seq_lens,   batch,
                            new_tokens, heads,          scale};
      attend(team, static_cast<E*>(out), lse, call);
    });
  });
}
