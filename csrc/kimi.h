// The whole C ABI of the CPU library, one declaration per op, shapes in the margin.
//
// KIMI_OP declares an op once per instruction set, as kimi_<op>_<isa>: a caller picks one that
// kimi_cpu_isas() names. kimi_ops/_native.py reads this file: names, order and types of the
// arguments there are those below.
//
// All sizes, counts and strides are int64_t and in elements; `dtype` is one of KIMI_BF16..KIMI_F32
// and says what the tensors without a type of their own hold. The last dimension of a tensor is
// dense; `stride_*` are those of the others. Nothing is checked here and nothing outside the
// arguments is touched; the library allocates nothing that the caller must free and keeps no state
// between calls. An op returns 0, or KIMI_NO_MEMORY.
//
// KIMI_ABI_VERSION rises with every incompatible change (kimi_ops/_native.py refuses a library of
// another version).
#ifndef KIMI_H_
#define KIMI_H_

#include <stdint.h>

#define KIMI_ABI_VERSION 2
#define KIMI_EXPORT __attribute__((visibility("default")))

#define KIMI_BF16 0
#define KIMI_F16 1
#define KIMI_F32 2

#define KIMI_NO_MEMORY 1

// The threads that an op may use. `run(task, data, threads, 0)` calls task(data) on as many threads
// and returns when all have: GOMP_parallel of the OpenMP library that torch itself uses, so that
// the two share one pool, or kimi_run_threads.
typedef struct {
  void (*run)(void (*task)(void*), void* data, unsigned threads, unsigned flags);
  int64_t threads;
} kimi_team;

// Where the rows of a tensor with any leading dimensions are: row i starts at element
// i / inner * stride_outer + i % inner * stride_inner.
typedef struct {
  int64_t inner, stride_outer, stride_inner;
} kimi_rows;

#define KIMI_OP(op, ...)                                                   \
  KIMI_EXPORT int kimi_##op##_amx(const kimi_team* team, __VA_ARGS__);     \
  KIMI_EXPORT int kimi_##op##_avx512(const kimi_team* team, __VA_ARGS__);  \
  KIMI_EXPORT int kimi_##op##_avx512f(const kimi_team* team, __VA_ARGS__); \
  KIMI_EXPORT int kimi_##op##_avx2(const kimi_team* team, __VA_ARGS__);    \
  KIMI_EXPORT int kimi_##op##_scalar(const kimi_team* team, __VA_ARGS__)

