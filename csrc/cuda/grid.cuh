// Finds the picture or clip of a patch on the device, so that mixed sizes need no host sync.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

struct Place {
  bool found;   // false past the last entry; t, h and w are then 1, place and first 0
  int t, h, w;  // of the entry, in patches
  int place;    // of the index within the entry
  int first;    // first patch of the entry, among all frames of all entries
};

// Inclusive sum over the lanes up to this one.
__device__ __forceinline__ int warp_scan(int value) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    const int below = __shfl_up_sync(ALL_LANES, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// The entry that `index` belongs to, the same for all lanes of a warp. Entries are counted in
// patches of all frames, or with PER_FRAME in those of one. 32 entries a step: one load each.
template <bool PER_FRAME>
__device__ __forceinline__ Place locate(int index, Integers grid,  // [entries, 3]: t, h, w
                                        int entries) {
  const int lane = threadIdx.x % WARP;
  int counted = 0;  // of the entries before this step, as `index` counts them
  int patches = 0;  // of all their frames
  for (int start = 0; start < entries; start += WARP) {
    const int entry = start + lane;
    int t = 0, h = 0, w = 0;
    if (entry < entries) {
      t = static_cast<int>(grid[entry * 3]);
      h = static_cast<int>(grid[entry * 3 + 1]);
      w = static_cast<int>(grid[entry * 3 + 2]);
    }
    const int all = t * h * w;
    const int size = PER_FRAME ? h * w : all;
    const int end = counted + warp_scan(size);
    const int all_end = patches + warp_scan(all);
    const unsigned hit = __ballot_sync(ALL_LANES, index >= end - size && index < end);
    if (hit) {
      const int from = __ffs(hit) - 1;
      return {true,
              __shfl_sync(ALL_LANES, t, from),
              __shfl_sync(ALL_LANES, h, from),
              __shfl_sync(ALL_LANES, w, from),
              __shfl_sync(ALL_LANES, index - (end - size), from),
              __shfl_sync(ALL_LANES, all_end - all, from)};
    }
    counted = __shfl_sync(ALL_LANES, end, WARP - 1);
    patches = __shfl_sync(ALL_LANES, all_end, WARP - 1);
  }
  return {false, 1, 1, 1, 0, 0};
}
