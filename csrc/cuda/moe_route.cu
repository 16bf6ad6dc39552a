// CUDA C++ kernels of kimi_ops.moe_route and moe_route_sort: gate product and selection, and the
// tables of what was selected, one launch up to 64 tokens.
//
//   logits = float32(x) @ float32(gate)^T;  ids and weights of them as select.cuh has it
//
// The gate of 384 experts of 7,168, 5.5 MB, has to come from memory once: that takes every SM. The
// selection takes a warp a token, and all of its logits. Both fit one launch because the block
// that finishes last knows that all logits are written, and selects:
//
//   T <= 64    block = (16 experts, 8 tokens, 1/4 or 1/2 of D) up to 16 tokens, 16 tokens and 1/2
//              or all of D above, so that about 96 blocks run at once; a warp a token
//              tokens 0-7:    | D 0: e 0-15, 16-31, .. | D 1: e 0-15, .. | ..   24 tiles x parts
//              tokens 8-15:   | ..                       the last one of each: a warp a token adds
//                                                        the parts in their order, selects; the
//                                                        last of those sorts (moe_route_sort.cuh)
//   T > 64     tiles of 128 experts and 64 tokens, 1 to 8 parts, then moe_select.cu in a second
//              launch; more than 384 experts go this way at every T, in batch-invariant mode every
//              call, with 8 parts
//   operands of two dtypes, of float32, or of rows that are no multiple of 16 bytes: multiplied in
//              float32, tiles of 32 x 32, two launches
//
// Budget: few tokens 256 or 512 threads, 6.5 or 21.5 KiB of shared memory, one block an SM; many
// 128 threads and 72.4 KiB, two blocks an SM. Bytes: the gate from memory once (from L2 once for
// each 8 or 16 tokens), x from L2 once for each 16 experts, 8 T E for a part. At one token the
// floor is 5.5 MB, 1.6 us at 3.35 TB/s.
//
// Numerics: products of 16-bit numbers are exact, sums are float32: a tensor core's own go over
// 1/32 of D at one token, 1/16 at 64. No float atomics: the runs of D that warps and blocks have
// are fixed by the shapes and the number of SMs, and are added in their order.
//
// Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2 (auxiliary-loss-free balancing).
#include "moe_route_any.cuh"
#include "moe_route_few.cuh"
#include "moe_route_many.cuh"
#include "moe_route_sort.cuh"
#include "select.cuh"

extern __shared__ uint4 dynamic_smem[];

// Of a launch's counters: one for each group of tokens, of which there are at most 4, and this one.
constexpr int GROUPS_DONE = 7;

template <class T, int TILES>
__device__ __forceinline__ void route_few(Selection selection, const Operands<T>& from,
                                          float* logits_gmem, int tokens, int* counters_gmem,
                                          const SortTables& tables) {
  constexpr int TOKENS = 8 * TILES, THREADS = FEW_WARPS<TILES> * WARP;
  __shared__ alignas(16) float bias_smem[FEW_EXPERTS];
  const int experts = selection.experts;
  const int tiles = (experts + FEW_EXPERTS_OF_BLOCK - 1) / FEW_EXPERTS_OF_BLOCK;
  const int tile = blockIdx.x % tiles, part = blockIdx.x / tiles % from.parts;
  const int group = blockIdx.x / (tiles * from.parts);
  // Whoever selects then has the bias; its way from memory is hidden behind the gate's.
#pragma unroll
  for (int e = threadIdx.x; e < FEW_EXPERTS; e += THREADS) {
    copy_async_4(bias_smem + e, selection.bias_gmem + min(e, experts - 1) * selection.stride_bias,
                 e < experts);
  }
  copy_async_commit();
  multiply_few<T, TILES>(from, tile * FEW_EXPERTS_OF_BLOCK, group * TOKENS, part, experts, tokens,
                         logits_gmem + part * selection.stride_s, selection.stride_t);
  copy_async_wait<0>();
  if (!is_last(counters_gmem + group, tiles * from.parts)) return;
  selection.bias_gmem = bias_smem;
  selection.stride_bias = 1;
  selection.vectors = true;  // past the last expert, too, there is something to read
  const int warp = threadIdx.x / WARP;
  float* scratch_smem =
      reinterpret_cast<float*>(dynamic_smem) + warp * (experts + selection.n_group);  // with groups
  const int t = group * TOKENS + warp;
  if (t < tokens) select_row<12, 4 / TILES>(selection, t, scratch_smem);
  if (tables.order_gmem == nullptr) return;
  const int groups = (tokens + TOKENS - 1) / TOKENS;
  if (groups > 1 && !is_last(counters_gmem + GROUPS_DONE, groups)) return;
  sort_pairs<THREADS>(tables, selection.ids_gmem, tokens * selection.top_k);
}

