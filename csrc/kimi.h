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

#define KIMI_OP(op, ...)                                                  \
  KIMI_EXPORT int kimi_##op##_amx(const kimi_team* team, __VA_ARGS__);    \
  KIMI_EXPORT int kimi_##op##_avx512(const kimi_team* team, __VA_ARGS__); \
  KIMI_EXPORT int kimi_##op##_avx2(const kimi_team* team, __VA_ARGS__);   \
  KIMI_EXPORT int kimi_##op##_scalar(const kimi_team* team, __VA_ARGS__)

#ifdef __cplusplus
extern "C" {
#endif

// Version of this header that the library was built with.
KIMI_EXPORT int kimi_abi_version(void);

// The instruction sets that this host runs and the library has code for, best first, one space
// between them: "amx" (avx512 with AMX-BF16), "avx512" (F, BW, VL, DQ, VNNI and BF16), "avx2" (with
// FMA and F16C), "scalar". A static string.
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
