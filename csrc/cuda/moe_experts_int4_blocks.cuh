// Which tokens meet which expert's weights, worked out on the device: the host waits for nothing.
//
// (token, choice) pairs, numbered t K + k and called slots, are sorted by expert, and an expert's
// are cut into blocks. As the host cannot know how many blocks that gives, the grid has as many as
// there can be, and the unused ones are marked empty:
//
//   slots    0 . . . . | 1 . | 3 . . | ...          sorted, stable; foreign ids are left out
//   blocks   [0: 4][0: 1][1: 2][3: 3][    ][    ]   of 4; expert, first of its slots, how many
//
// An expert's first block follows from the slots before it alone, so that the experts' blocks of
// threads need nothing of each other: as the slot itself where that takes no more blocks (few
// slots), else as expert + slot / block size, which leaves every expert enough room.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

// int32: slots [slot_count], then of each block its expert, its first place in slots, its size.
struct BlockTables {
  int* gmem;
  int slot_count, blocks;

  __device__ __forceinline__ int* experts() const { return gmem + slot_count; }
  __device__ __forceinline__ int* starts() const { return gmem + slot_count + blocks; }
  __device__ __forceinline__ int* sizes() const { return gmem + slot_count + 2 * blocks; }
};

// Written by a block of SORTERS warps for one expert.
constexpr int SORTERS = 8;

__device__ __forceinline__ void write_blocks(const BlockTables& tables, const int* ids_gmem,
                                             int expert, int experts, int first_expert,
                                             int block_size, bool by_slot) {
  __shared__ int before_smem[SORTERS], mine_smem[SORTERS];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int64 id = static_cast<int64>(first_expert) + expert;
  // Each warp has a stretch of whole 32 slots.
  const int stretch = (tables.slot_count + SORTERS * WARP - 1) / (SORTERS * WARP) * WARP;
  const int from = min(warp * stretch, tables.slot_count);
  const int to = min(from + stretch, tables.slot_count);
  int before = 0, mine = 0;
  for (int slot = from + lane; slot < to; slot += WARP) {
    const int64 chosen = ids_gmem[slot];
    before += chosen >= first_expert && chosen < id;
    mine += chosen == id;
  }
  before = warp_sum(before);
  mine = warp_sum(mine);
  if (lane == 0) {
    before_smem[warp] = before;
    mine_smem[warp] = mine;
  }
  __syncthreads();
  int start = 0, total = 0, at = 0;
#pragma unroll
  for (int w = 0; w < SORTERS; ++w) {
    start += before_smem[w];
    if (w < warp) at += mine_smem[w];
    total += mine_smem[w];
  }
  at += start;
  for (int slot0 = from; mine > 0 && slot0 < to; slot0 += WARP) {
    const int slot = slot0 + lane;
    const unsigned hits = __ballot_sync(ALL_LANES, slot < to && ids_gmem[min(slot, to - 1)] == id);
    if (hits >> lane & 1) tables.gmem[at + __popc(hits & ((1u << lane) - 1))] = slot;
    at += __popc(hits);
  }
  const int block = by_slot ? start : expert + start / block_size;
  int end = by_slot ? start + total : expert + 1 + (start + total) / block_size;
  if (expert == experts - 1) end = tables.blocks;
  for (int b = block + threadIdx.x; b < end; b += SORTERS * WARP) {
    const int done = (b - block) * block_size;
    tables.experts()[b] = expert;
    tables.starts()[b] = start + done;
    tables.sizes()[b] = min(max(total - done, 0), block_size);
  }
}
