// CUDA C++ kernels of kimi_ops.mla_decode: absorbed attention over a paged cache, in two stages.
//
//   score[r, t] = scale * q[r] . kv[t]               r = (s, h) a query row, t < limit of s
//   out[r]      = sum_t softmax(score[r])[t] * kv[t, :C]
//   lse[r]      = log(sum_t exp(score[r, t]))
//
// All query rows of a sequence share its keys, so a block takes up to 64 of them and reads each
// cached token once. The tokens are dealt out to splits, and a second stage joins them:
//
//   stage 1, grid (B * splits * row tiles)              stage 2, grid (B * S * H, 1 or C / 128)
//   sequence b |  split 0  |  split 1  |  split 2 |     row r: part[b, 0..splits, r, columns]
//     tokens     32 at a time --->                         weighted by exp(lse - max), added up
//     pages      page_table[b, t / P] at every block       all loads before the first use
//   block (b, split): q [ROWS, C+R] resident,           one split: stage 1 writes the op's outputs
//     part [ROWS, C], lse [ROWS]                         itself and there is no stage 2
//
// Row tiles are innermost in the grid: with more than 64 rows the second tile reads the cache from
// L2. `mla_decode_split.cuh` says what warps do, and has the shared memory and registers;
// `mla_decode_sm90.cuh` the same of a form on wgmma, for sm_90a and Kimi K2.5's widths.
//
// Bytes: the cache's used rows once, (C+R) * 2 each (C + 16 + 2R in fp8 format); q once per split;
// 2 * 4 * C per row and split for the partials, which stay in L2.
//
// Numerics: products of 16-bit values added in float32; score times scale, softmax, running maximum
// and sum in float32; p is rounded to the dtype of q for its product with the values, as the
// reference does, while its sum is of the unrounded p; partials are float32, out is rounded once.
// Rows without keys have out 0 and lse -inf; a page id that is in use and is no page makes the
// sequence's results NaN. The order of all sums is the same from run to run.
//
// Source: DeepSeek-V2, arXiv 2405.04434 section 2.1; split over keys: Flash-Decoding, 2023.
#include "mla_decode_combine.cuh"
#include "mla_decode_sm90.cuh"

#define SPLIT(T, NAME, SUFFIX, THREADS, BLOCKS, ...)                                               \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                    \
      mla_decode_split_kernel_##NAME##_##SUFFIX(                                                   \
          const T* q_gmem, const unsigned char* kv_gmem, const int* table_gmem,                    \
          const int* length_gmem, float* part_gmem, T* out_gmem, float* lse_gmem, float scale,     \
          int new_tokens, int heads, int c, int r, int num_pages, int page_size, int capacity,     \
          int splits, int min_blocks, int is_fp8, int q_vectors, int kv_vectors, int64 stride_q_b, \
          int64 stride_q_s, int64 stride_q_h, int64 stride_q_d, int64 stride_page,                 \
          int64 stride_token, int64 stride_d, int64 stride_table_b, int64 stride_table_p,          \
          int64 stride_length) {                                                                   \
    __VA_ARGS__({reinterpret_cast<const unsigned char*>(q_gmem), stride_q_b, stride_q_s,           \
                 stride_q_h, stride_q_d, heads, new_tokens * heads, q_vectors != 0},               \
                {kv_gmem,                                                                          \
                 stride_page,                                                                      \
                 stride_token,                                                                     \
                 stride_d,                                                                         \
                 num_pages,                                                                        \
                 page_size,                                                                        \
                 nullptr,                                                                          \
                 stride_table_p,                                                                   \
                 {c, r, kv_vectors != 0},                                                          \
                 is_fp8 != 0},                                                                     \
                table_gmem, length_gmem, {part_gmem, out_gmem, lse_gmem}, scale, capacity, splits, \
                min_blocks, stride_table_b, stride_length);                                        \
  }
#define COMBINE(T, NAME, N, COLUMNS)                                                               \
  extern "C" __global__ void __launch_bounds__(MAX_COMBINE_WARPS* WARP)                            \
      mla_decode_combine_kernel_##NAME##_##COLUMNS(                                                \
          const float* part_gmem, const float* part_lse_gmem, const int* length_gmem, T* out_gmem, \
          float* lse_gmem, int rows, int c, int capacity, int splits, int min_blocks,              \
          int64 stride_length) {                                                                   \
    mla_decode_combine<T, N>(part_gmem, part_lse_gmem, length_gmem, out_gmem, lse_gmem, rows, c,   \
                             capacity, splits, min_blocks, stride_length);                         \
  }
#define MMA_SPLIT(T, NAME, ROWS, BLOCKS) \
  SPLIT(T, NAME, ROWS, Shape<ROWS>::WARPS* WARP, BLOCKS, mla_decode_split<T, ROWS>)
#define KERNELS(T, NAME)    \
  MMA_SPLIT(T, NAME, 16, 2) \
  MMA_SPLIT(T, NAME, 32, 1) \
  MMA_SPLIT(T, NAME, 64, 1) COMBINE(T, NAME, 4, vec) COMBINE(T, NAME, 1, each)

KERNELS(bf16, bf16)
KERNELS(fp16, fp16)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
SPLIT(bf16, bf16, sm90, sm90::BLOCK, 1, sm90::mla_decode_split<bf16>)
SPLIT(fp16, fp16, sm90, sm90::BLOCK, 1, sm90::mla_decode_split<fp16>)
#endif
