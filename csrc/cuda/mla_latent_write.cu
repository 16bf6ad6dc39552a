// CUDA C++ kernel of kimi_ops.mla_latent_write: both norms, RoPE and the paged write, one launch.
//
//   row (q | c | k) of qkv_a:   q_a = rms_norm(q)     kv_cache[slot] = (rms_norm(c) | rope(k))
//
// Grid: (T), one block of four warps a token, all loads of which are in flight at once:
//
//   qkv_a [T, 1536 + 512 + 64]   |-------- q 1536 --------|--- c 512 ---| k 64 |
//                                  warps 0, 1, 2: two       warp 3: two    warp 3: a
//                                  vectors a lane           vectors a lane pair a lane
//   q_a [T, 1536]                |--------- q_a ----------|
//   kv_cache, page slot / P, row slot % P                 |--- c -------| k    |
//
// A slot outside the cache stores nothing there, and any but -1 makes the token's q_a NaN.
//
// The cache has the dtype of qkv_a, or is the fp8 format: e4m3 codes of c, four times the float32
// scale max|c| / 448 (at least 2^-126), k in bfloat16. A row that is not finite has NaN codes.
//
// Bytes: each row once in and once out, 8,448 a token in 16 bits; weights come from L2. Bound by
// memory, and up to some hundred tokens by one trip there and back. Shared memory: 24 bytes.
// Numerics: sums and roots in float32 (double for float32 rows); rounded before and after the
// weight; the angle is position * inv_freq in float32, as in the reference.
//
// Source: DeepSeek-V2, arXiv 2405.04434 section 2.1.
#include "angle.cuh"
#include "fp8.cuh"
#include "rows.cuh"

constexpr int Q_WARPS = 3;
constexpr int SCALE_COPIES = 4;  // the codes of the next field stay aligned to 16 bytes

struct Widths {
  int q, c, r;
};

// What a lane turns: two neighbouring elements of k, and their frequency.
struct Pair {
  float x, y, inv_freq;
};

template <class T, int N>
__device__ __forceinline__ float largest_of(const Vec<T, N>& vec) {
  float most = 0.0f;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float size = fabsf(to_float(vec.at[e]));
    most = size > most || isnan(size) ? size : most;  // fmaxf would lose a NaN
  }
  return most;
}

__device__ __forceinline__ float warp_largest(float most) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(ALL_LANES, most, lanes);
    most = other > most || isnan(other) ? other : most;
  }
  return most;
}

// The latent of one token, by one warp, into an entry of fp8 format.
template <class T, int N>
__device__ __forceinline__ void write_fp8(const HeldRow<T, N, WARP>& latent,
                                          const HeldRow<T, N, WARP>& weight, Factor factor,
                                          unsigned char* entry_gmem, int64 stride_d) {
  const int lane = threadIdx.x % WARP, width = latent.columns;
  float most = 0.0f;
  latent.each_with(weight, [&](int, const Vec<T, N>& vec, const Vec<T, N>& scale) {
    const float here = largest_of(normalised<T, N>(vec, scale, factor));
    most = here > most || isnan(here) ? here : most;
  });
  most = warp_largest(most);
  const bool finite = isfinite(most);
  const float smallest = __uint_as_float(0x00800000u);  // 2^-126
  const float scale = finite ? fmaxf(most / LARGEST_E4M3, smallest) : __uint_as_float(0x7fc00000u);
  const float inverse = 1.0f / scale;
  latent.each_with(weight, [&](int d, const Vec<T, N>& vec, const Vec<T, N>& weights) {
    const Vec<T, N> y = normalised<T, N>(vec, weights, factor);
    Vec<unsigned char, N> codes;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      codes.at[e] = finite ? to_e4m3(to_float(y.at[e]) * inverse) : NAN_E4M3;
    }
    store_vec<unsigned char, N>(entry_gmem + d * stride_d, codes);
  });
  if (lane < SCALE_COPIES * 4) {
    entry_gmem[(width + lane) * stride_d] =
        static_cast<unsigned char>(__float_as_uint(scale) >> 8 * (lane % 4));
  }
}

