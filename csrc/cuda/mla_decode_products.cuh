// The two products of `mla_decode`'s first stage and how they are dealt out to warps; drawn in
// `mla_decode_split.cuh`.
#pragma once
#include "mla_decode_tile.cuh"

constexpr int TOKEN_GROUPS = 2;  // of 16 tokens, one warp's
constexpr int STEPS = WIDTH / 16;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr int P_BYTES = 2 * TOKENS + 16;  // of a row of p, for distinct banks

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7fc00000u); }

template <int ROWS_>
struct Shape {
  static constexpr int ROWS = ROWS_;
  static constexpr int M_GROUPS = ROWS == 64 ? 2 : 1;
  static constexpr int M_TILES = ROWS == 16 ? 1 : 2;  // of 16 rows, that a warp has scores of
  static constexpr int K_GROUPS = ROWS == 32 ? 4 : 2;
  static constexpr int WARPS = M_GROUPS * TOKEN_GROUPS * K_GROUPS;
  static constexpr int K_STEPS = STEPS / K_GROUPS;  // of 16 columns
  static constexpr int PARTS = 2 * M_TILES;         // of a warp's scores: 16 rows x 8 tokens each
  static constexpr int OWN = PARTS / K_GROUPS;      // of them it owns, beside each other
  static constexpr int OWNERS = TOKEN_GROUPS * 2 / OWN;  // of a row
  static constexpr int COLUMNS = LATENT / WARPS;
  static constexpr bool HOLDS_Q = ROWS < 64;
  static constexpr int LATENT_STEPS = LATENT / 16 - (K_GROUPS - 1) * K_STEPS;  // of the last group
};

template <class S>
struct alignas(16) Shared {
  unsigned char tile[TOKENS * ROW_BYTES];
  // The second tile; or the tokens of fp8 format. Rows of queries pass through it.
  unsigned char other[TOKENS * ROW_BYTES];
  unsigned char q[S::HOLDS_Q ? 16 : S::ROWS * ROW_BYTES];
  unsigned char p[S::ROWS * P_BYTES];
  float4 partial[S::WARPS / S::K_GROUPS][S::K_GROUPS][S::K_GROUPS - 1][S::OWN][WARP];
  float of_owner[S::OWNERS][S::ROWS];  // maxima; at the end, sums
  float fade[S::ROWS];                 // at the end, maxima
  float scale[TOKENS];                 // of fp8 codes
  int lost[S::WARPS];                  // whether a warp met a page that is none
};

// First and one past the last block of 32 tokens of a split, and how many splits hold any; the
// blocks of a sequence are dealt out evenly, at least `min_blocks` to a split.
struct Bounds {
  int first, last, used;

  __device__ __forceinline__ Bounds(int length, unsigned split, unsigned splits,
                                    unsigned min_blocks) {
    const unsigned blocks = (length + TOKENS - 1) / TOKENS;
    const unsigned each = max((blocks + splits - 1) / splits, min_blocks);
    first = min(split * each, blocks);
    last = min(first + each, blocks);
    used = (blocks + each - 1) / each;
  }
};

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1);
template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&d)[4], const unsigned (&a)[4],
                                                   unsigned b0, unsigned b1) {
  mma_m16n8k16_bf16(d, d, a[0], a[1], a[2], a[3], b0, b1);
}
template <>
__device__ __forceinline__ void multiply_add<fp16>(float (&d)[4], const unsigned (&a)[4],
                                                   unsigned b0, unsigned b1) {
  mma_m16n8k16_fp16(d, d, a[0], a[1], a[2], a[3], b0, b1);
}

template <class T>
__device__ __forceinline__ unsigned pair_of(float low, float high);
template <>
__device__ __forceinline__ unsigned pair_of<bf16>(float low, float high) {
  return to_bf16x2(low, high);
}
template <>
__device__ __forceinline__ unsigned pair_of<fp16>(float low, float high) {
  return to_fp16x2(low, high);
}

// Where the warp and the lane are in the scores.
template <class S>
struct Place {
  int lane, warp, k_group, token_group, m_group;
  int row;    // first of the two rows that this lane has of the scores it owns; the other is 8 on
  int token;  // first of the tokens that it has there: this one and the next, and 8 on
  int owner;  // which of the row's owners it is

  __device__ __forceinline__ Place() {
    lane = threadIdx.x % WARP;
    warp = threadIdx.x / WARP;
    k_group = warp % S::K_GROUPS;
    token_group = warp / S::K_GROUPS % TOKEN_GROUPS;
    m_group = warp / (S::K_GROUPS * TOKEN_GROUPS);
    const int part = k_group * S::OWN;  // (rows of 16, tokens of 8) in this order
    row = (m_group * S::M_TILES + part / 2) * 16 + lane / 4;
    token = token_group * 16 + part % 2 * 8 + lane % 4 * 2;
    owner = token_group * (2 / S::OWN) + part % 2;
  }
  __device__ __forceinline__ const unsigned char* q_row(const unsigned char* q_smem) const {
    return q_smem + (m_group * S::M_TILES * 16 + lane % 16) * ROW_BYTES +
           k_group * S::K_STEPS * 32 + lane / 16 * 16;
  }
  __device__ __forceinline__ const unsigned char* k_row(const unsigned char* tile_smem) const {
    return tile_smem + (token_group * 16 + lane / 16 * 8 + lane % 8) * ROW_BYTES +
           k_group * S::K_STEPS * 32 + lane / 8 % 2 * 16;
  }
};

