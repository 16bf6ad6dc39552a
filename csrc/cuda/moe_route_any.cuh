// The gate product in float32, of operands of any dtypes, strides and widths, without tensor cores.
//
// A block of 256 threads has 32 experts and 32 tokens, a thread two of each; steps of 32 columns
// go through shared memory as float32, 8.25 KiB.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

constexpr int ANY_TILE = 32, ANY_THREADS = 256;

// A matrix [rows, columns] of one of the dtypes, told at run time: an instance for each pair of
// them would be nine kernels.
struct Matrix {
  const void* gmem;
  int dtype;  // 0: float32, 1: bfloat16, 2: float16
  int64 stride_row, stride_column;

  __device__ __forceinline__ float at(int row, int column) const {
    const int64 offset = row * stride_row + column * stride_column;
    if (dtype == 0) return static_cast<const float*>(gmem)[offset];
    if (dtype == 1) return to_float(static_cast<const bf16*>(gmem)[offset]);
    return to_float(static_cast<const fp16*>(gmem)[offset]);
  }
};

__device__ __forceinline__ void multiply_any(const Matrix& x, const Matrix& gate, int expert,
                                             int token, int part, int parts, int columns,
                                             int experts, int tokens,
                                             float* logits_gmem,  // [T, E] of the part
                                             int64 stride_t) {
  __shared__ float gate_smem[ANY_TILE][ANY_TILE + 1], x_smem[ANY_TILE][ANY_TILE + 1];
  const int e = threadIdx.x % 16, t = threadIdx.x / 16;
  const int steps = (columns + ANY_TILE - 1) / ANY_TILE, run = (steps + parts - 1) / parts;
  const int end = min((part + 1) * run, steps) * ANY_TILE;
  float d[2][2] = {};  // experts e and e + 16, tokens t and t + 16
  for (int start = part * run * ANY_TILE; start < end; start += ANY_TILE) {
    for (int i = threadIdx.x; i < ANY_TILE * ANY_TILE; i += ANY_THREADS) {
      const int row = i / ANY_TILE, column = start + i % ANY_TILE;
      const bool inside = column < columns;
      gate_smem[row][i % ANY_TILE] =
          inside && expert + row < experts ? gate.at(expert + row, column) : 0.0f;
      x_smem[row][i % ANY_TILE] = inside && token + row < tokens ? x.at(token + row, column) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < ANY_TILE; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          d[i][j] = fmaf(gate_smem[e + 16 * i][k], x_smem[t + 16 * j][k], d[i][j]);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int to_e = expert + e + 16 * i, to_t = token + t + 16 * j;
      if (to_e < experts && to_t < tokens) logits_gmem[to_t * stride_t + to_e] = d[i][j];
    }
  }
}
