// What is in shared memory of `mla_decode`'s first stage on sm_90a, how it comes there, and the two
// products; `mla_decode_sm90.cuh` says who does what.
//
// Rows of 576 values lie in nine strips of 64 columns, and a strip [64, 64] in eight patterns of 8
// rows x 128 bytes, as `matrix_descriptor` draws them:
//
//   tile  [9][64 tokens][64]    keys: K-major, 16 columns an operation
//                               values: strips 0 .. 7 MN-major, 16 tokens an operation
//   q     [9][64 rows][64]      strip 8 goes to registers once, and p [64 rows][64 tokens] of
//                               scorer 0 takes its place
//
// A wavefront of cp.async is one row of a strip, with no bank conflicts; nor has a warp's store of
// p.
#pragma once
#include "mla_decode_split.cuh"
#include "ptx_sm90.cuh"

namespace sm90 {

constexpr int ROWS = 64, TILE_TOKENS = 64, SCORERS = 2, ADDERS = 2;
constexpr int GROUP_WARPS = 4, GROUP = GROUP_WARPS * WARP, BLOCK = (SCORERS + ADDERS) * GROUP;
constexpr int STRIP = 64, STRIPS = WIDTH / STRIP;                        // columns
constexpr int PATTERN_BYTES = 8 * 128, STRIP_BYTES = 8 * PATTERN_BYTES;  // of 64 rows or tokens
constexpr int HELD = 1, READ = STRIPS - HELD;  // strips of q in registers, and in shared memory
constexpr int K_STEPS = STRIP / 16;
constexpr int ADDER_COLUMNS = LATENT / ADDERS, PARTS = 2;  // of an adder's columns
constexpr int ROWS_A_TIME = GROUP / THREADS_A_ROW, MINE = TILE_TOKENS / ROWS_A_TIME;
constexpr int DONE = 1, QUERIES = 2, COPIED = 3;  // numbers of barriers; COPIED + scorer

struct Shared {
  unsigned char tile[SCORERS][STRIPS][STRIP_BYTES];
  unsigned char q[READ + SCORERS][STRIP_BYTES];  // behind it p [64, 64], one of each scorer
  float fade[SCORERS][ROWS], top[SCORERS][ROWS];
  float total[SCORERS][ROWS];  // at the end
  unsigned long long scored[SCORERS], free[SCORERS];
  int lost[SCORERS * GROUP_WARPS];  // whether a warp met a page that is none

  __device__ __forceinline__ unsigned char* p(int scorer) { return q[READ + scorer]; }
};
static_assert(HELD <= SCORERS, "what is held of q comes by the place of p");

// Chunk `part` of 8 of a strip's row.
__device__ __forceinline__ int chunk_of(int row, int part) {
  return row * 128 + (part ^ row % 8) * 16;
}

// Eight threads copy a row, and have a chunk of each of its strips; this is a thread's first row,
// the others are ROWS_A_TIME apart.
__device__ __forceinline__ int copied_row() { return threadIdx.x % GROUP / THREADS_A_ROW; }

// Of row i of this thread, 16-bit values [C + R] or zeros, its chunks.
__device__ __forceinline__ void copy_chunks(unsigned char* strips_smem, int i,
                                            const unsigned char* row_gmem, int64 stride,
                                            bool present, bool vectors) {
  const int part = threadIdx.x % THREADS_A_ROW;
  unsigned char* to_smem = strips_smem + chunk_of(copied_row(), part) + i * ROWS_A_TIME * 128;
  if (vectors) {
#pragma unroll
    for (int strip = 0; strip < STRIPS; ++strip) {
      copy_async_16(to_smem + strip * STRIP_BYTES, row_gmem + strip * 128 + part * 16, present);
    }
    return;
  }
#pragma unroll 1
  for (int e = 0; e < STRIPS * 8; ++e) {
    const int64 d = e / 8 * STRIP + part * 8 + e % 8;
    unsigned short value = 0;
    if (present) value = *reinterpret_cast<const unsigned short*>(row_gmem + d * stride);
    *reinterpret_cast<unsigned short*>(to_smem + e / 8 * STRIP_BYTES + e % 8 * 2) = value;
  }
}
static_assert(ROWS_A_TIME % 8 == 0, "all rows of a thread have the same place in a pattern");

// The tokens that a thread copies its chunks of. Their page ids are read a tile ahead.
struct Copies {
  int page[MINE];     // -1 where there is no token
  bool lost = false;  // one of them is in no page of the cache