template <class S>
using QueryFragments = unsigned[S::HOLDS_Q ? S::K_STEPS : 1][S::M_TILES][4];

// This warp's own scores of a block, summed over all columns.
template <class T, class S>
__device__ __forceinline__ void scores_of(float (&own)[S::OWN][4], const QueryFragments<S>& q_rmem,
                                          const unsigned char* tile_smem, Shared<S>& shared,
                                          const Place<S>& at, bool fp8) {
  float score[S::PARTS][4] = {};
  const unsigned char* k_row_smem = at.k_row(tile_smem);
  const unsigned char* q_row_smem = at.q_row(shared.q);
  const bool has_rope = at.k_group == S::K_GROUPS - 1;
  auto scale_tokens = [&] {
#pragma unroll
    for (int part = 0; part < S::PARTS; ++part) {
      const int token = at.token_group * 16 + part % 2 * 8 + at.lane % 4 * 2;
#pragma unroll
      for (int e = 0; e < 4; ++e) score[part][e] *= shared.scale[token + e % 2];
    }
  };
#pragma unroll
  for (int step = 0; step < S::K_STEPS; ++step) {
    if (step == S::LATENT_STEPS && fp8 && has_rope) scale_tokens();
    unsigned k_rmem[4];
    load_matrices(k_rmem, k_row_smem + step * 32);
#pragma unroll
    for (int m = 0; m < S::M_TILES; ++m) {
      unsigned q_tile[4];
      if constexpr (S::HOLDS_Q) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q_tile[i] = q_rmem[step][m][i];
      } else {
        load_matrices(q_tile, q_row_smem + m * 16 * ROW_BYTES + step * 32);
      }
      multiply_add<T>(score[2 * m], q_tile, k_rmem[0], k_rmem[1]);
      multiply_add<T>(score[2 * m + 1], q_tile, k_rmem[2], k_rmem[3]);
    }
  }
  if (fp8 && !has_rope) scale_tokens();

  auto& partial = shared.partial[at.warp / S::K_GROUPS];
#pragma unroll
  for (int part = 0; part < S::PARTS; ++part) {
    const int owner = part / S::OWN;
    if (owner == at.k_group) {
#pragma unroll
      for (int e = 0; e < 4; ++e) own[part % S::OWN][e] = score[part][e];
    } else {
      const int from = (at.k_group - owner + S::K_GROUPS) % S::K_GROUPS - 1;
      partial[owner][from][part % S::OWN][at.lane] = {score[part][0], score[part][1],
                                                      score[part][2], score[part][3]};
    }
  }
  // Numbers that are constants: for one in a register all 16 barriers of a block are set aside.
#pragma unroll
  for (int adders = 0; adders < S::WARPS / S::K_GROUPS; ++adders) {
    if (at.warp / S::K_GROUPS == adders) named_barrier_sync(1 + adders, S::K_GROUPS * WARP);
  }
#pragma unroll
  for (int from = 0; from < S::K_GROUPS - 1; ++from) {
#pragma unroll
    for (int part = 0; part < S::OWN; ++part) {
      const float4 more = partial[at.k_group][from][part][at.lane];
      own[part][0] += more.x;
      own[part][1] += more.y;
      own[part][2] += more.z;
      own[part][3] += more.w;
    }
  }
}

// acc += p k for this warp's columns.
template <class T, class S>
__device__ __forceinline__ void add_values(float (&acc)[S::ROWS / 16][S::COLUMNS / 8][4],
                                           const unsigned char* tile_smem,
                                           const unsigned char* p_smem, const Place<S>& at) {
  const unsigned char* p_row_smem = p_smem + at.lane % 16 * P_BYTES + at.lane / 16 * 16;
  const unsigned char* v_row_smem =
      tile_smem + at.lane % 16 * ROW_BYTES + at.lane / 16 * 16 + at.warp * S::COLUMNS * 2;
#pragma unroll
  for (int k = 0; k < TOKENS / 16; ++k) {
    unsigned p_rmem[S::ROWS / 16][4];
#pragma unroll
    for (int m = 0; m < S::ROWS / 16; ++m) {
      load_matrices(p_rmem[m], p_row_smem + m * 16 * P_BYTES + k * 32);
    }
#pragma unroll
    for (int n = 0; n < S::COLUMNS / 16; ++n) {
      unsigned v_rmem[4];
      load_matrices_transposed(v_rmem, v_row_smem + k * 16 * ROW_BYTES + n * 32);
#pragma unroll
      for (int m = 0; m < S::ROWS / 16; ++m) {
        multiply_add<T>(acc[m][2 * n], p_rmem[m], v_rmem[0], v_rmem[1]);
        multiply_add<T>(acc[m][2 * n + 1], p_rmem[m], v_rmem[2], v_rmem[3]);
      }
    }
  }
}
