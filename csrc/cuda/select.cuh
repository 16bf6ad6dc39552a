// Selection of K experts from a row of logits by one warp, in registers: what both forms of the
// router end with.
//
//   s = sigmoid(logits);  ids = the K largest of s + bias (in the kept groups);  w = s[ids]
//
// A lane holds N experts, four neighbours of each chunk of 128, a 16-byte load each:
//
//   expert    0 ......... 127 | 128 ....... 255 | 256 ....... 383      N = 12: up to 384 experts
//   registers  0 .. 3         |  4 .. 7         |  8 .. 11             N = 32: up to 1,024
//   lane i    4i .. 4i + 3    | 128 + 4i ..     | 256 + 4i ..
//
// K rounds, each one maximum over registers and lanes, of 32-bit keys of value and expert at once:
//
//   key = (s + bias - best of the row, as 21 bits behind the point) << 10 | 1023 - expert
//
// The next winner is the largest key below the last one. No key is ever cleared: with unsigned
// differences from one below the last winner, keys at or above it wrap around and become large,
// so that a round is a subtraction and a minimum for each key, and one reduction over the warp.
//
// Rounding to 21 bits never inverts an order, but can make a tie. So one round more is run, and
// where two neighbours of the K + 1 tie, or the K-th is 1 or more below the best (what is no number
// and what cannot be chosen counts as that), the row is chosen again by whole floats, in two
// reductions a round: the best value, then the lowest expert that has it.
//
// Groups are ranked in shared memory: a lane sums the two best of a group, starting at another
// member in each lane, so that lanes meet in no bank where groups are 32 experts.
//
// The weights are computed anew from the K chosen logits, a lane each, with an exact exponential;
// the selection itself uses the fast one.
//
// Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2 (auxiliary-loss-free balancing).
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

struct Selection {
  const float* logits_gmem;            // [splits, T, E]: parts, to be added in their order
  int64 stride_s, stride_t, stride_e;  // of the logits
  const float* bias_gmem;              // [E]
  int64 stride_bias;
  float* weights_gmem;  // [T, K], contiguous
  int* ids_gmem;        // [T, K], contiguous
  int splits, experts, top_k, n_group, topk_group;
  float scale;
  bool normalize;
  bool vectors;  // E is a multiple of 4; rows and the bias are at multiples of 16 bytes, in one
                 // piece
};

// The parameters of every kernel that selects, and what they say.
#define SELECTION                                                                             \
  float *logits_gmem, const float *bias_gmem, float *weights_gmem, int *ids_gmem, int splits, \
      int tokens, int experts, int top_k, int n_group, int topk_group, int64 stride_s,        \
      int64 stride_t, int64 stride_e, int64 stride_bias, float scale, int normalize, int vectors
#define SELECTED                                                                         \
  Selection{logits_gmem,  stride_s, stride_t,       stride_e,    bias_gmem, stride_bias, \
            weights_gmem, ids_gmem, splits,         experts,     top_k,     n_group,     \
            topk_group,   scale,    normalize != 0, vectors != 0}

constexpr int CHUNK_EXPERTS = 4 * WARP;
constexpr int FEW_EXPERTS = 3 * CHUNK_EXPERTS;  // that 12 registers a lane are enough for
constexpr unsigned ID_MASK = 1023;
#define MINUS_INFINITY __uint_as_float(0xff800000)
#define NOT_A_NUMBER __uint_as_float(0x7fffffff)
constexpr unsigned KEPT = 0xffffffffu;  // above every ordered float

// The expert of a lane's register i.
__device__ __forceinline__ int expert_of(int i) {
  return i / 4 * CHUNK_EXPERTS + threadIdx.x % WARP * 4 + i % 4;
}

// Unsigned integers that compare as the floats do; NaN is 1, below -inf, and nothing is 0.
// There is no -0 among sums of a bias and something not below 0.
__device__ __forceinline__ unsigned ordered(float x) {
  const int bits = __float_as_int(x);
  return x == x ? bits ^ ((bits >> 31) | 0x80000000) : 1u;
}
__device__ __forceinline__ float from_ordered(unsigned key) {
  return __uint_as_float(key & 0x80000000 ? key ^ 0x80000000 : ~key);
}

// Combines values in pairs, then pairs of pairs: N is not a chain of N.
template <int N, class Value, class Combine>
__device__ __forceinline__ Value tree(const Value (&values)[N], Combine combine) {
  Value level[N];
#pragma unroll
  for (int i = 0; i < N; ++i) level[i] = values[i];
#pragma unroll
  for (int apart = 1; apart < N; apart *= 2) {
#pragma unroll
    for (int i = 0; i + apart < N; i += 2 * apart) level[i] = combine(level[i], level[i + apart]);
  }
  return level[0];
}

