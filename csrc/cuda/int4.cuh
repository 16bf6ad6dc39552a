// int4 weights in groups of 32 as operands of mma.m16n8k16, straight from the checkpoint's layout.
//
// The weights are the wide operand: out^T [N, tokens] = W [N, K] x^T. Of the quad of lanes that has
// a row, each lane loads 16 bytes, one whole group of its own, and a sum over K may go in any
// order: the four columns that an instruction takes from a lane are four of that lane's group.
//
//   word of 8 columns   bits 31 28 | .. | 19 16 | 15 12 | .. | 3 0
//                     column    7        4         3         0     pair j: columns j and j + 4,
//                                                                  one AND-OR after a shift
//   instruction 2 w     A: pairs 0 and 1 of word w, rows r and r + 8     B: x of the same columns
//   instruction 2 w + 1    pairs 2 and 3
//
// An AND-OR puts a code u = q + 8 under a constant that makes it a number, 128 + u in bfloat16 and
// 1024 + u in float16. x lies in memory as B wants it, 16 bytes for a word of codes:
//
//   a pair of groups, 128 bytes   | word 0: even, odd group | word 1: even, odd | word 2 | word 3 |
//   16 bytes of a word            columns 0 4 1 5 2 6 3 7
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
  static constexpr unsigned UNDER = 0x43004300, ONE = 0x3f803f80, MINUS_BIAS = 0xc308c308;
  static constexpr float BIAS = 136.0f;  // 128 + 8

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
  static constexpr unsigned UNDER = 0x64006400, ONE = 0x3c003c00, MINUS_BIAS = 0xe408e408;
  static constexpr float BIAS = 1032.0f;  // 1024 + 8

  static __device__ __forceinline__ unsigned fma(unsigned a, unsigned b, unsigned c) {
    return fma_fp16x2(a, b, c);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const float (&c)[4], unsigned a0,
                                             unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                             unsigned b1) {
    mma_m16n8k16_fp16(d, c, a0, a1, a2, a3, b0, b1);
  }
};

// 2^28, 2^24, 2^20: the upper half of a product with them is a shift by 4, 8, 12, done where
// multiplications are. Shifts and ANDs share a pipe, and it is the busiest one. The launch hands
// 2^28 over: of a constant the compiler would make shifts again.
struct Shifts {
  unsigned by4, by8, by12;

  explicit __device__ __forceinline__ Shifts(unsigned factor)
      : by4(factor), by8(factor >> 4), by12(factor >> 8) {}
};

// 8 codes as four pairs of numbers q + BIAS.
template <class T>
__device__ __forceinline__ void unpack(unsigned (&pairs)[4], unsigned word, Shifts shifts) {
  pairs[0] = and_or(word, 0x000f000f, Codes<T>::UNDER);
  pairs[1] = and_or(__umulhi(word, shifts.by4), 0x000f000f, Codes<T>::UNDER);
  pairs[2] = and_or(__umulhi(word, shifts.by8), 0x000f000f, Codes<T>::UNDER);
  pairs[3] = and_or(__umulhi(word, shifts.by12), 0x000f000f, Codes<T>::UNDER);
}

// The weights q * scale themselves: taking the bias off is exact, the product rounded once. It is
// written as a multiply-add of -0: sm_80 has no other in bfloat16.
template <class T>
__device__ __forceinline__ void unpack_scaled(unsigned (&pairs)[4], unsigned word, Shifts shifts,
                                              unsigned scale) {  // twice
  unpack<T>(pairs, word, shifts);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    pairs[j] = Codes<T>::fma(pairs[j], Codes<T>::ONE, Codes<T>::MINUS_BIAS);
    pairs[j] = Codes<T>::fma(pairs[j], scale, 0x80008000);
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

// Sums of a row's groups: as many as pairs have, so that two are one load.
__device__ __forceinline__ int64 start_columns(int groups) {
  return static_cast<int64>((groups + 1) / 2) * 2;
}

// Rearranges PIECE columns of each thread's group for the product. Four neighbouring threads of a
// warp have a group, all threads call it, and those with `inside` have one. `start_gmem` gets what
// takes the bias off: the sum over a group, times -BIAS.
template <class T>
__device__ __forceinline__ void rearrange(const T* x_gmem,    // [K], a row; 16-byte aligned
                                          T* out_gmem,        // [rearranged_columns]
                                          float* start_gmem,  // [start_columns]
                                          int piece, bool inside) {
  uint4 words = {0, 0, 0, 0};
  if (inside) words = load_words(x_gmem + static_cast<int64>(piece) * PIECE);
  const Vec<T, PIECE> x = *reinterpret_cast<const Vec<T, PIECE>*>(&words);
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < PIECE; ++e) sum += to_float(x.at[e]);
  sum += __shfl_xor_sync(ALL_LANES, sum, 1);
  sum += __shfl_xor_sync(ALL_LANES, sum, 2);
  if (!inside) return;
  const int group = piece / WORDS, word = piece % WORDS;
  uint4 out;
  out.x = __byte_perm(words.x, words.z, 0x5410);
  out.y = __byte_perm(words.x, words.z, 0x7632);
  out.z = __byte_perm(words.y, words.w, 0x5410);
  out.w = __byte_perm(words.y, words.w, 0x7632);
  *reinterpret_cast<uint4*>(out_gmem + group_offset(group) + word * 2 * PIECE) = out;
  if (word == 0) start_gmem[group] = -Codes<T>::BIAS * sum;
}
