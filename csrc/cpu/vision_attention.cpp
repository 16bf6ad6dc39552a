// Full attention within each picture or clip, 16 heads of 72 in Kimi K2.5; see attention.h. AMX
// multiplies the depth as 96.
#include "cpu/attention.h"

extern "C" int KIMI_NAME(vision_attention)(const kimi_team* team, int64_t dtype, void* out,
                                           const void* q, int64_t stride_q_t, int64_t stride_q_h,
                                           const void* k, int64_t stride_k_t, int64_t stride_k_h,
                                           const void* v, int64_t stride_v_t, int64_t stride_v_h,
                                           const int32_t* cu_seqlens, int64_t segments,
                                           int64_t tokens, int64_t heads, int64_t head_dim,
                                           float scale) {
  using namespace kimi::KIMI_ISA;
  const AttentionCall call{q,          stride_q_t, stride_q_h, k,          stride_k_t,
                           stride_k_h, v,          stride_v_t, stride_v_h, cu_seqlens,
                           cu_seqlens, segments,   tokens,     tokens,     heads,
                           head_dim,   head_dim,   scale,      false};
  return entry([&] {
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      attention<false>(team, static_cast<E*>(out), nullptr, call);
    });
  });
}
