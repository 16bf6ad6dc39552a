// Rows of the cache and of the queries in shared memory, as `mla_decode` has them there.
//
// A row is LATENT + ROPE values of 16 bits whatever C and R are; zeros where they end. Eight
// threads copy a row together, 16 bytes each at a time. A row is 16 bytes longer than what it
// holds, so that the same columns of eight rows are in different banks:
//
//   column    0        C        512   512 + R  576  584
//   row 0     | latent | zeros | rope | zeros |    |        1,168 bytes
//   row 1          | latent ..                              begins 16 bytes further in the banks
//
// A token in the fp8 format (kimi_ops/quant/latent_fp8.py) first comes as it is:
//
//   byte      0       C        512     528        528 + 2R   656  704
//             | codes | zeros  | scale | rope     | zeros    |    |
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

constexpr int TOKENS = 32;  // of a tile
constexpr int LATENT = 512, ROPE = 64, WIDTH = LATENT + ROPE;
constexpr int ROW_BYTES = 2 * (WIDTH + 8);
constexpr int RAW_SCALE = LATENT, RAW_ROPE = LATENT + 16, RAW_BYTES = RAW_ROPE + 2 * ROPE + 48;
constexpr int THREADS_A_ROW = 8;
constexpr int CHUNKS = LATENT / 8 / THREADS_A_ROW;  // of 8 values, that a thread has of a latent

// How rows lie in global memory.
struct Widths {
  int c, r;
  bool vectors;  // 16-byte accesses reach every part of every row
};

// A field of a row: `count` elements of `size` bytes, 1 or 2, that are `stride` bytes apart, then
// zeros up to `bytes`. Eight threads, this one `part` of them, have 16 bytes in turn.
__device__ __forceinline__ void copy_field(unsigned char* to_smem, const unsigned char* from_gmem,
                                           int64 stride, int size, int count, int bytes, int part) {
#pragma unroll 1
  for (int at = part * 16; at < bytes; at += THREADS_A_ROW * 16) {
#pragma unroll 1
    for (int e = 0; e < 16; ++e) {
      const int element = (at + e) / size;
      to_smem[at + e] = element < count ? from_gmem[element * stride + (at + e) % size] : 0;
    }
  }
}

// The same where 16-byte accesses reach every part of it: copied asynchronously.
template <int BYTES>
__device__ __forceinline__ void copy_field_async(unsigned char* to_smem,
                                                 const unsigned char* from_gmem, int count_bytes,
                                                 int part) {
#pragma unroll
  for (int at = 0; at < BYTES; at += THREADS_A_ROW * 16) {
    const int byte = at + part * 16;
    if (byte < BYTES) copy_async_16(to_smem + byte, from_gmem + byte, byte < count_bytes);
  }
}

// A row of 16-bit values [C + R], or zeros; `part` of 8 is this thread's.
__device__ __forceinline__ void copy_row(unsigned char* row_smem, const unsigned char* row_gmem,
                                         int64 stride, bool present, int part, Widths widths) {
  const int c = present ? widths.c : 0, r = present ? widths.r : 0;
  unsigned char* rope_smem = row_smem + 2 * LATENT;
  const unsigned char* rope_gmem = row_gmem + widths.c * stride;
  if (widths.vectors) {
    copy_field_async<2 * LATENT>(row_smem, row_gmem, 2 * c, part);
    copy_field_async<2 * ROPE>(rope_smem, rope_gmem, 2 * r, part);
  } else {
    copy_field(row_smem, row_gmem, stride, 2, c, 2 * LATENT, part);
    copy_field(rope_smem, rope_gmem, stride, 2, r, 2 * ROPE, part);
  }
}

// A token of the fp8 format as it is, or zeros.
__device__ __forceinline__ void copy_raw(unsigned char* raw_smem, const unsigned char* row_gmem,
                                         int64 stride, bool present, int part, Widths widths) {
  const int c = present ? widths.c : 0, r = present ? widths.r : 0, scale = present ? 16 : 0;
  const unsigned char* scale_gmem = row_gmem + widths.c * stride;
  const unsigned char* rope_gmem = scale_gmem + 16 * stride;
  if (widths.vectors) {
    copy_field_async<LATENT>(raw_smem, row_gmem, c, part);
    copy_field_async<16>(raw_smem + RAW_SCALE, scale_gmem, scale, part);
    copy_field_async<2 * ROPE>(raw_smem + RAW_ROPE, rope_gmem, 2 * r, part);
  } else {
    copy_field(raw_smem, row_gmem, stride, 1, c, LATENT, part);
    copy_field(raw_smem + RAW_SCALE, scale_gmem, stride, 1, scale, 16, part);
    copy_field(raw_smem + RAW_ROPE, rope_gmem, stride, 1, 2 * r, 2 * ROPE, part);
  }
}

// Four e4m3 codes to two pairs of 16-bit values, exactly, but for the factor 2^-8: a code's bits
// moved to their place in a float16 are 2^-8 of its value, in a bfloat16 2^-120. The NaN codes
// become 480: their row's scale is NaN, too.
constexpr float CODE_UNIT = 256.0f;
constexpr unsigned SIGNS = 0x80008000u;  // of a pair; as numbers, -0 twice

