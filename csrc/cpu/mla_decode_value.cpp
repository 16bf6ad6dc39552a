// value[b, s, h] = w_uv[h] @ mla_decode(...)[b, s, h]: the stages of mla_attend.h, then
// head_product.h on their result, rounded in between. Sequences are taken as many at a time as
// kLatentBytes of results hold.
#include "cpu/head_product.h"
#include "cpu/mla_attend.h"

namespace kimi::KIMI_ISA {
namespace {

constexpr int64_t kLatentBytes = int64_t{16} << 20;

template <class E>
void attend_and_project(const kimi_team* team, E* value, const MlaCall& all, const E* w_uv,
                        int64_t stride_w_h, int64_t stride_w_v, int64_t width, bool one_path) {
  const int64_t rank = all.cache.rank, heads = all.heads;
  const int64_t bytes = all.rows() * rank * static_cast<int64_t>(sizeof(E));
  const int64_t most = std::clamp<int64_t>(kLatentBytes / bytes, 1, all.batch);
  const Buffer<E> latent(most * all.rows() * rank);
  for (int64_t first = 0; first < all.batch; first += most) {
    MlaCall call = all;
    call.batch = std::min(most, all.batch - first);
    call.q = static_cast<const E*>(all.q) + first * all.stride_q_b;
    call.page_table += first * all.stride_table_b;
    call.seq_lens += first;
    attend<E>(team, latent.get(), nullptr, call);
    const HeadProduct product = {value + first * all.rows() * width,
                                 heads * width,
                                 width,
                                 latent.get(),
                                 heads * rank,
                                 rank,
                                 w_uv,
                                 stride_w_h,
                                 stride_w_v,
                                 true,
                                 call.batch * all.new_tokens,
                                 heads,
                                 width,
                                 rank,
                                 one_path};
    run_items(team, product.items(),
              [&](Items& items) { take_head_products<E>(items, product, 0, [](int64_t) {}); });
  }
}

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(mla_decode_value)(
    const kimi_team* team, int64_t dtype, void* value, const void* q, int64_t stride_q_b,
    int64_t stride_q_s, int64_t stride_q_h, const void* kv_cache, int64_t fp8, int64_t num_pages,
    int64_t page_size, int64_t stride_cache_page, int64_t stride_cache_token,
    const int32_t* page_table, int64_t stride_table_b, int64_t max_pages, const int32_t* seq_lens,
    const void* w_uv, int64_t stride_w_h, int64_t stride_w_v, int64_t batch, int64_t new_tokens,
    int64_t heads, int64_t rank, int64_t rope, int64_t width, float scale, int64_t one_path) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      const MlaCache cache = cache_of<E>(kv_cache, fp8, num_pages, page_size, stride_cache_page,
                                         stride_cache_token, rank, rope);
      const MlaCall call = {q,          stride_q_b,     stride_q_s, stride_q_h, cache,
                            page_table, stride_table_b, max_pages,  seq_lens,   batch,
                            new_tokens, heads,          scale};
      attend_and_project(team, static_cast<E*>(value), call, static_cast<const E*>(w_uv),
                         stride_w_h, stride_w_v, width, one_path != 0);
    });
  });
}
