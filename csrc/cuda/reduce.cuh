// Sums over the threads of a warp or of a block, in an order that nothing but their number decides.
#pragma once

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Every lane gets the sum.
template <class Sum>
__device__ __forceinline__ Sum warp_sum(Sum value) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(ALL_LANES, value, lanes);
  }
  return value;
}

// Every lane gets the largest.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, lanes));
  }
  return value;
}

// Sum over the WARPS warps of a block's x direction; every thread gets it. `partial_smem` holds
// WARPS values, and nothing else may write it before the next __syncthreads() after the call.
template <int WARPS, class Sum>
__device__ __forceinline__ Sum block_sum(Sum value, Sum* partial_smem) {
  value = warp_sum(value);
  if constexpr (WARPS == 1) return value;
  if (threadIdx.x % WARP == 0) partial_smem[threadIdx.x / WARP] = value;
  __syncthreads();
  Sum sum = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) sum += partial_smem[warp];
  return sum;
}
