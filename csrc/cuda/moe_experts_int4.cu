// CUDA C++ kernels of kimi_ops.moe_experts_int4: the chosen experts on int4 weights, four launches.
//
//   y[t] = sum_k weights[t, k] * down(silu(gate x[t]) * up x[t])   [+ shared expert]
//
//   prepare   a block an expert: its slots and blocks  | 2,048 columns of a token: x rearranged
//   gate_up   shared expert's blocks                   | row tiles x blocks of slots
//   down      the same                                                       -> a row per slot
//   sum       2,048 columns of a token: weights, fixed order over k, shared expert
//
// Both products exist in two kinds of kernel, and the host chooses by what an expert expects under
// even routing; in batch-invariant mode it is always the second:
//
//   few    blocks of up to 8 slots, 4 to 16 warps, weights from memory straight into registers
//          (moe_experts_int4_few.cuh, int4_product.cuh); up to `few` slots (2) scales meet the
//          sums, above that the weights
//   many   blocks of up to 64 slots, 4 warps, weights and x through a ring in shared memory
//          (moe_experts_int4_many.cuh, int4_many.cuh)
//
// SwiGLU happens where the sums of a gate row and its up row meet, and h is written as the next
// product wants it.
//
// Budget: few, 128 registers, 4.3 KiB of shared memory a split of K, 16 warps an SM with 4 KiB of
// codes in flight each; many, 170 to 220 registers, 58.8 KiB of shared memory, 2 blocks an SM.
// Bytes: 0.5625 a weight of every chosen expert, once for 8 slots or 64; x, h and the slots' rows
// add 2 percent at one token. Numerics: float32 sums; h and the slots' rows are rounded once each.
// No atomics, one order.
//
// Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; compressed-tensors ``pack-quantized``.
#include "moe_experts_int4_few.cuh"
#include "moe_experts_int4_many.cuh"

constexpr int THREADS = SORTERS * WARP;  // of prepare and sum
static_assert(THREADS == ZEROS);

// Blocks of x come after those of the experts, `chunks` a token.
template <class T>
__device__ __forceinline__ void prepare(const T* x_gmem,      // [T, D]
                                        const int* ids_gmem,  // [T, K], contiguous
                                        BlockTables tables,
                                        T* xr_gmem,         // [T, rearranged_columns]
                                        fp16* lifted_gmem,  // the same, then ZEROS; or null
                                        float* start_gmem,  // [T, start_columns]; or null
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
  const bool lift = lifted_gmem != nullptr;
  rearrange(x_gmem + token * x_stride, xr_gmem + token * columns,
            lift ? lifted_gmem + token * columns : nullptr,
            lift ? start_gmem + token * start_columns(groups) : nullptr, piece,
            piece < groups * WORDS);
  if (lift && block == 0) lifted_gmem[tokens * columns + threadIdx.x] = {0};
}

constexpr int SUM_AHEAD = 8;  // choices whose rows are in flight at once

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
  auto row_of = [&](int64 row) { return load_vec<T, PIECE>(rows_gmem + row * depth + d); };
  auto add = [&](const Vec<T, PIECE>& row, float weight) {
#pragma unroll
    for (int e = 0; e < PIECE; ++e) total[e] += weight * to_float(row.at[e]);
  };
  Vec<T, PIECE> last;
  if (shared) last = row_of((routed ? static_cast<int64>(tokens) * choices : 0) + token);
  auto weight_of = [&](int64 slot) {
    return weights_bytes == 8 ? static_cast<float>(static_cast<const double*>(weights_gmem)[slot])
                              : static_cast<const float*>(weights_gmem)[slot];
  };
  const int count = routed ? choices : 0;
  for (int first = 0; first < count; first += SUM_AHEAD) {
    bool ours[SUM_AHEAD];
    float weight[SUM_AHEAD];
    Vec<T, PIECE> row[SUM_AHEAD];
#pragma unroll
    for (int i = 0; i < SUM_AHEAD; ++i) {
      const int64 slot = token * choices + min(first + i, count - 1);
      const int id = ids_gmem[slot];
      ours[i] = first + i < count && id >= first_expert && id < last_expert;
      weight[i] = weight_of(slot);
    }
#pragma unroll
    for (int i = 0; i < SUM_AHEAD; ++i) {
      if (ours[i]) row[i] = row_of(token * choices + first + i);
    }
#pragma unroll
    for (int i = 0; i < SUM_AHEAD; ++i) {
      if (ours[i]) add(row[i], weight[i]);
    }
  }
  if (shared) add(last, 1.0f);
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
      const T* x_gmem, const int* ids_gmem, int* tables_gmem, T* xr_gmem, fp16* lifted_gmem,       \
      float* start_gmem, int64 x_stride, int slot_count, int blocks, int tokens, int groups,       \
      int chunks, int experts, int first_expert, int block_size, int by_slot) {                    \
    prepare<T>(x_gmem, ids_gmem, {tables_gmem, slot_count, blocks}, xr_gmem, lifted_gmem,          \
               start_gmem, x_stride, tokens, groups, chunks, experts, first_expert, block_size,    \
               by_slot != 0);                                                                      \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1)                                     \
      moe_experts_int4_gate_up_kernel_##NAME(                                                      \
          EXPERTS_PARAMETERS(T), const T* x_gmem, int64 x_stride, const T* xr_gmem, T* h_gmem,     \
          T* h_shared_gmem, int width, int shared_width, int choices, const fp16* lifted_gmem,     \
          const float* start_gmem, fp16* h_lifted_gmem, float* h_start_gmem,                       \
          const fp16* zeros_gmem) {                                                                \
    gate_up<T>(EXPERTS(T), x_gmem, x_stride, {xr_gmem, lifted_gmem, start_gmem, zeros_gmem},       \
               h_gmem, h_lifted_gmem, h_start_gmem, h_shared_gmem, width, shared_width, choices);  \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1)                                     \
      moe_experts_int4_down_kernel_##NAME(                                                         \
          EXPERTS_PARAMETERS(T), const T* h_gmem, const T* h_shared_gmem, T* rows_gmem, int depth, \
          const fp16* h_lifted_gmem, const float* h_start_gmem, const fp16* zeros_gmem) {          \
    down<T>(EXPERTS(T), {h_gmem, h_lifted_gmem, h_start_gmem, zeros_gmem}, h_shared_gmem,          \
            rows_gmem, depth);                                                                     \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(MANY_THREADS, 2)                                    \
      moe_experts_int4_gate_up_many_kernel_##NAME(EXPERTS_PARAMETERS(T), const T* x_gmem,          \
                                                  int64 x_stride, const T* xr_gmem, T* h_gmem,     \
                                                  T* h_shared_gmem, int width, int shared_width,   \
                                                  int choices, int row_tiles, int vectors) {       \
    gate_up_many<T>(many_shared(), EXPERTS(T), x_gmem, x_stride, xr_gmem, h_gmem, h_shared_gmem,   \
                    width, shared_width, choices, row_tiles, vectors != 0);                        \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(MANY_THREADS, 2)                                    \
      moe_experts_int4_down_many_kernel_##NAME(EXPERTS_PARAMETERS(T), const T* h_gmem,             \
                                               const T* h_shared_gmem, T* rows_gmem, int depth,    \
                                               int row_tiles, int vectors) {                       \
    down_many<T>(many_shared(), EXPERTS(T), h_gmem, h_shared_gmem, rows_gmem, depth, row_tiles,    \
                 vectors != 0);                                                                    \
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
