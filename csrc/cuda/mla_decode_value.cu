// CUDA C++ kernel of kimi_ops.mla_decode_value, its second stage; the first is mla_decode's.
//
//   value[b, s, h] = w_uv[h] @ (sum_n weight[n] * part[b, n, (s, h)])     weight: exp(lse - max)
//
// Grid (token tiles, H, ceil(V / 64)), eight warps. A block joins the splits of up to 16 tokens of
// one head, and multiplies the result with 64 rows of the head's weight, which are copied
// meanwhile:
//
//   part [B, n, (S, H), C]      x [16, 512] 16 bits            w [64, 512]
//     token t: warp w has   ->  shared memory, k wide    x     warp w has rows 8 w .., n wide
//     columns 64 w ..            repeated up to 16 rows        = value [16, 8] of each warp
//
// A warp has up to 16 splits in flight, two columns a lane (one where C is odd). The partials are
// read once for every 64 values of a head, from L2; the weight once for every tile of tokens.
//
// Bytes: w_uv, 8.4 MB at 64 heads, is the floor of few tokens. Shared memory: 86 KiB, of which the
// weight is 65; two blocks an SM where it has 164 KiB or more.
// Numerics: as the two ops one after the other: the joined result is rounded to the dtype of the
// weight, the products are summed in float32, one rounding at the end. Splits are added up in their
// own order, whatever else is in the batch.
//
// Source: DeepSeek-V2, arXiv 2405.04434 section 2.1; split over keys: Flash-Decoding, 2023.
#include "mla_decode_combine.cuh"

constexpr int VALUE_WARPS = 8, VALUES = 8 * VALUE_WARPS, VALUE_TOKENS = 16;
constexpr int VALUE_SPLITS = 16;  // in flight; 32 spilled on sm_100a and sm_120
constexpr int VALUE_ROW_BYTES = 2 * LATENT + 16;

struct ValueShared {
  unsigned char w[VALUES * VALUE_ROW_BYTES];
  unsigned char x[VALUE_TOKENS * VALUE_ROW_BYTES];
  float weight[VALUE_WARPS][MAX_SPLITS];
};

struct ValueWeight {
  const unsigned char* gmem;  // [H, V, C], strides in bytes
  int64 stride_h, stride_v, stride_c;
  int heads, values, c;
  bool vectors;  // 16-byte accesses reach every row
};