// An exponential of nothing above 0: no overflow, and a divisor from 1 to 2.
__device__ __forceinline__ float sigmoid_fast(float x) {
  const float t = __expf(-fabsf(x));
  return (x < 0.0f ? t : 1.0f) * reciprocal_approx(1.0f + t);
}
// Within two units in the last place, subnormal results included.
__device__ __forceinline__ float sigmoid(float x) {
  const float t = expf(-fabsf(x));
  return (x < 0.0f ? t : 1.0f) / (1.0f + t);
}

// s + bias of a lane's experts; NaN past the last one. PARTS parts of the logits are in flight.
template <int N, int PARTS>
__device__ __forceinline__ void load_choice(const Selection& s, int64 row, float (&choice)[N]) {
  const float* row_gmem = s.logits_gmem + row * s.stride_t;
  Vec<float, 4> x[N / 4] = {}, bias[N / 4] = {};
  if (s.vectors) {
#pragma unroll
    for (int c = 0; c < N / 4; ++c) {
      const int e = expert_of(4 * c);
      if (e < s.experts) bias[c] = load_vec<float, 4>(s.bias_gmem + e);
    }
#pragma unroll 1
    for (int split = 0; split < s.splits; split += PARTS) {
      Vec<float, 4> part[PARTS][N / 4] = {};
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        const float* part_gmem = row_gmem + (split + p) * s.stride_s;
#pragma unroll
        for (int c = 0; c < N / 4; ++c) {
          const int e = expert_of(4 * c);
          if (split + p < s.splits && e < s.experts) {
            part[p][c] = load_vec<float, 4>(part_gmem + e);
          }
        }
      }
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i / 4].at[i % 4] += part[p][i / 4].at[i % 4];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = expert_of(i);
      if (e >= s.experts) continue;
      bias[i / 4].at[i % 4] = s.bias_gmem[e * s.stride_bias];
      const float* logit_gmem = row_gmem + e * s.stride_e;
#pragma unroll 1
      for (int split = 0; split < s.splits; ++split) {
        x[i / 4].at[i % 4] += logit_gmem[split * s.stride_s];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    choice[i] = sigmoid_fast(x[i / 4].at[i % 4]) + bias[i / 4].at[i % 4];
    if (expert_of(i) >= s.experts) choice[i] = NOT_A_NUMBER;
  }
}

// Makes the experts of all but the topk_group best groups NaN and takes them out of `real`, a bit
// for each of a lane's experts. Of a group counts the sum of its two best.
template <int N>
__device__ __forceinline__ void keep_groups(const Selection& s, float (&choice)[N], unsigned& real,
                                            float* scratch_smem) {  // [E + n_group] of this warp
  const int lane = threadIdx.x % WARP, size = s.experts / s.n_group;
  float* number_smem = scratch_smem;                                            // [E]
  unsigned* pair_smem = reinterpret_cast<unsigned*>(scratch_smem + s.experts);  // [n_group]
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float number = choice[i] == choice[i] ? choice[i] : MINUS_INFINITY;
    if (expert_of(i) < s.experts) number_smem[expert_of(i)] = number;
  }
  __syncwarp();
  for (int group = lane; group < s.n_group; group += WARP) {
    float best = MINUS_INFINITY, second = MINUS_INFINITY;
    int member = group % size;
    for (int j = 0; j < size; ++j) {
      const float number = number_smem[group * size + member];
      second = fmaxf(second, fminf(best, number));
      best = fmaxf(best, number);
      if (++member == size) member = 0;
    }
    pair_smem[group] = ordered(size > 1 ? best + second : best);
  }
  // A lane reads and marks its own groups only, until all are marked.
  for (int k = 0; k < s.topk_group; ++k) {
    unsigned best = 0, where = KEPT;
    for (int group = lane; group < s.n_group; group += WARP) {
      const unsigned key = pair_smem[group];
      if (key != KEPT && key > best) best = key, where = group;
    }
    const unsigned top = __reduce_max_sync(ALL_LANES, best);
    const unsigned winner = __reduce_min_sync(ALL_LANES, best == top ? where : KEPT);
    if (winner % WARP == lane) pair_smem[winner] = KEPT;
  }
  __syncwarp();
  // expert / size: exact, as their product is below 2^20.
  const unsigned per_expert = ((1u << 20) + size - 1) / size;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = expert_of(i);
    if (e < s.experts && pair_smem[e * per_expert >> 20] != KEPT) {
      choice[i] = NOT_A_NUMBER;
      real &= ~(1u << i);
    }
  }
}

