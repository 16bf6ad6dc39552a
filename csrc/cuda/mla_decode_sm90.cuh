// First stage of `mla_decode` on sm_90a for up to 64 query rows a block, on wgmma.
//
// A block has 64 query rows (a row is one head of one new token) and walks over the tokens of its
// split, 64 at a time. These are in shared memory once, as keys (all columns) and as values (the
// latent). Four warpgroups:
//
//   scorer 0  tiles 0, 2, 4, ..   copies the rows of its tile to its own buffer by cp.async;
//   scorer 1  tiles 1, 3, 5, ..   scores [64, 64] = q k^T, 36 wgmma m64n64k16; softmax over the
//                                 maximum so far; p, and how much acc fades, to shared memory
//   adder 0   columns 0 ..        acc [64, 256] = fade * acc + p k, 8 wgmma m64n128k16, k as it
//   adder 1   columns 256 ..      lies, seen transposed
//
//   scorer 0   copy 0 | scores 0 | p 0 |         | copy 2   | scores 2 | p 2 ..
//   scorer 1   copy 1 |          | scores 1      | p 1 |          | copy 3 ..
//   adders                             | add 0         | add 1        ..
//
//   scored[scorer]   p, fade and the maximum are there: for the adders, and for the other scorer,
//                    which takes the maximum from here on
//   free[scorer]     added: the scorer may copy its next tile, and write its next p
//
// So a tile's scores and softmax overlap with the values of the tile before, and copies with all of
// it. They are no bulk copies: these land rows as they lie in memory, and wgmma wants the 16-byte
// chunks of a row exchanged. That takes cp.async, or a tensor map, which the driver makes and which
// has pages of one size.
//
// Shared memory: two tiles of 72 KiB, q 64, p 2 x 8; 225.6 KiB with the rest, one block an SM.
// Registers: 512 threads with 128 each, dealt out anew: 96 for scorers, 160 for adders, of which
// 128 are acc. (m64n256k16 would read p half as often; ptxas compiles none where a block begins
// with fewer than 154 registers a thread.)
#pragma once
#include "mla_decode_sm90_tile.cuh"

namespace sm90 {

// A row's maximum so far, as what scores are taken relative to: a row that has seen nothing yet has
// the maximum -inf, which must not meet itself.
__device__ __forceinline__ float base_of(float top) { return top == -infinity() ? 0.0f : top; }

// A block's place in the grid, and the tokens of its split.
struct Part {
  int64 b;
  int first_row, split, splits, length, first, end;
};

// Where the warp and the lane are in a product's result: two rows, and of eight columns two.
struct Lane {
  int row;     // this one and the one 8 on
  int column;  // this one and the next

