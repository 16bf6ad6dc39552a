// Un-absorbed attention of packed sequences, 192 wide for queries and keys and 128 for values in
// Kimi K2.5, causal or not; see attention.h.
#include "cpu/attention.h"

extern "C" int KIMI_NAME(mla_prefill)(const kimi_team* team, int64_t dtype, void* out, float* lse,
                                      const void* q, int64_t stride_q_t, int64_t stride_q_h,
                                      const void* k, int64_t stride_k_t, int64_t stride_k_h,
                                      const void* v, int64_t stride_v_t, int64_t stride_v_h,
                                      const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k,
                                      int64_t sequences, int64_t tokens, int64_t keys,
                                      int64_t heads, int64_t width, int64_t value_width,
                                      float scale, int64_t causal) {
  using namespace kimi::KIMI_ISA;
  const AttentionCall call{
      q,           stride_q_t,   stride_q_h,   k,         stride_k_t, stride_k_h, v,     stride_v_t,
      stride_v_h,  cu_seqlens_q, cu_seqlens_k, sequences, tokens,     keys,       heads, width,
      value_width, scale,        causal != 0};
  return entry([&] {
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      attention<true>(team, static_cast<E*>(out), lse, call);
    });
  });
}