template <class T, int N>
__device__ __forceinline__ void mla_latent_write(
    const T* qkv_a_gmem,           // [T, Q+C+R]
    const T* q_norm_weight_gmem,   // [Q]
    const T* kv_norm_weight_gmem,  // [C]
    Integers positions,            // [T]
    const float* inv_freq_gmem,    // [R/2]
    Integers slot_mapping,         // [T]
    void* kv_cache_gmem,           // [num_pages, P, C+R] T, or [num_pages, P, C+16+2R] bytes
    T* q_a_gmem,                   // [T, Q], contiguous
    bool is_fp8, int64 num_slots, int page_size, Widths widths, int64 stride_x_t, int64 stride_x_d,
    int64 stride_wq, int64 stride_wc, int64 stride_position, int64 stride_freq, int64 stride_slot,
    int64 stride_page, int64 stride_row, int64 stride_d, float eps) {
  using Sum = typename Statistic<T>::type;
  __shared__ Sum partial_smem[Q_WARPS];
  const int64 token = blockIdx.x;
  const int lane = threadIdx.x % WARP;
  const T* row_gmem = qkv_a_gmem + token * stride_x_t;
  const int64 slot = slot_mapping[token * stride_slot];
  const bool inside = slot >= 0 && slot < num_slots;

  if (threadIdx.x < Q_WARPS * WARP) {
    HeldRow<T, N, Q_WARPS * WARP> q(row_gmem, stride_x_d, threadIdx.x, widths.q);
    HeldRow<T, N, Q_WARPS * WARP> weight(q_norm_weight_gmem, stride_wq, threadIdx.x, widths.q);
    Sum squares = 0;
    q.each([&](int, const Vec<T, N>& vec) { squares += sum_of_squares<Sum>(vec); });
    squares = warp_sum(squares);
    if (lane == 0) partial_smem[threadIdx.x / WARP] = squares;
    named_barrier_sync(1, Q_WARPS * WARP);
    squares = partial_smem[0] + partial_smem[1] + partial_smem[2];
    Factor factor = rms_factor(squares, widths.q, eps);
    // A wrong slot must be seen: NaN in its q_a. -1 is padding.
    if (!inside && slot != -1) factor.high = __uint_as_float(0x7fc00000u);
    q.make_anew();
    weight.make_anew();
    T* q_a_row_gmem = q_a_gmem + token * widths.q;
    q.each_with(weight, [&](int d, const Vec<T, N>& vec, const Vec<T, N>& scale) {
      store_vec<T, N>(q_a_row_gmem + d, normalised<T, N>(vec, scale, factor));
    });
    return;
  }

  const T* c_gmem = row_gmem + widths.q * stride_x_d;
  const T* k_gmem = c_gmem + widths.c * stride_x_d;
  HeldRow<T, N, WARP> latent(c_gmem, stride_x_d, lane, widths.c);
  HeldRow<T, N, WARP> weight(kv_norm_weight_gmem, stride_wc, lane, widths.c);
  const int pairs = widths.r / 2;
  auto pair_of = [&](int pair) -> Pair {
    return {to_float(k_gmem[2 * pair * stride_x_d]), to_float(k_gmem[(2 * pair + 1) * stride_x_d]),
            inv_freq_gmem[pair * stride_freq]};
  };
  Pair mine = {};
  if (lane < pairs) mine = pair_of(lane);
  const float position = static_cast<float>(positions[token * stride_position]);
  if (!inside) return;  // only now: what is loaded does not wait for the slot
  Sum squares = 0;
  latent.each([&](int, const Vec<T, N>& vec) { squares += sum_of_squares<Sum>(vec); });
  const Factor factor = rms_factor(warp_sum(squares), widths.c, eps);
  latent.make_anew();
  weight.make_anew();
  const int64 entry = slot / page_size * stride_page + slot % page_size * stride_row;
  T* entry_gmem = static_cast<T*>(kv_cache_gmem) + entry;
  unsigned char* bytes_gmem = static_cast<unsigned char*>(kv_cache_gmem) + entry;
  if (is_fp8) {
    write_fp8<T, N>(latent, weight, factor, bytes_gmem, stride_d);
  } else {
    latent.each_with(weight, [&](int d, const Vec<T, N>& vec, const Vec<T, N>& scale) {
      store_vec<T, N>(entry_gmem + d * stride_d, normalised<T, N>(vec, scale, factor));
    });
  }
  for (int pair = lane; pair < pairs; pair += WARP) {
    if (pair != lane) mine = pair_of(pair);
    const float2 turned = rotated(mine.x, mine.y, sin_cos(position * mine.inv_freq));
    if (is_fp8) {
      const unsigned bits = to_bf16x2(rounded<T>(turned.x), rounded<T>(turned.y));
      const int64 at = widths.c + 4 * SCALE_COPIES + 4 * pair;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        bytes_gmem[(at + b) * stride_d] = static_cast<unsigned char>(bits >> 8 * b);
      }
    } else {
      entry_gmem[(widths.c + 2 * pair) * stride_d] = from_float<T>(turned.x);
      entry_gmem[(widths.c + 2 * pair + 1) * stride_d] = from_float<T>(turned.y);
    }
  }
}

#define KERNEL(T, N, NAME)                                                                     \
  extern "C" __global__ void __launch_bounds__((Q_WARPS + 1) * WARP, 1)                        \
      mla_latent_write_kernel_##NAME(                                                          \
          const T* qkv_a_gmem, const T* q_norm_weight_gmem, const T* kv_norm_weight_gmem,      \
          const void* positions_gmem, int position_bytes, const float* inv_freq_gmem,          \
          const void* slot_mapping_gmem, int slot_bytes, void* kv_cache_gmem, T* q_a_gmem,     \
          int is_fp8, int64 num_slots, int page_size, int q, int c, int r, int64 stride_x_t,   \
          int64 stride_x_d, int64 stride_wq, int64 stride_wc, int64 stride_position,           \
          int64 stride_freq, int64 stride_slot, int64 stride_page, int64 stride_row,           \
          int64 stride_d, float eps) {                                                         \
    mla_latent_write<T, N>(                                                                    \
        qkv_a_gmem, q_norm_weight_gmem, kv_norm_weight_gmem, {positions_gmem, position_bytes}, \
        inv_freq_gmem, {slot_mapping_gmem, slot_bytes}, kv_cache_gmem, q_a_gmem, is_fp8,       \
        num_slots, page_size, {q, c, r}, stride_x_t, stride_x_d, stride_wq, stride_wc,         \
        stride_position, stride_freq, stride_slot, stride_page, stride_row, stride_d, eps);    \
  }

KERNEL(bf16, 8, bf16_vec)
KERNEL(fp16, 8, fp16_vec)
KERNEL(float, 4, fp32_vec)
KERNEL(bf16, 1, bf16_each)
KERNEL(fp16, 1, fp16_each)
KERNEL(float, 1, fp32_each)