  __device__ __forceinline__ Lane()
      : row(threadIdx.x % GROUP / WARP * 16 + threadIdx.x % WARP / 4),
        column(threadIdx.x % 4 * 2) {}
};

// The sum of a row's weights relative to its maximum.
__device__ __forceinline__ float total_of(const Shared& shared, int row, float base) {
  float total = 0.0f;
#pragma unroll
  for (int scorer = 0; scorer < SCORERS; ++scorer) {
    total += shared.total[scorer][row] * exp2_approx(shared.top[scorer][row] - base);
  }
  return total;
}
__device__ __forceinline__ float top_of(const Shared& shared, int row) {
  return fmaxf(shared.top[0][row], shared.top[1][row]);
}

// After all of the block has come here: whether the sequence has a page that is none.
__device__ __forceinline__ bool any_lost(const Shared& shared) {
  named_barrier_sync(DONE, BLOCK);
  int lost = 0;
#pragma unroll
  for (int warp = 0; warp < SCORERS * GROUP_WARPS; ++warp) lost |= shared.lost[warp];
  return lost != 0;
}

template <class T>
__device__ __forceinline__ void score_tokens(Shared& shared, int scorer, const Queries& q,
                                             const Cache& cache, float* lse_gmem, float scale,
                                             const Part& part) {
  const Lane lane;
  unsigned char* tile_smem = shared.tile[scorer][0];
  int first = part.first + scorer * TILE_TOKENS;
  Copies copies;
  copies.look_up(cache, first, part.end);
  for (int i = scorer; i < MINE; i += SCORERS) {
    const int row = copied_row() + i * ROWS_A_TIME;
    const bool present = part.first_row + row < q.rows;
    const int r = present ? part.first_row + row : 0;
    const unsigned char* row_gmem =
        q.gmem + part.b * q.stride_b + r / q.heads * q.stride_s + r % q.heads * q.stride_h;
    copy_chunks(shared.q[0], i, row_gmem, q.stride_element, present, q.vectors);
  }
  copy_async_commit();
  if (first < part.end) copies.start(cache, tile_smem, first);
  copy_async_commit();
  copy_async_wait<1>();  // q
  fence_proxy_async();
  named_barrier_sync(QUERIES, SCORERS * GROUP);
  unsigned q_rmem[HELD * K_STEPS][4];
#pragma unroll
  for (int step = 0; step < HELD * K_STEPS; ++step) {
    const int row = threadIdx.x % GROUP / WARP * 16 + threadIdx.x % 16;
    const int chunk = step % K_STEPS * 2 + threadIdx.x % WARP / 16;
    load_matrices(q_rmem[step], shared.q[READ + step / K_STEPS] + chunk_of(row, chunk));
  }
  named_barrier_sync(QUERIES, SCORERS * GROUP);  // p may come where they were

  // Tokens that a row sees: the new ones after its own are hidden from it, and those of other
  // splits.
  int limit[2];
  float top[2], total[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = part.first_row + lane.row + half * 8;
    const int seen = part.length - (q.rows / q.heads - 1 - row / q.heads);
    limit[half] = row < q.rows ? min(seen, part.end) : 0;
    top[half] = -infinity();
    if (lane.column == 0) shared.top[scorer][lane.row + half * 8] = top[half];
  }
  for (int t = scorer; first < part.end; t += SCORERS) {
    copy_async_wait<0>();
    fence_proxy_async();  // cp.async wrote through the proxy of loads and stores
    // Numbers that are constants: for one in a register all 16 barriers of a block are set aside.
    if (scorer == 0) {
      named_barrier_sync(COPIED, GROUP);
    } else {
      named_barrier_sync(COPIED + 1, GROUP);
    }
    copies.look_up(cache, first + SCORERS * TILE_TOKENS, part.end);
    float score[32], own[2];
    multiply_keys<T>(score, tile_smem, shared.q[0], q_rmem);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -infinity();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = first + 8 * i + lane.column + e;
          float& one = score[4 * i + 2 * half + e];
          one = token < limit[half] ? one * (scale * LOG2_E) : -infinity();
          most = fmaxf(most, one);
        }
      }
      most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
      own[half] = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
    }
    const int other = (scorer + 1) % SCORERS;
    if (t > 0) mbarrier_wait(&shared.scored[other], (t - 1) / SCORERS % 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane.row + half * 8;
      const float before = t > 0 ? shared.top[other][row] : -infinity();
      const float now = fmaxf(before, own[half]), base = base_of(now);
      total[half] *= exp2_approx(top[half] - base);
      top[half] = now;
      if (lane.column == 0) {
        shared.top[scorer][row] = now;
        shared.fade[scorer][row] = exp2_approx(before - base);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float p = exp2_approx(score[4 * i + 2 * half] - base);
        const float next = exp2_approx(score[4 * i + 2 * half + 1] - base);
        total[half] += p + next;
        *reinterpret_cast<unsigned*>(shared.p(scorer) + chunk_of(row, i) + 2 * lane.column) =
            pair_of<T>(p, next);
      }
    }
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % WARP == 0) mbarrier_arrive(&shared.scored[scorer]);
    mbarrier_wait(&shared.free[scorer], t / SCORERS % 2);
    first += SCORERS * TILE_TOKENS;
    if (first < part.end) copies.start(cache, tile_smem, first);
    copy_async_commit();
  }

  const bool lost = __any_sync(ALL_LANES, copies.lost);
  if (threadIdx.x % WARP == 0) shared.lost[threadIdx.x / WARP] = lost;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane.row + half * 8;
    total[half] += __shfl_xor_sync(ALL_LANES, total[half], 1);
    total[half] += __shfl_xor_sync(ALL_LANES, total[half], 2);
    if (lane.column == 0) shared.total[scorer][row] = total[half];
  }
  const bool none = any_lost(shared);
  const int row = threadIdx.x;  // of the first scorer's threads
  if (row >= ROWS || part.first_row + row >= q.rows) return;
  const float most = top_of(shared, row), sum = total_of(shared, row, base_of(most));
  float lse = sum == 0.0f ? -infinity() : (most + log2f(sum)) * LN_2;
  if (none) lse = quiet_nan();
  lse_gmem[(part.b * q.rows + part.first_row + row) * part.splits + part.split] = lse;
}