#define FEW(T, TILES, NAME)                                                                        \
  extern "C" __global__ void __launch_bounds__(FEW_WARPS<TILES>* WARP, 1)                          \
      moe_route_few_kernel_##NAME##_##TILES(SELECTION, const T* x_gmem, const T* gate_gmem,        \
                                            int64 stride_x_t, int64 stride_gate_e, int columns,    \
                                            int* counters_gmem, int* order_gmem,                   \
                                            int* offsets_gmem, int first, int local) {             \
    route_few<T, TILES>(SELECTED, {x_gmem, gate_gmem, stride_x_t, stride_gate_e, columns, splits}, \
                        logits_gmem, tokens, counters_gmem,                                        \
                        {order_gmem, offsets_gmem, first, local});                                 \
  }
FEW(bf16, 1, bf16)
FEW(bf16, 2, bf16)
FEW(fp16, 1, fp16)
FEW(fp16, 2, fp16)

// Where a block of the two kernels below is: tiles of experts are next to each other in the grid,
// so that x comes from memory once.
struct Tile {
  int expert, token, part;

  __device__ __forceinline__ Tile(int experts, int wide, int high)
      : expert(blockIdx.x % ((experts + wide - 1) / wide) * wide),
        token(blockIdx.x / ((experts + wide - 1) / wide) * high),
        part(blockIdx.y) {}
};

#define MANY(T, NAME)                                                                             \
  extern "C" __global__ void __launch_bounds__(MANY_WARPS* WARP, 2) moe_route_many_kernel_##NAME( \
      float* logits_gmem, int64 stride_s, int64 stride_t, int tokens, int experts, int parts,     \
      const T* x_gmem, const T* gate_gmem, int64 stride_x_t, int64 stride_gate_e, int columns) {  \
    const Tile tile(experts, MANY_EXPERTS, MANY_TOKENS);                                          \
    multiply_many<T>({x_gmem, gate_gmem, stride_x_t, stride_gate_e, columns, parts}, tile.expert, \
                     tile.token, tile.part, experts, tokens, logits_gmem + tile.part * stride_s,  \
                     stride_t);                                                                   \
  }
MANY(bf16, bf16)
MANY(fp16, fp16)

extern "C" __global__ void __launch_bounds__(ANY_THREADS)
    moe_route_any_kernel(float* logits_gmem, int64 stride_s, int64 stride_t, int tokens,
                         int experts, int parts, const void* x_gmem, const void* gate_gmem,
                         int x_dtype, int gate_dtype, int64 stride_x_t, int64 stride_x_d,
                         int64 stride_gate_e, int64 stride_gate_d, int columns) {
  const Tile tile(experts, ANY_TILE, ANY_TILE);
  multiply_any({x_gmem, x_dtype, stride_x_t, stride_x_d},
               {gate_gmem, gate_dtype, stride_gate_e, stride_gate_d}, tile.expert, tile.token,
               tile.part, parts, columns, experts, tokens, logits_gmem + tile.part * stride_s,
               stride_t);
}
