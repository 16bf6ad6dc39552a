// The two products of `moe_experts_int4` for few tokens: blocks of up to 8 slots of an expert.
//
//                 shared expert:                 experts:
//   grid          tokens 0 .. 15 | 16 .. 31 | .. | block 0 | block 1 | ..
//   row tile 0
//   row tile 1 ..                                          -> one row per slot
//
// A row tile is 32 gate rows and their up rows, a group of h, or 64 rows of down. Blocks of slots
// run fastest, so that two of one expert want the same weights at the same time.
#pragma once
#include "moe_experts_int4_experts.cuh"
#include "moe_experts_int4_shared.cuh"

constexpr int H_ROWS = BLOCK_TILES * TILE_ROWS / 2;  // of a block of gate_up: a group of the next K
constexpr int DOWN_ROWS = BLOCK_TILES * TILE_ROWS;

template <class T>
__device__ __forceinline__ void gate_up(const Experts<T>& experts,
                                        const T* x_gmem,  // [T, D], for the shared expert
                                        int64 x_stride,
                                        const Rearranged<T>& x,  // as `prepare` leaves it
                                        T* h_gmem,               // [slots, rearranged_columns of F]
                                        fp16* h_lifted_gmem,     // the same
                                        float* h_start_gmem,     // [slots, start_columns of F]
                                        T* h_shared_gmem,        // [T, F' rounded up to 8]
                                        int width, int shared_width, int choices) {
  __shared__ Slots slots_smem;
  const Sums sums_smem = block_sums();
  const int split = experts.split, first = blockIdx.y * H_ROWS;
  const int first_of_warp = first + tile_of_warp(split) * (TILE_ROWS / 2);
  const int block = static_cast<int>(blockIdx.x) - experts.shared_blocks;
  if (block < 0) {
    if (first >= shared_width) return;
    const int first_token = blockIdx.x * DENSE_TOKENS;
    dense_product(sums_smem, experts.shared, gate_up_rows(first_of_warp, shared_width), x_gmem,
                  x_stride, first_token, experts.tokens, split);
    const int columns = (shared_width + PIECE - 1) / PIECE * PIECE;
    const int count = min(DENSE_TOKENS, experts.tokens - first_token);
    for (int i = threadIdx.x; i < count * H_ROWS; i += blockDim.x) {
      const int token = i / H_ROWS, n = i % H_ROWS;
      const float gate = sum_of_parts(sums_smem, n / 8, split, n % 8, token);
      const float up = sum_of_parts(sums_smem, n / 8, split, n % 8 + 8, token);
      if (first + n >= columns) continue;
      const float h = first + n < shared_width ? silu(gate) * up : 0.0f;
      h_shared_gmem[static_cast<int64>(first_token + token) * columns + first + n] =
          from_float<T>(h);
    }
    return;
  }
  const BlockTables& tables = experts.tables;
  const int size = tables.sizes()[block];
  if (size == 0 || first >= width) return;
  slots_smem.set(tables.gmem + tables.starts()[block], 0, size, choices);
  product<T>(sums_smem, experts.of(block), gate_up_rows(first_of_warp, width), x, slots_smem,
             experts.few, split, experts.shift_factor);
  // A warp has the group of one slot.
  const int thread = thread_anew(), lane = thread % WARP;
  for (int token = thread / WARP; token < slots_smem.count; token += blockDim.x / WARP) {
    const float gate = sum_of_parts(sums_smem, lane / 8, split, lane % 8, token);
    const float up = sum_of_parts(sums_smem, lane / 8, split, lane % 8 + 8, token);
    const float h = rounded<T>(silu(gate) * up);
    const int64 slot = slots_smem.at[token];
    const int64 at =
        slot * rearranged_columns(width / GROUP) + group_offset(blockIdx.y) + column_offset(lane);
    if (slots_smem.count > experts.few) {
      h_gmem[at] = from_float<T>(h);
      continue;
    }
    // The next product has the same slots, and takes the same form.
    const Lift lift(warp_max(fabsf(h)));
    float bias = 0.0f;
    h_lifted_gmem[at] = lifted(h, lift.up, lane, bias);
    bias = warp_sum(bias) * lift.factor;
    if (lane == 0) {
      float* start_gmem = h_start_gmem + slot * start_columns(width / GROUP) + 2 * blockIdx.y;
      *reinterpret_cast<float2*>(start_gmem) = {bias, lift.factor};
    }
  }
}

template <class T>
__device__ __forceinline__ void down(const Experts<T>& experts, const Rearranged<T>& h,
                                     const T* h_shared_gmem,
                                     T* rows_gmem,  // [slots (+ T), D]: the shared expert's last
                                     int depth) {
  __shared__ Slots slots_smem;
  const Sums sums_smem = block_sums();
  const int split = experts.split, first = blockIdx.y * DOWN_ROWS;
  const LaneRows rows = plain_rows(first + tile_of_warp(split) * TILE_ROWS, depth);
  const int block = static_cast<int>(blockIdx.x) - experts.shared_blocks;
  const BlockTables& tables = experts.tables;
  if (block < 0) {
    const int first_token = blockIdx.x * DENSE_TOKENS;
    slots_smem.set(nullptr, tables.slot_count + first_token,
                   min(DENSE_TOKENS, experts.tokens - first_token), 1);
    dense_product(sums_smem, experts.shared, rows, h_shared_gmem, experts.shared.columns,
                  first_token, experts.tokens, split);
  } else {
    const int size = tables.sizes()[block];
    if (size == 0) return;
    slots_smem.set(tables.gmem + tables.starts()[block], 0, size, 1);
    product<T>(sums_smem, experts.of(block), rows, h, slots_smem, experts.few, split,
               experts.shift_factor);
  }
  for (int i = thread_anew(); i < slots_smem.count * DOWN_ROWS; i += blockDim.x) {
    const int token = i / DOWN_ROWS, n = i % DOWN_ROWS;
    if (first + n >= depth) return;
    const float sum = sum_of_parts(sums_smem, n / TILE_ROWS, split, n % TILE_ROWS, token);
    rows_gmem[static_cast<int64>(slots_smem.at[token]) * depth + first + n] = from_float<T>(sum);
  }
}