template <class T>
__device__ __forceinline__ void add_tokens(Shared& shared, int adder, int rows,
                                           const Results<T>& results, const Part& part) {
  const Lane lane;
  float acc[PARTS][ADDER_COLUMNS / PARTS / 2] = {};
  int first = part.first;
  for (int t = 0; first < part.end; ++t, first += TILE_TOKENS) {
    const int scorer = t % SCORERS;
    mbarrier_wait(&shared.scored[scorer], t / SCORERS % 2);
    const float fade[2] = {shared.fade[scorer][lane.row], shared.fade[scorer][lane.row + 8]};
    if (__any_sync(ALL_LANES, fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < PARTS; ++n) {
#pragma unroll
        for (int i = 0; i < ADDER_COLUMNS / PARTS / 2; ++i) acc[n][i] *= fade[i / 2 % 2];
      }
    }
    const int strip = adder * (ADDER_COLUMNS / STRIP);
    add_values<T>(acc, shared.tile[scorer][strip], shared.p(scorer));
    if (threadIdx.x % WARP == 0) mbarrier_arrive(&shared.free[scorer]);
  }

  const bool lost = any_lost(shared);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane.row + half * 8;
    if (part.first_row + row >= rows) continue;
    const float sum = total_of(shared, row, base_of(top_of(shared, row)));
    const float norm = lost ? quiet_nan() : sum == 0.0f ? 0.0f : 1.0f / sum;
    const int64 column = adder * ADDER_COLUMNS + lane.column;
    const int64 out_row = part.b * rows + part.first_row + row;
    const int64 part_row = (part.b * part.splits + part.split) * rows + part.first_row + row;
#pragma unroll
    for (int n = 0; n < ADDER_COLUMNS / 8; ++n) {
      constexpr int EACH = ADDER_COLUMNS / PARTS / 8;
      const float value = acc[n / EACH][n % EACH * 4 + 2 * half] * norm;
      const float next = acc[n / EACH][n % EACH * 4 + 2 * half + 1] * norm;
      if (results.part_gmem) {
        store_vec<float, 2>(results.part_gmem + part_row * LATENT + column + 8 * n, {value, next});
      } else {
        store_vec<T, 2>(results.out_gmem + out_row * LATENT + column + 8 * n,
                        {from_float<T>(value), from_float<T>(next)});
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void mla_decode_split(const Queries& q, Cache cache,
                                                 const int* table_gmem,   // [B, max_pages]
                                                 const int* length_gmem,  // [B]
                                                 const Results<T>& results, float scale,
                                                 int capacity, int splits, int min_blocks,
                                                 int64 stride_table, int64 stride_length) {
  extern __shared__ __align__(1024) unsigned char shared_smem[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_smem);
  const int row_tiles = (q.rows + ROWS - 1) / ROWS;
  Part part;
  part.first_row = blockIdx.x % row_tiles * ROWS;
  part.split = blockIdx.x / row_tiles % splits;
  part.splits = splits;
  part.b = blockIdx.x / row_tiles / splits;
  part.length = min(max(length_gmem[part.b * stride_length], 0), capacity);
  // In blocks of 32 tokens here too, so that the second stage is the same: a split may begin in the
  // middle of what would be a tile of another.
  const Bounds blocks(part.length, part.split, splits, min_blocks);
  // The second stage does not read what a split without blocks would write.
  if (blocks.first == blocks.last && splits > 1) return;
  part.first = blocks.first * TOKENS;
  part.end = min(part.length, blocks.last * TOKENS);
  cache.table_gmem = table_gmem + part.b * stride_table;

  if (threadIdx.x == 0) {
#pragma unroll
    for (int scorer = 0; scorer < SCORERS; ++scorer) {
      mbarrier_init(&shared.scored[scorer], GROUP_WARPS);
      mbarrier_init(&shared.free[scorer], ADDERS * GROUP_WARPS);
    }
  }
  __syncthreads();
  const int group = __shfl_sync(ALL_LANES, threadIdx.x / GROUP, 0);  // known to be the warp's
  if (group < SCORERS) {
    give_registers<96>();
    score_tokens<T>(shared, group, q, cache, results.lse_gmem, scale, part);
  } else {
    take_registers<160>();
    add_tokens<T>(shared, group - SCORERS, q.rows, results, part);
  }
}

}  // namespace sm90
