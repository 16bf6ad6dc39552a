// CUDA C++ kernel of kimi_ops.moe_sort: pairs by expert, stable, one launch at every size.
//
//   order = pairs t K + k of expert 0, ascending | of expert 1 | .. | of no local expert
//   offsets[e] = where expert e starts
//
// Grid: (E_local + 1), a block an expert and one for the pairs of no local expert. Nothing is
// exchanged between blocks: each reads all ids and counts those that come before its own, which is
// where it writes. Its warps have a contiguous part of the pairs each, and one barrier between
// counting and writing:
//
//   ids      3 0 1 3 | 0 9 1 0       block 1:  before its expert: 0 | 0 0 = 3 pairs
//            warp 0  | warp 1                  its own: 1 in warp 0's part, 1 in warp 1's
//   order    1 4 7 | 2 6 | 0 3 | 5             warp 0 writes from 3 on, warp 1 from 3 + 1 on
//
// A warp takes UNROLL * 32 pairs a step, 32 neighbours a load; a hit's place is the number of hits
// in the lanes below. No shared memory but two counters a warp.
//
// Bytes: 4 T K from memory once, the rest, 4 T K times twice the blocks, from L2; 4 T K out. Work
// grows with E T K: nothing at decode, a few ten instructions for 32 pairs and an expert above,
// where a histogram with a scan and a scatter would take three launches.
// Numerics: integers; no atomics, so the order is the same from run to run.
//
// Source: the grouped-GEMM bookkeeping of every MoE engine; no published definition.
#include "reduce.cuh"
#include "vec.cuh"

constexpr int MOST_WARPS = 16;
constexpr int UNROLL = 4;
constexpr int STEP = UNROLL * WARP;

// What a warp reads of the pairs in one step, and which of them are the block's.
struct Pairs {
  const int* ids_gmem;  // [T, K]
  int64 stride_t, stride_k;
  int top_k, first, local;
  bool packed;

  // Ids of the pairs from `start` on as numbers of local experts, all loads in flight; 0 from
  // `end`.
  __device__ __forceinline__ void read(int start, int end, unsigned (&expert)[UNROLL]) const {
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) {
      const int pair = start + j * WARP + threadIdx.x % WARP;
      expert[j] = first;
      if (pair < end) expert[j] = ids_gmem[offset(pair)];
    }
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) expert[j] -= first;
  }

  __device__ __forceinline__ int64 offset(int pair) const {
    return packed ? pair : pair / top_k * stride_t + pair % top_k * stride_k;
  }

  // Of expert `mine`, or of no local one where that is the number of local ones.
  __device__ __forceinline__ bool is_hit(unsigned expert, unsigned mine) const {
    return mine == local ? expert >= mine : expert == mine;
  }
};

extern "C" __global__ void __launch_bounds__(MOST_WARPS* WARP)
    moe_sort_kernel(const int* ids_gmem, int* order_gmem, int* offsets_gmem, int pairs, int first,
                    int local, int top_k, int64 stride_t, int64 stride_k, int packed) {
  __shared__ int before_smem[MOST_WARPS], hits_smem[MOST_WARPS];
  const Pairs all = {ids_gmem, stride_t, stride_k, top_k, first, local, packed != 0};
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const unsigned mine = blockIdx.x;
  const int part = (pairs + warps * STEP - 1) / (warps * STEP) * STEP;
  const int from = warp * part, to = min(from + part, pairs);  // `pairs` leaves room for one part

  int before = 0, hits = 0;
  for (int start = from; start < to; start += STEP) {
    unsigned expert[UNROLL];
    all.read(start, to, expert);
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) {
      const bool inside = start + j * WARP + lane < to;
      before += inside && expert[j] < mine;
      hits += inside && all.is_hit(expert[j], mine);
    }
  }
  before = warp_sum(before);
  hits = warp_sum(hits);
  if (lane == 0) before_smem[warp] = before, hits_smem[warp] = hits;
  __syncthreads();
  int place = 0, mine_before = 0;  // in `order`: of the block's first pair, and of this warp's
  for (int other = 0; other < warps; ++other) {
    place += before_smem[other];
    if (other < warp) mine_before += hits_smem[other];
  }
  if (threadIdx.x == 0) offsets_gmem[mine] = place;
  place += mine_before;

  // Most steps have no hit, and most experts none in a step.
  for (int start = from; start < to && hits > 0; start += STEP) {
    unsigned expert[UNROLL];
    all.read(start, to, expert);
    bool hit[UNROLL], any = false;
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) {
      hit[j] = start + j * WARP + lane < to && all.is_hit(expert[j], mine);
      any |= hit[j];
    }
    if (!__any_sync(ALL_LANES, any)) continue;
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) {
      const unsigned lanes = __ballot_sync(ALL_LANES, hit[j]);
      if (hit[j]) order_gmem[place + __popc(lanes & ((1u << lane) - 1))] = start + j * WARP + lane;
      place += __popc(lanes);
    }
  }
}
