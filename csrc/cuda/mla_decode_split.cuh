// First stage of `mla_decode`: attention over one split of one sequence, on mma.sync.
//
// A block has ROWS query rows (a row is one head of one new token) and walks over the tokens of its
// split, 32 at a time. These are in shared memory once, as keys (all columns) and as values (the
// latent). Both products are dealt out to the warps so that shared memory is read little:
//
//   scores [ROWS, 32] = q k^T                          acc [ROWS, 512] += p k
//     K_GROUPS warps add up the same 16 or 32 rows      a warp has all rows of 64 or 128 columns,
//     x 16 tokens, each over its part of the 576        so k is read once, and p by every warp
//     columns; then each owns a part of them
//
//   ROWS  warps  M_GROUPS x 2 x K_GROUPS  rows a warp  queries in     shared memory  blocks an SM
//   16    4      1 x 2 x 2                16           registers      77 KiB         2
//   32    8      1 x 2 x 4                32           registers      89 KiB         1
//   64    8      2 x 2 x 2                32           shared memory  160 KiB        1
//
// A step, with what its barriers are for:
//
//   the tile is there, the other one free | start the next copy, partial scores
//   (of K_GROUPS warps) partial scores    | sums, scaled and masked; maximum over own tokens
//   maxima                                | p to shared memory, running maximum and sum of own rows
//   p, how much acc fades                 | acc *= fade, acc += p k
//
// From a cache of fp8 format the tokens come as they are, and are widened to the only tile when the
// step begins; the next ones are copied meanwhile. The scale of a token never meets its codes: it
// multiplies the scores before the rope columns are added, and p before the product with values.
#pragma once
#include "mla_decode_products.cuh"

// Two neighbours of a row that is contiguous: one store, or two where C is odd and pairs are not
// aligned; `count` of them are there.
template <class T>
__device__ __forceinline__ void store_pair(T* to_gmem, float value, float next, int count,
                                           bool paired) {
  if (paired) {
    store_vec<T, 2>(to_gmem, {from_float<T>(value), from_float<T>(next)});
  } else {
    to_gmem[0] = from_float<T>(value);
    if (count > 1) to_gmem[1] = from_float<T>(next);
  }
}

// The queries and results of a call. Strides in bytes.
struct Queries {
  const unsigned char* gmem;  // [B, S, H, C + R]
  int64 stride_b, stride_s, stride_h, stride_element;
  int heads, rows;  // H and S * H
  bool vectors;
};
template <class T>
struct Results {
  float* part_gmem;  // [B, splits, rows, C]; null where out takes the result of the one split
  T* out_gmem;       // [B, rows, C]
  float* lse_gmem;   // [B, rows, splits]
};

template <class T, int ROWS>
__device__ __forceinline__ void mla_decode_split(const Queries& q, Cache cache,
                                                 const int* table_gmem,   // [B, max_pages]
                                                 const int* length_gmem,  // [B]
                                                 const Results<T>& results, float scale,
                                                 int capacity, int splits, int min_blocks,
                                                 int64 stride_table, int64 stride_length) {
  using S = Shape<ROWS>;
  extern __shared__ __align__(16) unsigned char shared_smem[];
  Shared<S>& shared = *reinterpret_cast<Shared<S>*>(shared_smem);
  const int row_tiles = (q.rows + ROWS - 1) / ROWS;
  const int first_row = blockIdx.x % row_tiles * ROWS;
  const int split = blockIdx.x / row_tiles % splits;
  const int64 b = blockIdx.x / row_tiles / splits;

  const int length = min(max(length_gmem[b * stride_length], 0), capacity);
  const Bounds blocks(length, split, splits, min_blocks);
  // The second stage does not read what a split without blocks would write.
  if (blocks.first == blocks.last && splits > 1) return;
  const int end = min(length, blocks.last * TOKENS);
  cache.table_gmem = table_gmem + b * stride_table;
  const bool fp8 = cache.fp8;
  Tokens<S::WARPS> tokens;
  tokens.look_up(cache, blocks.first, end);

  // Queries that end up in registers pass through the tile that block 0 does not take.
  unsigned char* q_smem = !S::HOLDS_Q ? shared.q : fp8 ? shared.tile : shared.other;
  for (int row = threadIdx.x / THREADS_A_ROW; row < ROWS; row += Tokens<S::WARPS>::A_TIME) {
    const bool present = first_row + row < q.rows;
    const int r = present ? first_row + row : 0;
    const unsigned char* row_gmem =
        q.gmem + b * q.stride_b + r / q.heads * q.stride_s + r % q.heads * q.stride_h;
    copy_row(q_smem + row * ROW_BYTES, row_gmem, q.stride_element, present,
             threadIdx.x % THREADS_A_ROW, {cache.widths.c, cache.widths.r, q.vectors});
  }
  copy_async_commit();
  tokens.copy(cache, fp8 ? shared.other : shared.tile);
  tokens.look_up(cache, blocks.first + 1, end);

  const Place<S> at;
  QueryFragments<S> q_rmem;
  if constexpr (S::HOLDS_Q) {
    copy_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < S::K_STEPS; ++step) {
#pragma unroll
      for (int m = 0; m < S::M_TILES; ++m) {
        load_matrices(q_rmem[step][m], at.q_row(q_smem) + m * 16 * ROW_BYTES + step * 32);
      }
    }
  }

  int limit[2];  // tokens that a row sees: the new ones after its own are hidden from it
  float top[2], total[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + at.row + half * 8;
    limit[half] = row < q.rows ? length - (q.rows / q.heads - 1 - row / q.heads) : 0;
    top[half] = -infinity();
  }
  float acc[ROWS / 16][S::COLUMNS / 8][4] = {};

  for (int block = blocks.first; block < blocks.last; ++block) {
    copy_async_wait<0>();
    __syncthreads();  // the tokens are there, and nobody needs those of the last step
    const bool swapped = !fp8 && (block - blocks.first) % 2 != 0;
    unsigned char* tile_smem = swapped ? shared.other : shared.tile;
    if (fp8) {
      Tokens<S::WARPS>::template widen<T>(tile_smem, shared.scale, shared.other);
      __syncthreads();
    }
    if (block + 1 < blocks.last) {
      tokens.copy(cache, swapped ? shared.tile : shared.other);
      tokens.look_up(cache, block + 2, end);
    }

    float own[S::OWN][4];
    scores_of<T, S>(own, q_rmem, tile_smem, shared, at, fp8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -infinity();
#pragma unroll
      for (int part = 0; part < S::OWN; ++part) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = block * TOKENS + at.token + part * 8 + e;
          float& score = own[part][2 * half + e];
          score = token < limit[half] ? score * (scale * LOG2_E) : -infinity();
          most = fmaxf(most, score);
        }
      }
      most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
      most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
      if (at.lane % 4 == 0) shared.of_owner[at.owner][at.row + half * 8] = most;
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row + half * 8;
      float most = top[half];
