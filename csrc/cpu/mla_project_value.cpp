// value[t, h] = w_uv[h] @ out[t, h]: head_product.h.
#include "cpu/head_product.h"

extern "C" int KIMI_NAME(mla_project_value)(const kimi_team* team, int64_t dtype, void* value,
                                            const void* out, int64_t stride_out_t,
                                            int64_t stride_out_h, const void* w_uv,
                                            int64_t stride_w_h, int64_t stride_w_v, int64_t tokens,
                                            int64_t heads, int64_t width, int64_t rank,
                                            int64_t one_path) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    const HeadProduct product = {value,        heads * width, width,        out,
                                 stride_out_t, stride_out_h,  w_uv,         stride_w_h,
                                 stride_w_v,   true,          tokens,       heads,
                                 width,        rank,          one_path != 0};
    with_element(dtype, [&](auto element) {
      run_items(team, product.items(), [&](Items& items) {
        take_head_products<decltype(element)>(items, product, 0, [](int64_t) {});
      });
    });
  });
}
