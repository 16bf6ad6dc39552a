// int4 weights in groups of 32 as operands of mma.m16n8k16, straight from the checkpoint's layout.
//
// The weights are the wide operand: out^T [N, tokens] = W [N, K] x^T. Of the quad of lanes that has
// a row, each lane loads 16 bytes, one whole group of its own, and a sum over K may go in any
// order: the four columns that an instruction takes from a lane are four of that lane's group.
//
//   word of 8 columns   bits 31 28 | .. | 19 16 | 15 12 | .. | 3 0
//                     column    7        4         3         0     pair j: columns j and j + 4,
//                                                                  one AND-OR
//   instruction 2 w     A: pairs 0 and 1 of word w, rows r and r + 8     B: x of the same columns
//   instruction 2 w + 1    pairs 2 and 3
//
// An AND-OR puts a code u = q + 8 under a constant that makes it a number. Pairs 0 and 1 come out
// of the word, 2 and 3 out of the word shifted by 8: pairs 1 and 3 are 16 times what they should
// be. x lies in memory as B wants it, 16 bytes for a word of codes:
//
//   a pair of groups, 128 bytes   | word 0: even, odd group | word 1: even, odd | word 2 | word 3 |
//   16 bytes of a word            columns 0 4 1 5 2 6 3 7
//
// Where scales meet the sums and not the weights, codes become 1024 + u and 1024 + 16 u in float16
// and x of odd pairs is divided by 16. For that, x is lifted, whatever T is: a group of it becomes
// float16 times a power of two that takes its largest number to 2^14 or more, so that nothing down
// to 2^-24 of that is rounded. Sums of such products then lack the bias and the power of two:
//
//   sum q x = (sum code x' + bias) factor = (sum code x') factor + start
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

constexpr int GROUP = 32;
constexpr int WORDS = 4;         // of 8 codes, in a group
constexpr int PIECE = 8;         // elements of x, 16 bytes, that meet a word
constexpr int PAIR = 2 * GROUP;  // elements of x in a pair of groups
constexpr int ZEROS = 4 * PAIR;  // elements that lanes without a column of their own read
constexpr int QUAD = 4;          // lanes that have a row
constexpr int TILE = QUAD;       // groups that they load at a time
constexpr int TILES = 4;         // of a chunk, whose scales come in one load
constexpr int CHUNK = TILE * TILES;

template <class T>
struct Codes;

template <>
struct Codes<bf16> {
  // 128 + u, times 1, minus 136.
  static constexpr unsigned UNDER = 0x43004300, ONE = 0x3f803f80, MINUS_BIAS = 0xc308c308;
  // Bits 4 to 7 alone are the number 16 u 2^-133, a subnormal one up to 7: times 2^127, minus 2, it
  // is q / 4. Packed multiply-adds of bfloat16 know no flushing to zero.
  static constexpr unsigned UNDER_ODD = 0, ONE_ODD = 0x7f007f00, MINUS_BIAS_ODD = 0xc000c000;
  static constexpr unsigned FACTOR_ODD = 0x40804080;  // that is missing, 4

  static __device__ __forceinline__ unsigned fma(unsigned a, unsigned b, unsigned c) {
    return fma_bf16x2(a, b, c);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const float (&c)[4], unsigned a0,
                                             unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                             unsigned b1) {
    mma_m16n8k16_bf16(d, c, a0, a1, a2, a3, b0, b1);
  }
};

template <>
struct Codes<fp16> {
  // 1024 + u, times 1, minus 1032; and 1024 + 16 u, times 1/16, minus 72.
  static constexpr unsigned UNDER = 0x64006400, ONE = 0x3c003c00, MINUS_BIAS = 0xe408e408;
  static constexpr unsigned UNDER_ODD = UNDER, ONE_ODD = 0x2c002c00, MINUS_BIAS_ODD = 0xd480d480;
  static constexpr unsigned FACTOR_ODD = 0x3c003c00;

  static __device__ __forceinline__ unsigned fma(unsigned a, unsigned b, unsigned c) {
    return fma_fp16x2(a, b, c);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const float (&c)[4], unsigned a0,
                                             unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                             unsigned b1) {
    mma_m16n8k16_fp16(d, c, a0, a1, a2, a3, b0, b1);
  }
};

// 2^24: the upper half of a product with it is a shift by 8, done where multiplications are. Shifts
// and ANDs share a pipe, and it is the busiest one. The launch hands it over: of a constant the
// compiler would make a shift again.
struct Shift {
  unsigned factor;

  __device__ __forceinline__ unsigned by8(unsigned word) const { return __umulhi(word, factor); }
};

// 8 codes as float16, for lifted x: 1024 + u in pairs 0 and 2, 1024 + 16 u in pairs 1 and 3.
__device__ __forceinline__ void unpack_for_lifted(unsigned (&pairs)[4], unsigned word,
                                                  Shift shift) {
  const unsigned upper = shift.by8(word);
  pairs[0] = and_or(word, 0x000f000f, Codes<fp16>::UNDER);
  pairs[1] = and_or(word, 0x00f000f0, Codes<fp16>::UNDER);
  pairs[2] = and_or(upper, 0x000f000f, Codes<fp16>::UNDER);
  pairs[3] = and_or(upper, 0x00f000f0, Codes<fp16>::UNDER);
}

// A scale, twice: of pairs 0 and 2, and of pairs 1 and 3.
template <class T>
struct PairScales {
  unsigned even, odd;