#pragma unroll
      for (int owner = 0; owner < S::OWNERS; ++owner) {
        most = fmaxf(most, shared.of_owner[owner][row]);
      }
      // A row that has seen nothing yet has the maximum -inf, which must not meet itself.
      const float base = most == -infinity() ? 0.0f : most;
      const float fade = exp2_approx(top[half] - base);
      if (at.owner == 0 && at.lane % 4 == 0) shared.fade[row] = fade;
      top[half] = most;
      total[half] *= fade;
#pragma unroll
      for (int part = 0; part < S::OWN; ++part) {
        float p = exp2_approx(own[part][2 * half] - base);
        float next = exp2_approx(own[part][2 * half + 1] - base);
        total[half] += p + next;
        const int token = at.token + part * 8;
        if (fp8) {  // only now: the total is of the weights alone
          p *= shared.scale[token];
          next *= shared.scale[token + 1];
        }
        *reinterpret_cast<unsigned*>(shared.p + row * P_BYTES + 2 * token) = pair_of<T>(p, next);
      }
    }
    __syncthreads();
    float fade[ROWS / 8];
    bool fades = false;
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
      fade[i] = shared.fade[i * 8 + at.lane / 4];
      fades |= fade[i] != 1.0f;
    }
    if (__any_sync(ALL_LANES, fades)) {
#pragma unroll
      for (int m = 0; m < ROWS / 16; ++m) {
#pragma unroll
        for (int n = 0; n < S::COLUMNS / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][n][e] *= fade[2 * m + e / 2];
        }
      }
    }
    add_values<T, S>(acc, tile_smem, shared.p, at);
  }
  copy_async_wait<0>();

  const bool mine_lost = __any_sync(ALL_LANES, tokens.lost);
  if (at.lane == 0) shared.lost[at.warp] = mine_lost;
  __syncthreads();  // fade is no longer needed either
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at.row + half * 8;
    total[half] += __shfl_xor_sync(ALL_LANES, total[half], 1);
    total[half] += __shfl_xor_sync(ALL_LANES, total[half], 2);
    if (at.lane % 4 == 0) {
      shared.of_owner[at.owner][row] = total[half];
      if (at.owner == 0) shared.fade[row] = top[half];
    }
  }
  __syncthreads();
  bool lost = false;
#pragma unroll
  for (int warp = 0; warp < S::WARPS; ++warp) lost |= shared.lost[warp] != 0;
  auto total_of = [&](int row) {
    float sum = 0.0f;
#pragma unroll
    for (int owner = 0; owner < S::OWNERS; ++owner) sum += shared.of_owner[owner][row];
    return sum;
  };
  for (int row = threadIdx.x; row < ROWS && first_row + row < q.rows; row += S::WARPS * WARP) {
    const float sum = total_of(row);
    float lse = sum == 0.0f ? -infinity() : (shared.fade[row] + log2f(sum)) * LN_2;
    if (lost) lse = quiet_nan();
    results.lse_gmem[(b * q.rows + first_row + row) * splits + split] = lse;
  }
  const int c = cache.widths.c;
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
    const int row = i * 8 + at.lane / 4;
    if (first_row + row >= q.rows) continue;
    const float sum = total_of(row);
    const float norm = lost ? quiet_nan() : sum == 0.0f ? 0.0f : 1.0f / sum;
    const int64 out_row = b * q.rows + first_row + row;
    const int64 part_row = (b * splits + split) * q.rows + first_row + row;
#pragma unroll
    for (int n = 0; n < S::COLUMNS / 8; ++n) {
      const int d = at.warp * S::COLUMNS + n * 8 + at.lane % 4 * 2;
      const float value = acc[i / 2][n][i % 2 * 2] * norm;
      const float next = acc[i / 2][n][i % 2 * 2 + 1] * norm;
      if (d >= c) continue;
      if (results.part_gmem) {
        store_pair(results.part_gmem + part_row * c + d, value, next, c - d, c % 2 == 0);
      } else {
        store_pair(results.out_gmem + out_row * c + d, value, next, c - d, c % 2 == 0);
      }
    }
  }
}