template <class T>
__device__ __forceinline__ uint2 widened(unsigned codes);
template <>
__device__ __forceinline__ uint2 widened<fp16>(unsigned codes) {
  const unsigned low = __byte_perm(codes, 0, 0x1404), high = __byte_perm(codes, 0, 0x3424);
  return {and_or(low, SIGNS, low >> 1 & 0x3f803f80u), and_or(high, SIGNS, high >> 1 & 0x3f803f80u)};
}
template <>
__device__ __forceinline__ uint2 widened<bf16>(unsigned codes) {
  const unsigned low = __byte_perm(codes, 0, 0x1404), high = __byte_perm(codes, 0, 0x3424);
  constexpr unsigned LARGER = 0x77807780u;  // 2^112, twice
  return {fma_bf16x2(and_or(low, SIGNS, low >> 4 & 0x07f007f0u), LARGER, SIGNS),
          fma_bf16x2(and_or(high, SIGNS, high >> 4 & 0x07f007f0u), LARGER, SIGNS)};
}

// A pair of bfloat16 to a pair of T.
template <class T>
__device__ __forceinline__ unsigned from_bf16x2(unsigned pair);
template <>
__device__ __forceinline__ unsigned from_bf16x2<bf16>(unsigned pair) {
  return pair;
}
template <>
__device__ __forceinline__ unsigned from_bf16x2<fp16>(unsigned pair) {
  return to_fp16x2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// A row of 16-bit values from a token of the fp8 format; the scale, times CODE_UNIT, beside it.
template <class T>
__device__ __forceinline__ void widen_row(unsigned char* row_smem, float* scale_smem,
                                          const unsigned char* raw_smem, int part) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int d = (chunk * THREADS_A_ROW + part) * 8;
    const uint2 codes = *reinterpret_cast<const uint2*>(raw_smem + d);
    const uint2 low = widened<T>(codes.x), high = widened<T>(codes.y);
    *reinterpret_cast<uint4*>(row_smem + 2 * d) = {low.x, low.y, high.x, high.y};
  }
  const uint4 rope = *reinterpret_cast<const uint4*>(raw_smem + RAW_ROPE + part * 16);
  *reinterpret_cast<uint4*>(row_smem + 2 * (LATENT + part * 8)) = {
      from_bf16x2<T>(rope.x), from_bf16x2<T>(rope.y), from_bf16x2<T>(rope.z),
      from_bf16x2<T>(rope.w)};
  if (part == 0) *scale_smem = *reinterpret_cast<const float*>(raw_smem + RAW_SCALE) * CODE_UNIT;
}

// The cache, strides in bytes; and the page table's row of a sequence.
struct Cache {
  const unsigned char* gmem;  // [num_pages, page_size, C + R], or bytes of fp8 format
  int64 stride_page, stride_token, stride_element;
  int num_pages, page_size;
  const int* table_gmem;  // [max_pages]
  int64 stride_table;
  Widths widths;
  bool fp8;
};

// The tokens that a thread copies its parts of, one or two a block. Their page ids are read a block
// ahead, so that nothing waits for them.
template <int WARPS>
struct Tokens {
  static constexpr int A_TIME = WARPS * WARP / THREADS_A_ROW;
  static constexpr int MINE = TOKENS / A_TIME;
  int page[MINE], place[MINE];
  bool lost = false;  // one of them is in no page of the cache

  __device__ __forceinline__ void look_up(const Cache& cache, int block, int end) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const unsigned token = block * TOKENS + i * A_TIME + threadIdx.x / THREADS_A_ROW;
      const unsigned at = token / cache.page_size;
      place[i] = token - at * cache.page_size;
      page[i] = -1;
      if (static_cast<int>(token) < end) {
        page[i] = cache.table_gmem[at * cache.stride_table];
        lost |= page[i] < 0 || page[i] >= cache.num_pages;
      }
    }
  }

  // Rows that are not there become zeros: NaN in them would outlive a weight of 0.
  __device__ __forceinline__ void copy(const Cache& cache, unsigned char* to_smem) const {
    const int part = threadIdx.x % THREADS_A_ROW;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const int slot = i * A_TIME + threadIdx.x / THREADS_A_ROW;
      const bool present = page[i] >= 0 && page[i] < cache.num_pages;
      const unsigned char* row_gmem =
          cache.gmem + (present ? page[i] * cache.stride_page + place[i] * cache.stride_token : 0);
      if (cache.fp8) {
        copy_raw(to_smem + slot * RAW_BYTES, row_gmem, cache.stride_element, present, part,
                 cache.widths);
      } else {
        copy_row(to_smem + slot * ROW_BYTES, row_gmem, cache.stride_element, present, part,
                 cache.widths);
      }
    }
    copy_async_commit();
  }

  template <class T>
  __device__ __forceinline__ static void widen(unsigned char* to_smem, float* scale_smem,
                                               const unsigned char* raw_smem) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const int slot = i * A_TIME + threadIdx.x / THREADS_A_ROW;
      widen_row<T>(to_smem + slot * ROW_BYTES, scale_smem + slot, raw_smem + slot * RAW_BYTES,
                   threadIdx.x % THREADS_A_ROW);
    }
  }
};