  PairScales() = default;
  explicit __device__ __forceinline__ PairScales(unsigned twice)
      : even(twice), odd(Codes<T>::fma(twice, Codes<T>::FACTOR_ODD, 0x80008000)) {}
};

// The weights q * scale themselves: taking the bias off is exact, the product rounded once. It is
// written as a multiply-add of -0: sm_80 has no other in bfloat16.
template <class T>
__device__ __forceinline__ void unpack_scaled(unsigned (&pairs)[4], unsigned word, Shift shift,
                                              PairScales<T> scale) {
  const unsigned upper = shift.by8(word);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const unsigned from = j < 2 ? word : upper;
    const unsigned code = j % 2 == 0 ? and_or(from, 0x000f000f, Codes<T>::UNDER)
                                     : and_or(from, 0x00f000f0, Codes<T>::UNDER_ODD);
    const unsigned q = j % 2 == 0
                           ? Codes<T>::fma(code, Codes<T>::ONE, Codes<T>::MINUS_BIAS)
                           : Codes<T>::fma(code, Codes<T>::ONE_ODD, Codes<T>::MINUS_BIAS_ODD);
    pairs[j] = Codes<T>::fma(q, j % 2 == 0 ? scale.even : scale.odd, 0x80008000);
  }
}

__device__ __forceinline__ unsigned word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

template <class T>
__device__ __forceinline__ uint4 load_words(const T* from_gmem) {
  return *reinterpret_cast<const uint4*>(from_gmem);
}

// Where the first word of a group is in a row of x that was rearranged; word w is 2 w pieces on.
__device__ __forceinline__ int64 group_offset(int group) {
  return static_cast<int64>(group / 2) * PAIR + group % 2 * PIECE;
}

// Where column c of a group is, from there.
__device__ __forceinline__ int column_offset(int c) {
  return c / PIECE * 2 * PIECE + c % 4 * 2 + c / 4 % 2;
}

__device__ __forceinline__ int64 rearranged_columns(int groups) {
  return static_cast<int64>((groups + 1) / 2) * PAIR;
}

// What lifting leaves of a row: start and factor of each group, as many as pairs have, so that
// those of two groups are one load.
__device__ __forceinline__ int64 start_columns(int groups) {
  return static_cast<int64>((groups + 1) / 2) * 4;
}

// Powers of two that lift a group whose largest number is `most`, and that undo it.
struct Lift {
  float up, factor;

  explicit __device__ __forceinline__ Lift(float most) {
    // 2^14 / 2^e; below 2^-112 less, so that both are normal numbers.
    const unsigned e = max(__float_as_uint(most) >> 23, 15u);
    up = __uint_as_float((268u - e) << 23);
    factor = __uint_as_float((e - 14u) << 23);
  }
};

// x of column c, lifted by `up`; adds to `bias` what the code's bias makes of it.
__device__ __forceinline__ fp16 lifted(float x, float up, int c, float& bias) {
  const bool odd = c % 2 != 0;
  const fp16 y = from_float<fp16>(x * (odd ? up * (1.0f / 16) : up));
  bias -= (odd ? 1024.0f + 8 * 16 : 1024.0f + 8) * to_float(y);
  return y;
}

// Lays PIECE columns of each thread's group as the products want them. Four neighbouring threads of
// a warp have a group, all threads call it, and those with `inside` have one.
template <class T>
__device__ __forceinline__ void rearrange(const T* x_gmem,    // [K], a row; 16-byte aligned
                                          T* out_gmem,        // [rearranged_columns]
                                          fp16* lifted_gmem,  // the same; or null: not wanted
                                          float* start_gmem,  // [start_columns]; or null
                                          int piece, bool inside) {
  uint4 words = {0, 0, 0, 0};
  if (inside) words = load_words(x_gmem + static_cast<int64>(piece) * PIECE);
  const int group = piece / WORDS, word = piece % WORDS;
  const int64 at = group_offset(group) + word * 2 * PIECE;
  if (inside) {
    uint4 out;
    out.x = __byte_perm(words.x, words.z, 0x5410);
    out.y = __byte_perm(words.x, words.z, 0x7632);
    out.z = __byte_perm(words.y, words.w, 0x5410);
    out.w = __byte_perm(words.y, words.w, 0x7632);
    *reinterpret_cast<uint4*>(out_gmem + at) = out;
  }
  if (lifted_gmem == nullptr) return;
  const Vec<T, PIECE> x = *reinterpret_cast<const Vec<T, PIECE>*>(&words);
  float most = 0.0f, bias = 0.0f;
#pragma unroll
  for (int e = 0; e < PIECE; ++e) most = fmaxf(most, fabsf(to_float(x.at[e])));
  most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
  most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
  const Lift lift(most);
  Vec<fp16, PIECE> out;
#pragma unroll
  for (int e = 0; e < PIECE; ++e) {
    out.at[column_offset(e)] = lifted(to_float(x.at[e]), lift.up, e, bias);
  }
  bias += __shfl_xor_sync(ALL_LANES, bias, 1);
  bias += __shfl_xor_sync(ALL_LANES, bias, 2);
  if (!inside) return;
  store_vec<fp16, PIECE>(lifted_gmem + at, out);
  if (word == 0) {
    *reinterpret_cast<float2*>(start_gmem + 2 * group) = {bias * lift.factor, lift.factor};
  }
}
