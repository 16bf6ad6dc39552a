// weights, ids = the K experts of each token from its logits; see select.h.
//
// An item is a few tokens. About 40 operations a logit for its sigmoid, and K steps that wait for
// each other; a token's steps run beside the next one's sigmoids.
#include "cpu/parallel.h"
#include "cpu/select.h"

namespace kimi::KIMI_ISA {
namespace {

constexpr int64_t kTokens = 16;  // of an item

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(moe_select)(const kimi_team* team, float* weights, int32_t* ids,
                                     const float* logits, kimi_rows rows_logits, const float* bias,
                                     int64_t tokens, int64_t experts, int64_t top_k,
                                     int64_t n_group, int64_t topk_group, float scale,
                                     int64_t normalize) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    const Selection selection{bias, experts, top_k, n_group, topk_group, scale, normalize != 0};
    for_each_range(team, tokens, kTokens, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        selection.choose(logits + row_start(rows_logits, t), weights + t * top_k, ids + t * top_k);
      }
    });
  });
}