// Chooses by keys; lane k < K gets the k-th expert. False where the keys cannot tell.
template <int N>
__device__ __forceinline__ bool choose_by_keys(const Selection& s, const float (&choice)[N],
                                               int& chosen) {
  const int lane = threadIdx.x % WARP;
  // 21 bits behind the point of a float in [4, 5): the exponent leaves at the top of the key.
  constexpr float BELOW_FIVE = 5.0f - 0x1p-21f, FARTHEST = 0x1p-21f - 1.0f;
  const float best = tree(choice, [](float a, float b) { return fmaxf(a, b); });
  const unsigned number = best == best ? ordered(best) : ordered(MINUS_INFINITY);
  const float top = from_ordered(__reduce_max_sync(ALL_LANES, number));
  unsigned key[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float fixed = fmaxf(choice[i] - top, FARTHEST) + BELOW_FIVE;
    key[i] = (__float_as_uint(fixed) << 10) + (ID_MASK - expert_of(i));
  }
  // Above every key; the first 22 bits of two winners differ unless they tie.
  unsigned winner = 1u << 31, last = 0, mine = 0, closest = winner;
#pragma unroll 1
  for (int k = 0; k <= s.top_k; ++k) {
    const unsigned below = winner - 1;
    unsigned steps[N + 1];  // down to each key, and to 0, where all of a lane's have won
    steps[N] = below;
#pragma unroll
    for (int i = 0; i < N; ++i) steps[i] = below - key[i];
    const unsigned step = tree(steps, [](unsigned a, unsigned b) { return min(a, b); });
    const unsigned next = below - __reduce_min_sync(ALL_LANES, step);
    closest = min(closest, next ^ winner);
    if (k == lane) mine = next;
    last = winner;
    winner = next;
  }
  chosen = ID_MASK - (mine & ID_MASK);
  return min(closest, last) > ID_MASK;
}

// Chooses by the float, then by the lower expert; lane k < K gets the k-th.
template <int N>
__device__ __forceinline__ void choose_exactly(const Selection& s, const float (&choice)[N],
                                               unsigned real, int& chosen) {
  unsigned key[N];
#pragma unroll
  for (int i = 0; i < N; ++i) key[i] = real >> i & 1 ? ordered(choice[i]) : 0;
#pragma unroll 1
  for (int k = 0; k < s.top_k; ++k) {
    const auto most = [](unsigned a, unsigned b) { return max(a, b); };
    const unsigned best = __reduce_max_sync(ALL_LANES, tree(key, most));
    unsigned mine = ID_MASK;
#pragma unroll
    for (int i = N - 1; i >= 0; --i) {
      if (key[i] == best) mine = expert_of(i);
    }
    const int winner = __reduce_min_sync(ALL_LANES, mine);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (expert_of(i) == winner) key[i] = 0;
    }
    if (k == threadIdx.x % WARP) chosen = winner;
  }
}

// Selects and writes row `row`; all lanes of a warp call it with the same.
template <int N, int PARTS>
__device__ __forceinline__ void select_row(const Selection& s, int64 row,
                                           float* scratch_smem) {  // [E + n_group], with groups
  const int lane = threadIdx.x % WARP;
  float choice[N];
  load_choice<N, PARTS>(s, row, choice);
  unsigned real = 0;  // bit i: register i can be chosen
#pragma unroll
  for (int i = 0; i < N; ++i) real |= expert_of(i) < s.experts ? 1u << i : 0;
  if (s.topk_group < s.n_group) keep_groups<N>(s, choice, real, scratch_smem);
  int chosen = 0;
  if (!choose_by_keys<N>(s, choice, chosen)) choose_exactly<N>(s, choice, real, chosen);

  float score = 0.0f;
  if (lane < s.top_k) {
    const float* logit_gmem = s.logits_gmem + row * s.stride_t + chosen * s.stride_e;
    float x = 0.0f;
#pragma unroll PARTS
    for (int split = 0; split < s.splits; ++split) x += logit_gmem[split * s.stride_s];
    score = sigmoid(x);
  }
  float total = score;
  for (int lanes = 1; lanes < s.top_k; lanes *= 2) {
    total += __shfl_xor_sync(ALL_LANES, total, lanes);
  }
  const float weight = s.normalize ? score / (total + 1e-20f) : score;
  if (lane < s.top_k) {
    s.weights_gmem[row * s.top_k + lane] = weight * s.scale;
    s.ids_gmem[row * s.top_k + lane] = chosen;
  }
}
