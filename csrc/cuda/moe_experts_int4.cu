// CUDA C++ kernels of kimi_ops.moe_experts_int4: the chosen experts on int4 weights, four launches.
//
//   y[t] = sum_k weights[t, k] * down(silu(gate x[t]) * up x[t])   [+ shared expert]
//
//   prepare   a block an expert: its slots and blocks         | 1,024 columns of a token: x
//   rearranged gate_up   shared expert: row tiles x 16 tokens | row tile 0: block 0, 1, 2 .. | row
//   tile 1: .. down      the same                                          -> one row per slot, [T
//   K, D] sum       2,048 columns of a token: weights, fixed order over k, shared expert
//
// A block of gate_up is eight warps: `split` of them along D, 8 / split tiles of 8 gate rows and
// their 8 up rows, for up to 16 slots of one expert. SwiGLU happens where the warps' sums meet, and
// h is written as the next product wants it. Of down a tile is 16 rows. The forms are in
// int4_product.cuh; up to `few` slots (2) scales meet the sums, above that the weights. Blocks of
// slots run fastest, so that two of one expert want the same weights at the same time and the
// second finds them in L2.
//
// Budget: 128 registers, 8.6 KiB of static shared memory for the sums, 2 blocks an SM: 16 warps
// with 4 KiB of codes in flight each. Bytes: 0.5625 a weight of every chosen expert, once; x, h and
// the slots' rows add 2 percent at one token. More than 16 slots of an expert read its weights
// again. Numerics: float32 sums; h and the slots' rows are rounded once each. No atomics, one
// order.
//
// Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; compressed-tensors ``pack-quantized``.
#include "moe_experts_int4_blocks.cuh"
#include "moe_experts_int4_shared.cuh"

constexpr int THREADS = WARPS * WARP;

