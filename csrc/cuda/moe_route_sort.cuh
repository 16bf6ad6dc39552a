// The tables of kimi_ops.moe_sort for few tokens, by one block: the one that has selected last.
//
//   pairs        t K + k, 32 neighbours a warp           block of 8 or 16 warps
//   count        an integer atomic of shared memory for each pair, exclusive sums over the experts
//   place        warps take turns: a pair's place is its expert's next one, and one more for each
//                lower lane of the warp with the same expert; then the expert's next one moves on
//
//   bucket   3 0 3 1 | 0 2 0 0        start  0: 0, 1: 4, 2: 5, 3: 6
//            warp 0  | warp 1         warp 0 writes at 6 0 7 4, leaves 1, 5, 5, 8
//                                     warp 1 writes at 1 5 2 3
//
// The turns keep the order stable, and nothing depends on which atomic came first. 1.6 KiB of
// shared memory; a barrier for each 32 pairs, which are 16 at 64 tokens of 8 choices.
#pragma once
#include "reduce.cuh"
#include "select.cuh"

struct SortTables {
  int* order_gmem;    // [T K], or null: no tables are wanted
  int* offsets_gmem;  // [local + 1]
  int first, local;   // local experts: first .. first + local - 1

  // Where a pair belongs: the number of its local expert, or `local`.
  __device__ __forceinline__ int bucket(int id) const {
    return min(static_cast<unsigned>(id - first), static_cast<unsigned>(local));
  }
};

template <int THREADS>
__device__ __forceinline__ void sort_pairs(const SortTables& tables, const int* ids_gmem,
                                           int pairs) {
  constexpr int BUCKETS = FEW_EXPERTS + 1, WARPS = THREADS / WARP;
  constexpr int OF_THREAD = (BUCKETS + THREADS - 1) / THREADS;
  __shared__ int start_smem[BUCKETS], sum_smem[WARPS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  for (int e = threadIdx.x; e <= tables.local; e += THREADS) start_smem[e] = 0;
  __syncthreads();
  for (int pair = threadIdx.x; pair < pairs; pair += THREADS) {
    atomicAdd(&start_smem[tables.bucket(ids_gmem[pair])], 1);
  }
  __syncthreads();
  int count[OF_THREAD], mine = 0;
#pragma unroll
  for (int i = 0; i < OF_THREAD; ++i) {
    const int e = threadIdx.x * OF_THREAD + i;
    count[i] = e <= tables.local ? start_smem[e] : 0;
    mine += count[i];
  }
  int start = mine;
#pragma unroll
  for (int lanes = 1; lanes < WARP; lanes *= 2) {
    const int lower = __shfl_up_sync(ALL_LANES, start, lanes);
    if (lane >= lanes) start += lower;
  }
  if (lane == WARP - 1) sum_smem[warp] = start;
  __syncthreads();
  start -= mine;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) start += sum_smem[w];
  }
#pragma unroll
  for (int i = 0; i < OF_THREAD; ++i) {
    const int e = threadIdx.x * OF_THREAD + i;
    if (e <= tables.local) tables.offsets_gmem[e] = start_smem[e] = start;
    start += count[i];
  }
  __syncthreads();
  for (int round = 0; round < pairs; round += THREADS) {
    const int pair = round + threadIdx.x;
    const bool inside = pair < pairs;
    const int e = inside ? tables.bucket(ids_gmem[pair]) : BUCKETS;
    const unsigned same = __match_any_sync(ALL_LANES, e);
    const unsigned all = __ballot_sync(ALL_LANES, inside);
    const int rank = __popc(same & ((1u << lane) - 1));
    for (int turn = 0; turn < WARPS && round + turn * WARP < pairs; ++turn) {
      if (turn == warp && inside) {
        const int place = start_smem[e] + rank;
        __syncwarp(all);
        if (rank == 0) start_smem[e] = place + __popc(same);
        tables.order_gmem[place] = pair;
      }
      __syncthreads();
    }
  }
}