template <class T, int N>
__device__ __forceinline__ void mla_decode_value_combine(
    const float* part_gmem,      // [B, splits, S * H, C]
    const float* part_lse_gmem,  // [B, S * H, splits]
    const int* length_gmem,      // [B]
    const ValueWeight& w_uv,
    T* value_gmem,  // [B, S, H, V]
    int tokens, int new_tokens, int tile_tokens, int capacity, int splits, int min_blocks,
    int64 stride_length) {
  extern __shared__ __align__(16) unsigned char shared_smem[];
  ValueShared& shared = *reinterpret_cast<ValueShared*>(shared_smem);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int head = blockIdx.y, first_value = blockIdx.z * VALUES, c = w_uv.c;
  const int first_token = blockIdx.x * tile_tokens;
  const int count = min(tile_tokens, tokens - first_token);

  const unsigned char* w_gmem = w_uv.gmem + head * w_uv.stride_h;
  const int part_of_row = threadIdx.x % THREADS_A_ROW;
  for (int v = threadIdx.x / THREADS_A_ROW; v < VALUES; v += VALUE_WARPS * WARP / THREADS_A_ROW) {
    const bool present = first_value + v < w_uv.values;
    const unsigned char* row_gmem = w_gmem + (present ? first_value + v : 0) * w_uv.stride_v;
    unsigned char* row_smem = shared.w + v * VALUE_ROW_BYTES;
    if (w_uv.vectors) {
      copy_field_async<2 * LATENT>(row_smem, row_gmem, present ? 2 * c : 0, part_of_row);
    } else {
      copy_field(row_smem, row_gmem, w_uv.stride_c, 2, present ? c : 0, 2 * LATENT, part_of_row);
    }
  }
  copy_async_commit();

  const int rows = new_tokens * w_uv.heads;
  const int64 stride = static_cast<int64>(rows) * c;  // of a split
  for (int t = 0; t < count; ++t) {
    const int b = (first_token + t) / new_tokens;
    const int row = (first_token + t) % new_tokens * w_uv.heads + head;
    const int length = min(max(length_gmem[b * stride_length], 0), capacity);
    const int used = Bounds(length, 0, splits, min_blocks).used;
    const float* row_gmem = part_gmem + static_cast<int64>(b) * splits * stride + row * int64{c};
    const int64 lse_row = static_cast<int64>(b) * rows + row;
    __syncwarp();  // the weights of the token before have been read
    const Weights weights(part_lse_gmem + lse_row * splits, used, shared.weight[warp]);
    for (int d = threadIdx.x * N; d < LATENT; d += VALUE_WARPS * WARP * N) {
      Vec<float, N> sum = {};
      if (d < c) {
        for (int first = 0; first < used; first += VALUE_SPLITS) {
          Partials<N, VALUE_SPLITS> partials;
          partials.load(row_gmem + first * stride + d, stride, first, 1, used);
          partials.add_to(sum, weights, first, 1, used);
        }
      }
      Vec<T, N> x;
#pragma unroll
      for (int e = 0; e < N; ++e) x.at[e] = from_float<T>(sum.at[e] * weights.norm());
      *reinterpret_cast<Vec<T, N>*>(shared.x + t * VALUE_ROW_BYTES + 2 * d) = x;
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  float acc[2][4] = {};  // of even and odd steps, so that a product waits for fewer others
  const unsigned char* x_row_smem =
      shared.x + min(lane % 16, count - 1) * VALUE_ROW_BYTES + lane / 16 * 16;
  const unsigned char* w_row_smem =
      shared.w + (warp * 8 + lane % 8) * VALUE_ROW_BYTES + lane / 8 * 16;
#pragma unroll 4
  for (int step = 0; step < LATENT / 32; ++step) {
    unsigned w_rmem[4];
    load_matrices(w_rmem, w_row_smem + step * 64);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned x_rmem[4];
      load_matrices(x_rmem, x_row_smem + step * 64 + half * 32);
      multiply_add<T>(acc[half], x_rmem, w_rmem[2 * half], w_rmem[2 * half + 1]);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int t = lane / 4 + e / 2 * 8, v = first_value + warp * 8 + lane % 4 * 2 + e % 2;
    if (t < count && v < w_uv.values) {
      const int64 row = static_cast<int64>(first_token + t) * w_uv.heads + head;
      value_gmem[row * w_uv.values + v] = from_float<T>(acc[0][e] + acc[1][e]);
    }
  }
}

#define KERNEL(T, NAME, N, COLUMNS)                                                                \
  extern "C" __global__ void __launch_bounds__(VALUE_WARPS* WARP, 2)                               \
      mla_decode_value_combine_kernel_##NAME##_##COLUMNS(                                          \
          const float* part_gmem, const float* part_lse_gmem, const int* length_gmem,              \
          const unsigned char* w_uv_gmem, T* value_gmem, int tokens, int new_tokens, int heads,    \
          int values, int c, int tile_tokens, int capacity, int splits, int min_blocks,            \
          int w_vectors, int64 stride_w_h, int64 stride_w_v, int64 stride_w_c,                     \
          int64 stride_length) {                                                                   \
    mla_decode_value_combine<T, N>(                                                                \
        part_gmem, part_lse_gmem, length_gmem,                                                     \
        {w_uv_gmem, stride_w_h, stride_w_v, stride_w_c, heads, values, c, w_vectors != 0},         \
        value_gmem, tokens, new_tokens, tile_tokens, capacity, splits, min_blocks, stride_length); \
  }
#define KERNELS(T, NAME) KERNEL(T, NAME, 2, pairs) KERNEL(T, NAME, 1, each)

KERNELS(bf16, bf16)
KERNELS(fp16, fp16)