  __device__ __forceinline__ void look_up(const Cache& cache, int first, int end) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const unsigned token = first + copied_row() + i * ROWS_A_TIME;
      page[i] = -1;
      if (static_cast<int>(token) < end) {
        page[i] = cache.table_gmem[token / cache.page_size * cache.stride_table];
        lost |= page[i] < 0 || page[i] >= cache.num_pages;
      }
    }
  }
  // Rows that are not there become zeros: NaN in them would outlive a weight of 0.
  __device__ __forceinline__ void start(const Cache& cache, unsigned char* tile_smem,
                                        int first) const {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const unsigned token = first + copied_row() + i * ROWS_A_TIME;
      const bool present = page[i] >= 0 && page[i] < cache.num_pages;
      const unsigned char* row_gmem = cache.gmem;
      if (present) {
        row_gmem += page[i] * cache.stride_page + token % cache.page_size * cache.stride_token;
      }
      copy_chunks(tile_smem, i, row_gmem, cache.stride_element, present, cache.widths.vectors);
    }
  }
};

template <class T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

// score = q k^T of the tile, of this warpgroup.
template <class T>
__device__ __forceinline__ void multiply_keys(float (&score)[32], const unsigned char* tile_smem,
                                              const unsigned char* q_smem,
                                              const unsigned (&q_rmem)[HELD * K_STEPS][4]) {
  const auto keys = matrix_descriptor(tile_smem, 0, PATTERN_BYTES);
  const auto queries = matrix_descriptor(q_smem, 0, PATTERN_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < STRIPS * K_STEPS; ++step) {
    const int at = step / K_STEPS * STRIP_BYTES + step % K_STEPS * 32;
    const auto key = moved(keys, at);
    if (step < READ * K_STEPS) {
      if constexpr (IS_BF16<T>) {
        wgmma_n64_bf16(score, moved(queries, at), key, step > 0);
      } else {
        wgmma_n64_fp16(score, moved(queries, at), key, step > 0);
      }
    } else if constexpr (IS_BF16<T>) {
      wgmma_n64_bf16(score, q_rmem[step - READ * K_STEPS], key);
    } else {
      wgmma_n64_fp16(score, q_rmem[step - READ * K_STEPS], key);
    }
  }
  wgmma_commit();
  wgmma_wait(score);
}

// acc += p k of the tile, of this warpgroup's columns.
template <class T>
__device__ __forceinline__ void add_values(float (&acc)[PARTS][ADDER_COLUMNS / PARTS / 2],
                                           const unsigned char* strips_smem,
                                           const unsigned char* p_smem) {
  const auto weights = matrix_descriptor(p_smem, 0, PATTERN_BYTES);
  const auto values = matrix_descriptor(strips_smem, STRIP_BYTES, PATTERN_BYTES);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < K_STEPS; ++k) {
    const auto p = moved(weights, k * 32);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int strip = part * (ADDER_COLUMNS / PARTS / STRIP);
      const auto value = moved(values, strip * STRIP_BYTES + k * 2 * PATTERN_BYTES);
      if constexpr (IS_BF16<T>) {
        wgmma_n128_bf16(acc[part], p, value);
      } else {
        wgmma_n128_fp16(acc[part], p, value);
      }
    }
  }
  wgmma_commit();
#pragma unroll
  for (int part = 0; part < PARTS; ++part) wgmma_wait(acc[part]);
}

}  // namespace sm90
