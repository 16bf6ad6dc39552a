// CUDA C++ kernel of kimi_ops.moe_select: one warp a row of logits, one launch.
//
//   s = sigmoid(logits);  ids = the K largest of s + bias (in the kept groups);  w = s[ids]
//
// Grid: (cdiv(T, warps of a block)); blocks of one warp while there are few rows, of four above:
//
//   logits [T, E]   block 0: |row 0 ........|  warp 0      a row stays in the registers of a warp
//                            |row 1 ........|  warp 1      (select.cuh): 12 logits a lane up to
//                   block 1: |row 4 ........|  warp 0      384 experts, 32 up to 1,024
//
// Bytes: logits once, 4 T E, and 8 T K out; the K logits of the chosen are read again, from L1.
// Shared memory: none without groups; with them 4 (E + n_group) bytes a warp. Bound by integer
// operations: 2 an expert and round. Numerics: float32; weights within two units in the last place
// before they are normalised. A row's result depends on the row alone.
//
// Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2 (auxiliary-loss-free balancing).
#include "select.cuh"

extern __shared__ float groups_smem[];  // [warps, E + n_group], with groups

#define KERNEL(N, PARTS)                                                                       \
  extern "C" __global__ void __launch_bounds__(4 * WARP, 4) moe_select_kernel_##N(SELECTION) { \
    const int64 row = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y;               \
    if (row >= tokens) return; /* whole warps */                                               \
    select_row<N, PARTS>(SELECTED, row, groups_smem + threadIdx.y * (experts + n_group));      \
  }

// Logits of eight parts come in two steps; registers for four blocks an SM.
KERNEL(12, 4)
KERNEL(32, 1)