#ifdef __cplusplus
extern "C" {
#endif

// Version of this header that the library was built with.
KIMI_EXPORT int kimi_abi_version(void);

// The instruction sets that this host runs and the library has code for, best first, one space
// between them: "amx" (avx512 with AMX-BF16), "avx512" (avx512f with VNNI and BF16), "avx512f" (F,
// BW, VL and DQ), "avx2" (with FMA and F16C), "scalar". A static string.
KIMI_EXPORT const char* kimi_cpu_isas(void);

// Starts and joins threads at every call; where torch has no OpenMP, and for thread sanitizers.
KIMI_EXPORT void kimi_run_threads(void (*task)(void*), void* data, unsigned threads,
                                  unsigned flags);

// clang-format off
KIMI_OP(add_rms_norm,
    int64_t dtype,
    void* y,                            // [rows, width]
    void* h,                            // [rows, width]
    const void* x, kimi_rows rows_x,    // [rows, width]
    const void* residual, kimi_rows rows_residual,  // [rows, width]
    const void* weight,                 // [width]
    int64_t rows, int64_t width, float eps);

KIMI_OP(int4_linear,
    int64_t dtype,
    void* y,                            // [tokens, rows]
    const void* x,                      // [tokens, columns]
    const void* packed,                 // [rows, columns / 8] 32-bit words
    const void* scale,                  // [rows, columns / 32]
    int64_t tokens, int64_t rows, int64_t columns, int64_t stride_x, int64_t stride_packed,
    int64_t stride_scale, int64_t scale_dtype,
    int64_t one_path);                  // not 0: one path whatever `tokens` is

KIMI_OP(merge_attention,
    int64_t dtype,
    void* out,                          // [rows, width]
    float* lse,                         // [rows]
    const void* out_a,                  // [rows, width]
    kimi_rows rows_a,
    const float* lse_a,                 // [rows]
    const void* out_b,                  // [rows, width]
    kimi_rows rows_b,
    const float* lse_b,                 // [rows]
    int64_t rows, int64_t width);

KIMI_OP(mla_absorb_query,
    int64_t dtype,
    void* q_latent,                     // [T, H, C+R]
    const void* q,                      // [T, H, N+R]
    int64_t stride_q_t, int64_t stride_q_h,
    const void* w_uk,                   // [H, N, C]
    int64_t stride_w_h, int64_t stride_w_n,
    const int64_t* positions,           // [T]
    const float* inv_freq,              // [R/2]
    int64_t tokens, int64_t heads, int64_t nope, int64_t rope, int64_t rank,
    int64_t one_path);                  // one order of sums for any T

KIMI_OP(mla_decode,
    int64_t dtype,
    void* out,                          // [B, S, H, C]
    float* lse,                         // [B, S, H]
    const void* q,                      // [B, S, H, C+R]
    int64_t stride_q_b, int64_t stride_q_s, int64_t stride_q_h,
    const void* kv_cache,               // [num_pages, P, C+R], or bytes [num_pages, P, C+16+2R]
    int64_t fp8, int64_t num_pages, int64_t page_size,
    int64_t stride_cache_page, int64_t stride_cache_token,
    const int32_t* page_table,          // [B, max_pages]
    int64_t stride_table_b, int64_t max_pages,
    const int32_t* seq_lens,            // [B]
    int64_t batch, int64_t new_tokens, int64_t heads, int64_t rank, int64_t rope, float scale);

KIMI_OP(mla_decode_value,
    int64_t dtype,
    void* value,                        // [B, S, H, V]
    const void* q,                      // [B, S, H, C+R]
    int64_t stride_q_b, int64_t stride_q_s, int64_t stride_q_h,
    const void* kv_cache,               // [num_pages, P, C+R], or bytes [num_pages, P, C+16+2R]
    int64_t fp8, int64_t num_pages, int64_t page_size,
    int64_t stride_cache_page, int64_t stride_cache_token,
    const int32_t* page_table,          // [B, max_pages]
    int64_t stride_table_b, int64_t max_pages,
    const int32_t* seq_lens,            // [B]
    const void* w_uv,                   // [H, V, C]
    int64_t stride_w_h, int64_t stride_w_v,
    int64_t batch, int64_t new_tokens, int64_t heads, int64_t rank, int64_t rope, int64_t width,
    float scale,
    int64_t one_path);                  // one order of sums of the projection for any B * S

KIMI_OP(mla_latent_write,
    int64_t dtype, int64_t fp8,         // fp8: kv_cache is in that format
    void* q_a,                          // [tokens, q]
    const void* qkv_a, int64_t stride_qkv_a,  // [tokens, q + c + r]
    const void* q_norm_weight,          // [q]
    const void* kv_norm_weight,         // [c]
    const void* positions, int64_t position_bytes,  // [tokens] integers of 4 or 8 bytes
    const float* inv_freq,              // [r / 2]
    const void* slot_mapping, int64_t slot_bytes,  // [tokens] integers of 4 or 8 bytes
    void* kv_cache, int64_t stride_page, int64_t stride_row,  // [pages, page_size, c + r], or
                                        // bytes [pages, page_size, c + 16 + 2 r]
    int64_t tokens, int64_t q, int64_t c, int64_t r, int64_t pages, int64_t page_size, float eps);

KIMI_OP(mla_prefill,
    int64_t dtype,
    void* out,                          // [T, H, V]
    float* lse,                         // [T, H]
    const void* q,                      // [T, H, N+R]
    int64_t stride_q_t, int64_t stride_q_h,
    const void* k,                      // [L, H, N+R]
    int64_t stride_k_t, int64_t stride_k_h,
    const void* v,                      // [L, H, V]
    int64_t stride_v_t, int64_t stride_v_h,
    const int32_t* cu_seqlens_q,        // [B+1]
    const int32_t* cu_seqlens_k,        // [B+1]
    int64_t sequences, int64_t tokens, int64_t keys, int64_t heads,
    int64_t width, int64_t value_width, float scale, int64_t causal);

KIMI_OP(mla_project_value,
    int64_t dtype,
    void* value,                        // [T, H, V]
    const void* out,                    // [T, H, C]
    int64_t stride_out_t, int64_t stride_out_h,
    const void* w_uv,                   // [H, V, C]
    int64_t stride_w_h, int64_t stride_w_v,
    int64_t tokens, int64_t heads, int64_t width, int64_t rank,
    int64_t one_path);                  // one order of sums for any T

KIMI_OP(moe_experts_int4,
    int64_t dtype,
    void* y,                            // [tokens, depth]
    const void* x,                      // [tokens, depth]
    const void* gate_up_packed,         // [experts, 2 * width, depth / 8] 32-bit words
    const void* gate_up_scale,          // [experts, 2 * width, depth / 32]
    const void* down_packed,            // [experts, depth, width / 8] 32-bit words
    const void* down_scale,             // [experts, depth, width / 32]
    const float* weights,               // [tokens, choices]
    const int32_t* ids,                 // [tokens, choices]
    const void* shared_gate_up,         // [2 * shared_width, depth], or null
    const void* shared_down,            // [depth, shared_width], or null
    int64_t tokens, int64_t depth, int64_t width, int64_t experts, int64_t choices,
    int64_t shared_width,
    int64_t first_expert,               // id of the first of `experts`
    int64_t stride_x,
    int64_t stride_gate_up_e, int64_t stride_gate_up,            // of the packed words
    int64_t stride_gate_up_scale_e, int64_t stride_gate_up_scale,
    int64_t stride_down_e, int64_t stride_down,
    int64_t stride_down_scale_e, int64_t stride_down_scale,
    int64_t stride_shared_gate_up, int64_t stride_shared_down,
    int64_t scale_dtype,
    int64_t one_path);                  // not 0: one path however many tokens an expert has

KIMI_OP(moe_route,
    int64_t dtype_x, int64_t dtype_weight,
    float* weights,                     // [tokens, top_k]
    int32_t* ids,                       // [tokens, top_k]
    int32_t* order, int32_t* offsets,   // as moe_sort's, `offsets` null for none
    int64_t first, int64_t local,
    const void* x, int64_t stride_x,    // [tokens, depth]
    const void* gate_weight, int64_t stride_weight,  // [experts, depth], experts at most 1024
    const float* bias,                  // [experts]
    int64_t tokens, int64_t depth, int64_t experts, int64_t top_k, int64_t n_group,
    int64_t topk_group, float scale, int64_t normalize, int64_t batch_invariant);

KIMI_OP(moe_select,
    float* weights,                     // [tokens, top_k]
    int32_t* ids,                       // [tokens, top_k]
    const float* logits, kimi_rows rows_logits,  // [tokens, experts], experts at most 1024
    const float* bias,                  // [experts]
    int64_t tokens, int64_t experts, int64_t top_k, int64_t n_group, int64_t topk_group,
    float scale, int64_t normalize);

KIMI_OP(moe_sort,
    int32_t* order,                     // [tokens * top_k]
    int32_t* offsets,                   // [local + 1]
    const int32_t* ids, kimi_rows rows_ids,  // [tokens, top_k]
    int64_t tokens, int64_t top_k, int64_t first, int64_t local);

KIMI_OP(patch_merge,
    int64_t dtype,
    void* y,                            // [merged_length, 4 width]
    const void* x, int64_t stride_x,    // [length, width]
    const void* grid_thws, int64_t grid_bytes,  // [entries, 3] integers of 4 or 8 bytes
    int64_t entries,
    const void* final_weight, const void* final_bias,  // [width]
    const void* pre_weight, const void* pre_bias,      // [width]
    int64_t length, int64_t merged_length, int64_t width, float eps);

KIMI_OP(rms_norm,
    int64_t dtype,
    void* y,                            // [rows, width]
    const void* x, kimi_rows rows_x,    // [rows, width]
    const void* weight,                 // [width]
    int64_t rows, int64_t width, float eps);

KIMI_OP(silu_mul,
    int64_t dtype,
    void* y,                            // [rows, width]
    const void* gate_up, kimi_rows rows_gate_up,  // [rows, 2 width], width > 0
    int64_t rows, int64_t width);

KIMI_OP(vision_attention,
    int64_t dtype,
    void* out,                          // [L, H, head_dim]
    const void* q,                      // [L, H, head_dim], k and v too
    int64_t stride_q_t, int64_t stride_q_h,
    const void* k,
    int64_t stride_k_t, int64_t stride_k_h,
    const void* v,
    int64_t stride_v_t, int64_t stride_v_h,
    const int32_t* cu_seqlens,          // [n+1]
    int64_t segments, int64_t tokens, int64_t heads, int64_t head_dim, float scale);

KIMI_OP(vision_pos_embed,
    int64_t dtype,
    void* y,                            // [length, width], width > 0
    const void* x, int64_t stride_x,    // [length, width]
    const void* table, int64_t stride_row, int64_t stride_column,  // [rows, columns, width]
    const void* grid_thws, int64_t grid_bytes,  // [entries, 3] integers of 4 or 8 bytes
    int64_t entries, int64_t length, int64_t rows, int64_t columns, int64_t width);

KIMI_OP(vision_rope,
    int64_t dtype,
    void* qkv, int64_t stride_patch, int64_t stride_part, int64_t stride_head,
                                        // [length, 3, heads, head_dim]
    const void* grid_thws, int64_t grid_bytes,  // [entries, 3] integers of 4 or 8 bytes
    int64_t entries, int64_t length, int64_t heads, int64_t head_dim);
// clang-format on

#ifdef __cplusplus
}
#endif

#endif  // KIMI_H_