// Blocks of x come after those of the experts, `chunks` a token.
template <class T>
__device__ __forceinline__ void prepare(const T* x_gmem,      // [T, D]
                                        const int* ids_gmem,  // [T, K], contiguous
                                        BlockTables tables,
                                        T* xr_gmem,         // [T, rearranged_columns], then ZEROS
                                        float* start_gmem,  // [T, start_columns]
                                        int64 x_stride, int tokens, int groups, int chunks,
                                        int experts, int first_expert, int block_size,
                                        bool by_slot) {
  int block = blockIdx.x;
  if (block < experts) {
    write_blocks(tables, ids_gmem, block, experts, first_expert, block_size, by_slot);
    return;
  }
  block -= experts;
  const int64 token = block / chunks;
  const int piece = block % chunks * THREADS + threadIdx.x;
  const int64 columns = rearranged_columns(groups);
  rearrange(x_gmem + token * x_stride, xr_gmem + token * columns,
            start_gmem + token * start_columns(groups), piece, piece < groups * WORDS);
  if (block == 0) {
    T* zeros_gmem = xr_gmem + tokens * columns;
    for (int i = threadIdx.x; i < ZEROS; i += THREADS) zeros_gmem[i] = from_float<T>(0.0f);
  }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// What both products take.
template <class T>
struct Experts {
  Int4Weights w;                                   // of expert 0
  int64 codes_expert_stride, scale_expert_stride;  // in groups, in scales
  DenseWeights<T> shared;
  int shared_tiles;   // of rows; 0 without a shared expert
  int shared_blocks;  // of tokens
  BlockTables tables;
  int tokens, few, split;
  unsigned shift_factor;

  __device__ __forceinline__ bool is_shared() const {
    return blockIdx.x < static_cast<unsigned>(shared_tiles * shared_blocks);
  }
  __device__ __forceinline__ int routed() const {
    return static_cast<int>(blockIdx.x) - shared_tiles * shared_blocks;
  }
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

template <class T>
__device__ __forceinline__ void gate_up(const Experts<T>& experts,
                                        const T* x_gmem,  // [T, D], for the shared expert
                                        int64 x_stride,
                                        const T* xr_gmem,         // as `prepare` leaves it
                                        const float* start_gmem,  // as `prepare` leaves it
                                        T* h_gmem,            // [slots, rearranged_columns of F]
                                        float* h_start_gmem,  // [slots, start_columns of F]
                                        T* h_shared_gmem,     // [T, F' rounded up to 8]
                                        const T* zeros_gmem,  // [ZEROS]
                                        int width, int shared_width, int choices) {
  __shared__ Sums sums_smem;
  __shared__ Slots slots_smem;
  const int split = experts.split, tile = threadIdx.x / WARP >> (split / 2);
  const int block_rows = tiles_of(experts.split) * (TILE_ROWS / 2);
  if (experts.is_shared()) {
    const int first = blockIdx.x / experts.shared_blocks * block_rows;
    const int first_token = blockIdx.x % experts.shared_blocks * DENSE_TOKENS;
    const LaneRows rows = gate_up_rows(first + tile * (TILE_ROWS / 2), shared_width);
    dense_product(sums_smem, experts.shared, rows, x_gmem, x_stride, first_token, experts.tokens,
                  split);
    const int columns = (shared_width + PIECE - 1) / PIECE * PIECE;
    const int count = min(DENSE_TOKENS, experts.tokens - first_token);
    for (int i = threadIdx.x; i < count * block_rows; i += THREADS) {
      const int token = i / block_rows, n = i % block_rows;
      const int row = n % 8;
      const float gate = sum_of_parts(sums_smem, n / 8, split, row, token);
      const float up = sum_of_parts(sums_smem, n / 8, split, row + 8, token);
      if (first + n >= columns) continue;
      const float h = first + n < shared_width ? silu(gate) * up : 0.0f;
      h_shared_gmem[static_cast<int64>(first_token + token) * columns + first + n] =
          from_float<T>(h);
    }
    return;
  }
  const BlockTables& tables = experts.tables;
  const int block = experts.routed() % tables.blocks;
  const int size = tables.sizes()[block];
  if (size == 0) return;
  const int first = experts.routed() / tables.blocks * block_rows;
  slots_smem.set(tables.gmem + tables.starts()[block], 0, size, first, block_rows);
  const LaneRows rows = gate_up_rows(first + tile * (TILE_ROWS / 2), width);
  product<T>(sums_smem, experts.of(block), rows, {xr_gmem, start_gmem, zeros_gmem, choices},
             slots_smem, experts.few, split, experts.shift_factor);
  // A warp has 32 rows of h of one slot, a group of the next product.
  const int pieces = slots_smem.rows / GROUP;
  const int thread = thread_anew(), lane = thread % WARP;
  for (int i = thread / WARP; i < slots_smem.count * pieces; i += WARPS) {
    const int token = i / pieces, n = i % pieces * GROUP + lane;
    const int row = n % 8;
    const float gate = sum_of_parts(sums_smem, n / 8, split, row, token);
    const float up = sum_of_parts(sums_smem, n / 8, split, row + 8, token);
    const float h = rounded<T>(silu(gate) * up);
    const float sum = warp_sum(h);
    const int group = (slots_smem.first_row + n) / GROUP;
    if (group >= width / GROUP) continue;
    const int64 slot = slots_smem.at[token];
    const int64 at = slot * rearranged_columns(width / GROUP) + group_offset(group);
    h_gmem[at + column_offset(lane)] = from_float<T>(h);
    if (lane == 0) {
      h_start_gmem[slot * start_columns(width / GROUP) + group] = -Codes<T>::BIAS * sum;
    }
  }
}

template <class T>
__device__ __forceinline__ void down(const Experts<T>& experts, const T* h_gmem,
                                     const float* h_start_gmem, const T* h_shared_gmem,
                                     const T* zeros_gmem,  // [ZEROS]
                                     T* rows_gmem,  // [slots (+ T), D]: the shared expert's last
                                     int depth) {
  __shared__ Sums sums_smem;
  __shared__ Slots slots_smem;
  const int tile = threadIdx.x / WARP >> (experts.split / 2);
  const int block_rows = tiles_of(experts.split) * TILE_ROWS;
  const BlockTables& tables = experts.tables;
  if (experts.is_shared()) {
    const int first = blockIdx.x / experts.shared_blocks * block_rows;
    const int first_token = blockIdx.x % experts.shared_blocks * DENSE_TOKENS;
    slots_smem.set(nullptr, tables.slot_count + first_token,
                   min(DENSE_TOKENS, experts.tokens - first_token), first, block_rows);
    dense_product(sums_smem, experts.shared, plain_rows(first + tile * TILE_ROWS, depth),
                  h_shared_gmem, experts.shared.columns, first_token, experts.tokens,
                  experts.split);
  } else {
    const int block = experts.routed() % tables.blocks;
    const int size = tables.sizes()[block];
    if (size == 0) return;
    const int first = experts.routed() / tables.blocks * block_rows;
    slots_smem.set(tables.gmem + tables.starts()[block], 0, size, first, block_rows);
    product<T>(sums_smem, experts.of(block), plain_rows(first + tile * TILE_ROWS, depth),
               {h_gmem, h_start_gmem, zeros_gmem, 1}, slots_smem, experts.few, experts.split,
               experts.shift_factor);
  }
  for (int i = thread_anew(); i < slots_smem.count * slots_smem.rows; i += THREADS) {
    const int token = i / slots_smem.rows, n = i % slots_smem.rows;
    const int row = slots_smem.first_row + n;
    if (row >= depth) continue;
    const float sum = sum_of_parts(sums_smem, n / TILE_ROWS, experts.split, n % TILE_ROWS, token);
    rows_gmem[static_cast<int64>(slots_smem.at[token]) * depth + row] = from_float<T>(sum);
  }
}

// Thread: 8 columns of a token.
template <class T>
__device__ __forceinline__ void sum(const T* rows_gmem,        // [slots (+ T), D]
                                    const int* ids_gmem,       // [T, K], contiguous
                                    const void* weights_gmem,  // [T, K], contiguous
                                    int weights_bytes,
                                    T* y_gmem,  // [T, D]
                                    int tokens, int choices, int depth, int first_expert,
                                    int last_expert, bool routed, bool shared) {
  const int64 token = blockIdx.x;
  const int d = (blockIdx.y * THREADS + threadIdx.x) * PIECE;
  if (d >= depth) return;
  float total[PIECE] = {};
  auto add = [&](int64 row, float weight) {
    const Vec<T, PIECE> x = load_vec<T, PIECE>(rows_gmem + row * depth + d);
#pragma unroll
    for (int e = 0; e < PIECE; ++e) total[e] += weight * to_float(x.at[e]);
  };
  for (int k = 0; routed && k < choices; ++k) {
    const int64 slot = token * choices + k;
    const int id = ids_gmem[slot];
    if (id < first_expert || id >= last_expert) continue;
    add(slot, weights_bytes == 8
                  ? static_cast<float>(static_cast<const double*>(weights_gmem)[slot])
                  : static_cast<const float*>(weights_gmem)[slot]);
  }
  if (shared) add((routed ? static_cast<int64>(tokens) * choices : 0) + token, 1.0f);
  Vec<T, PIECE> y;
#pragma unroll
  for (int e = 0; e < PIECE; ++e) y.at[e] = from_float<T>(total[e]);
  store_vec<T, PIECE>(y_gmem + token * depth + d, y);
}

#define EXPERTS_PARAMETERS(T)                                                              \
  const uint4 *codes_gmem, const void *scale_gmem, const T *shared_gmem, int *tables_gmem, \
      int64 codes_expert_stride, int64 codes_stride, int64 scale_expert_stride,            \
      int64 scale_stride, int64 shared_stride, int scale_kind, int groups, int chunks,     \
      int shared_columns, int shared_tiles, int shared_blocks, int slot_count, int blocks, \
      int tokens, int few, int split, unsigned shift_factor
#define EXPERTS(T)                                                                   \
  {{codes_gmem, scale_gmem, codes_stride, scale_stride, scale_kind, groups, chunks}, \
   codes_expert_stride,                                                              \
   scale_expert_stride,                                                              \
   {shared_gmem, shared_stride, shared_columns},                                     \
   shared_tiles,                                                                     \
   shared_blocks,                                                                    \
   {tables_gmem, slot_count, blocks},                                                \
   tokens,                                                                           \
   few,                                                                              \
   split,                                                                            \
   shift_factor}

#define KERNELS(T, NAME)                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS) moe_experts_int4_prepare_kernel_##NAME(    \
      const T* x_gmem, const int* ids_gmem, int* tables_gmem, T* xr_gmem, float* start_gmem,       \
      int64 x_stride, int slot_count, int blocks, int tokens, int groups, int chunks, int experts, \
      int first_expert, int block_size, int by_slot) {                                             \
    prepare<T>(x_gmem, ids_gmem, {tables_gmem, slot_count, blocks}, xr_gmem, start_gmem, x_stride, \
               tokens, groups, chunks, experts, first_expert, block_size, by_slot != 0);           \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) moe_experts_int4_gate_up_kernel_##NAME( \
      EXPERTS_PARAMETERS(T), const T* x_gmem, int64 x_stride, const T* xr_gmem,                    \
      const float* start_gmem, T* h_gmem, float* h_start_gmem, T* h_shared_gmem,                   \
      const T* zeros_gmem, int width, int shared_width, int choices) {                             \
    gate_up<T>(EXPERTS(T), x_gmem, x_stride, xr_gmem, start_gmem, h_gmem, h_start_gmem,            \
               h_shared_gmem, zeros_gmem, width, shared_width, choices);                           \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) moe_experts_int4_down_kernel_##NAME(    \
      EXPERTS_PARAMETERS(T), const T* h_gmem, const float* h_start_gmem, const T* h_shared_gmem,   \
      const T* zeros_gmem, T* rows_gmem, int depth) {                                              \
    down<T>(EXPERTS(T), h_gmem, h_start_gmem, h_shared_gmem, zeros_gmem, rows_gmem, depth);        \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS) moe_experts_int4_sum_kernel_##NAME(        \
      const T* rows_gmem, const int* ids_gmem, const void* weights_gmem, int weights_bytes,        \
      T* y_gmem, int tokens, int choices, int depth, int first_expert, int last_expert,            \
      int routed, int shared) {                                                                    \
    sum<T>(rows_gmem, ids_gmem, weights_gmem, weights_bytes, y_gmem, tokens, choices, depth,       \
           first_expert, last_expert, routed != 0, shared != 0);                                   \
  }

KERNELS(bf16, bf16)
KERNELS(fp16, fp16)
