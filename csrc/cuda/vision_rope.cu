// CUDA C++ kernel of kimi_ops.vision_rope: two-dimensional RoPE, in place, mixed sizes, one launch.
//
//   pair 2i   of q and k  turns by  column * 10000^(-4i / head_dim)
//   pair 2i+1 of q and k  turns by  row    * 10000^(-4i / head_dim)
//
// Grid: (cdiv(L, WARPS)), one warp a patch. It finds the patch's entry in the device's grid table,
// puts the sines and cosines of the head_dim / 2 pairs into shared memory, and goes through q and
// k:
//
//   qkv [L, 3, H, head_dim]   lane l:  vectors l, l + 32, .. of the 2 H head_dim / N in q and k;
//                                      BATCH of them in flight                  (v is not read)
//
// Bytes: q and k once in and once out, 8 H head_dim a patch in 16-bit dtypes, the floor.
// Numerics: frequency and angle in double, sine and cosine right to 8e-8, one rounding at the end.
//
// Source: RoFormer, arXiv 2104.09864; MoonViT, arXiv 2504.07491.
#include "angle.cuh"
#include "grid.cuh"

constexpr int WARPS = 4;
constexpr int MOST_PAIRS = 128;
constexpr int BATCH = 3;  // 9 vectors a lane at 16 heads of 72 in 16 bits: three turns

// N elements at `at_gmem`, of which only N = 2 may be apart or unaligned.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> load_pairs(const T* at_gmem, int64 stride_d) {
  if constexpr (N > 2) return load_vec<T, N>(at_gmem);
  return {at_gmem[0], at_gmem[stride_d]};
}

template <class T, int N>
__device__ __forceinline__ void store_pairs(T* at_gmem, int64 stride_d, const Vec<T, N>& vec) {
  if constexpr (N > 2) {
    store_vec<T, N>(at_gmem, vec);
  } else {
    at_gmem[0] = vec.at[0];
    at_gmem[stride_d] = vec.at[1];
  }
}

template <class T, int N>
__device__ __forceinline__ void vision_rope(T* qkv_gmem,    // [L, 3, H, head_dim]
                                            Integers grid,  // [n, 3]
                                            int64 length, int entries, int heads, int head_dim,
                                            int64 stride_l, int64 stride_part, int64 stride_h,
                                            int64 stride_d) {
  __shared__ SinCos turn_smem[WARPS][MOST_PAIRS];
  const int lane = threadIdx.x % WARP;
  SinCos* turn = turn_smem[threadIdx.x / WARP];
  const int64 patch = static_cast<int64>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (patch >= length) return;  // whole warps, and no barrier of the block follows
  const Place at = locate<false>(static_cast<int>(patch), grid, entries);
  if (!at.found) return;
  const int in_frame = at.place % (at.h * at.w);
  const int row = in_frame / at.w, column = in_frame % at.w;
  for (int pair = lane; pair < head_dim / 2; pair += WARP) {
    const double exponent = -static_cast<double>(pair / 2 * 4) / head_dim;
    const double frequency = exp2(exponent * 13.287712379549449);  // log2(10000)
    turn[pair] = sin_cos((pair % 2 == 0 ? column : row) * frequency);
  }
  __syncwarp();

  T* patch_gmem = qkv_gmem + patch * stride_l;
  const unsigned per_head = head_dim / N, vectors = 2 * heads * per_head;
  for (unsigned start = lane; start < vectors; start += BATCH * WARP) {
    Vec<T, N> vec[BATCH];
    T* at_gmem[BATCH];
    int first_pair[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const unsigned v = start + i * WARP;
      if (v < vectors) {
        const unsigned of_all_heads = v / per_head, part = of_all_heads / heads;
        const int d = v % per_head * N;
        first_pair[i] = d / 2;
        at_gmem[i] =
            patch_gmem + part * stride_part + of_all_heads % heads * stride_h + d * stride_d;
        vec[i] = load_pairs<T, N>(at_gmem[i], stride_d);
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (start + i * WARP < vectors) {
#pragma unroll
        for (int e = 0; e < N; e += 2) {
          const float2 pair = rotated(to_float(vec[i].at[e]), to_float(vec[i].at[e + 1]),
                                      turn[first_pair[i] + e / 2]);
          vec[i].at[e] = from_float<T>(pair.x);
          vec[i].at[e + 1] = from_float<T>(pair.y);
        }
        store_pairs<T, N>(at_gmem[i], stride_d, vec[i]);
      }
    }
  }
}

#define KERNEL(T, N, NAME)                                                                      \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP) vision_rope_kernel_##NAME(          \
      T* qkv_gmem, const void* grid_gmem, int grid_bytes, int64 length, int entries, int heads, \
      int head_dim, int64 stride_l, int64 stride_part, int64 stride_h, int64 stride_d) {        \
    vision_rope<T, N>(qkv_gmem, {grid_gmem, grid_bytes}, length, entries, heads, head_dim,      \
                      stride_l, stride_part, stride_h, stride_d);                               \
  }

KERNEL(bf16, 8, bf16_vec)
KERNEL(fp16, 8, fp16_vec)
KERNEL(float, 4, fp32_vec)
KERNEL(bf16, 2, bf16_each)
KERNEL(fp16, 2, fp16_each)
KERNEL(float, 2, fp32_each)
