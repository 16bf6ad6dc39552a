// q_latent[t, h] = (q_nope[t, h] @ w_uk[h] | rope(q_rope[t, h])): head_product.h and, as items of
// their own before those of the products, blocks of kRopeTokens tokens whose angles are computed
// once for all heads.
#include "cpu/head_product.h"
#include "cpu/rotate.h"

namespace kimi::KIMI_ISA {
namespace {

constexpr int64_t kRopeTokens = 8;

// Strides in elements.
struct QueryRope {
  void* y;  // [T, H, R]
  int64_t stride_y_t, stride_y_h;
  const void* x;  // [T, H, R]
  int64_t stride_x_t, stride_x_h;
  const int64_t* positions;  // [T]
  const float* inv_freq;     // [R/2]
  int64_t tokens, heads, rope;
};

template <class E>
void rotate(const QueryRope& p, int64_t first) {
  const int64_t size = turns_size(p.rope / 2);
  const Buffer<float> cosines(size), sines(size);
  for (int64_t t = first; t < std::min(p.tokens, first + kRopeTokens); ++t) {
    turns(cosines.get(), sines.get(), static_cast<float>(p.positions[t]), p.inv_freq, p.rope / 2);
    for (int64_t h = 0; h < p.heads; ++h) {
      const E* x = static_cast<const E*>(p.x) + t * p.stride_x_t + h * p.stride_x_h;
      E* y = static_cast<E*>(p.y) + t * p.stride_y_t + h * p.stride_y_h;
      for_each_piece(p.rope, [&](int64_t i, auto n) {
        store_piece(y + i, rotated(x + i, &cosines[i], &sines[i], n), n);
      });
    }
  }
}

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(mla_absorb_query)(const kimi_team* team, int64_t dtype, void* q_latent,
                                           const void* q, int64_t stride_q_t, int64_t stride_q_h,
                                           const void* w_uk, int64_t stride_w_h, int64_t stride_w_n,
                                           const int64_t* positions, const float* inv_freq,
                                           int64_t tokens, int64_t heads, int64_t nope,
                                           int64_t rope, int64_t rank, int64_t one_path) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      const int64_t width = rank + rope;
      const HeadProduct product = {q_latent,   heads * width, width,        q,
                                   stride_q_t, stride_q_h,    w_uk,         stride_w_h,
                                   stride_w_n, false,         tokens,       heads,
                                   rank,       nope,          one_path != 0};
      const QueryRope turned = {static_cast<E*>(q_latent) + rank,
                                heads * width,
                                width,
                                static_cast<const E*>(q) + nope,
                                stride_q_t,
                                stride_q_h,
                                positions,
                                inv_freq,
                                tokens,
                                heads,
                                rope};
      const int64_t blocks = rope ? (tokens + kRopeTokens - 1) / kRopeTokens : 0;
      run_items(team, blocks + product.items(), [&](Items& items) {
        take_head_products<E>(items, product, blocks,
                              [&](int64_t item) { rotate<E>(turned, item * kRopeTokens); });
      });
    });
  });
}
