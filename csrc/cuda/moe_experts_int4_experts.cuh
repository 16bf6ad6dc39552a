// The weights of a layer's experts and which block of threads has which, for both products.
#pragma once
#include "int4_product.cuh"
#include "moe_experts_int4_blocks.cuh"

// The shared expert's.
template <class T>
struct DenseWeights {
  const T* gmem;  // [N, K]; rows start at multiples of 16 bytes
  int64 stride;
  int columns;  // K, a multiple of 8
};

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// What both products take. Blocks of threads of the shared expert come first.
template <class T>
struct Experts {
  Int4Weights w;                                   // of expert 0
  int64 codes_expert_stride, scale_expert_stride;  // in groups, in scales
  DenseWeights<T> shared;
  int shared_tiles, shared_blocks;  // of rows, of tokens; 0 without a shared expert
  BlockTables tables;
  int tokens, few, split;
  unsigned shift_factor;

  // The weights of a block's expert.
  __device__ __forceinline__ Int4Weights of(int block) const {
    const int64 expert = tables.experts()[block];
    Int4Weights mine = w;
    mine.codes_gmem += expert * codes_expert_stride;
    const int64 bytes = w.scale_kind == FP32_SCALES ? 4 : 2;
    mine.scale_gmem = static_cast<const char*>(w.scale_gmem) + expert * scale_expert_stride * bytes;
    return mine;
  }
};
