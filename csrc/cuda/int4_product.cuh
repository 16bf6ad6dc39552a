// The product of int4 weights and a few tokens: two forms, and how a block's warps share the work.
//
// A block has four tiles of 16 rows, and the columns of K dealt out to `split` warps a tile. Lane 4
// g + q has rows g and g + 8 of the tile (its two sides), and of every tile of four groups one
// group:
//
//   K     | chunk of 16 groups: tiles 0 1 2 3      | chunk | .. | the rest: tiles of 4 groups |
//   tile  lanes 0, 1: groups 2 i, 2 i + 1          lanes 2, 3: groups 8 + 2 i, 9 + 2 i
//
// so that two lanes read a whole sector of codes, and a lane's scales of a chunk are 16 bytes.
//
//   separated   1 or 2 tokens. A column of B is a (token, lane of the quad) pair, zero in the other
//               lanes, so that an accumulator holds one group of one token. x is lifted; what that
//               and the codes' bias ask for, and the scales, in float32, meet the accumulators:
//               once for 32 weights.
//   blocked     up to 8 tokens, a column of B each. Weights are rounded to T with their scale, as
//               the reference does, before they meet x.
//
// The codes of a chunk are in flight while those before it are multiplied, each register loaded
// again as soon as it is used; nothing passes through shared memory but a block's sums at the end.
#pragma once
#include "int4.cuh"

constexpr int BLOCK_TILES = 4;
constexpr int TILE_ROWS = 16;
constexpr int MAX_SPLIT = 4;
constexpr int MAX_THREADS = BLOCK_TILES * MAX_SPLIT * WARP;
constexpr int SIDES = 2;        // rows that a lane has
constexpr int MAX_TOKENS = 16;  // of a block

// Sums of a block's warps: [warp][row of its tile][token]; an odd number of tokens apart, as lanes
// of 8 rows write at once. They are all of a block's dynamic shared memory.
using WarpSums = float[TILE_ROWS][MAX_TOKENS + 1];
using Sums = WarpSums*;

__device__ __forceinline__ Sums block_sums() {
  extern __shared__ __align__(16) unsigned char sums_smem[];
  return reinterpret_cast<Sums>(sums_smem);
}

// Rows of W that a lane has; those past the end repeat the last one, and nobody stores their sums.
struct LaneRows {
  int row[SIDES];

  __device__ __forceinline__ int64 at(int side) const { return row[side]; }
};

__device__ __forceinline__ int lane_row() { return threadIdx.x % WARP / QUAD; }
__device__ __forceinline__ int lane_of_quad() { return threadIdx.x % QUAD; }

// 16 rows from `first` on.
__device__ __forceinline__ LaneRows plain_rows(int first, int rows) {
  const int row = first + lane_row();
  return {{min(row, rows - 1), min(row + 8, rows - 1)}};
}

// 8 gate rows from `first` on, and their up rows, `width` further down.
__device__ __forceinline__ LaneRows gate_up_rows(int first, int width) {
  const int row = min(first + lane_row(), width - 1);
  return {{row, row + width}};
}

enum ScaleKind { BF16_SCALES = 0, FP16_SCALES = 1, FP32_SCALES = 2 };

struct Int4Weights {
  const uint4* codes_gmem;  // [N, K/32], 16 bytes a group
  const void* scale_gmem;   // [N, K/32]
  int64 codes_stride;       // of a row, in groups
  int64 scale_stride;       // of a row, in scales
  int scale_kind;
  int groups;  // K/32
  int chunks;  // whole ones with scales in T that 16-byte loads can get
};

__device__ __forceinline__ float load_scale(const void* scale_gmem, int at, int kind) {
  if (kind == BF16_SCALES) return to_float(static_cast<const bf16*>(scale_gmem)[at]);
  if (kind == FP16_SCALES) return to_float(static_cast<const fp16*>(scale_gmem)[at]);
  return static_cast<const float*>(scale_gmem)[at];
}

__device__ __forceinline__ float half_of(unsigned pair, int upper, bf16) {
  return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16);
}
__device__ __forceinline__ float half_of(unsigned pair, int upper, fp16) {
  return from_fp16_bits(static_cast<unsigned short>(upper ? pair >> 16 : pair));
}

// A group, or the scales of eight, of both sides.
using LaneCodes = uint4[SIDES];

// The first of the groups of a chunk that a lane has; that of tile i is 2 i on.
__device__ __forceinline__ int chunk_group(int q) { return q / 2 * (CHUNK / 2) + q % 2; }

// The separated form of what a warp does with its part of K.
template <class T>
struct Separated {
  float sums[4] = {};       // as the accumulator lies
  const fp16* x_gmem;       // lifted, in the current chunk, of this lane's column of B; or zeros
  const float* start_gmem;  // in the current chunk, of its columns of the accumulator
  int x_chunk;              // elements from chunk to chunk; 0 for zeros

  // Row g of B belongs to token g / 4, and is its own column in lane g % 4 of the quad.
  __device__ __forceinline__ Separated(const fp16* x_row_gmem, const float* start_row_gmem,
                                       const fp16* zeros_gmem, bool own, int chunk) {
    const int q = lane_of_quad();
    x_chunk = own ? CHUNK * GROUP : 0;
    x_gmem = own ? x_row_gmem + group_offset(chunk * CHUNK + chunk_group(q)) : zeros_gmem;
    start_gmem = start_row_gmem + 2 * (chunk * CHUNK + scale_group(q));
  }

  // First group of a chunk whose scale this lane wants, of every tile two.
  static __device__ __forceinline__ int scale_group(int q) { return q % 2 * (CHUNK / 2); }

  // `start`: start and factor of this lane's two groups.
  __device__ __forceinline__ void tile(const LaneCodes& codes, const fp16* x, float4 start,
                                       const float (&scale)[SIDES][2], Shift shift) {
    float acc[4] = {};
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      const uint4 b = load_words(x + w * 2 * PIECE);
      unsigned r[4], s[4];
      unpack_for_lifted(r, word_of(codes[0], w), shift);
      unpack_for_lifted(s, word_of(codes[1], w), shift);
      Codes<fp16>::mma(acc, acc, r[0], s[0], r[1], s[1], b.x, b.y);
      Codes<fp16>::mma(acc, acc, r[2], s[2], r[3], s[3], b.z, b.w);
    }
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
      sums[2 * side] += fmaf(acc[2 * side], start.y, start.x) * scale[side][0];
      sums[2 * side + 1] += fmaf(acc[2 * side + 1], start.w, start.z) * scale[side][1];
    }
  }

  __device__ __forceinline__ void chunk_tile(const LaneCodes& codes, int i, const LaneCodes& scales,
                                             Shift shift) {
    float scale[SIDES][2];
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
      scale[side][0] = half_of(word_of(scales[side], i), 0, T{});
      scale[side][1] = half_of(word_of(scales[side], i), 1, T{});
    }
    const float4 start = *reinterpret_cast<const float4*>(start_gmem + 4 * i);
    tile(codes, x_gmem + i * PAIR, start, scale, shift);
  }

  __device__ __forceinline__ void advance(int chunks) {
    x_gmem += chunks * x_chunk;
    start_gmem += chunks * (2 * CHUNK);
  }

  // Four groups from `group` on, as far as there are `left`; the current chunk is the first.
  template <class Scale>
  __device__ __forceinline__ void last_tile(const LaneCodes& codes, int group, int left,
                                            const fp16* zeros_gmem, Scale scale_of, Shift shift) {
    const int q = lane_of_quad(), pair = q % 2 * 2;
    float scale[SIDES][2];
    float2 start[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool inside = pair + e < left;
      const float* from_gmem = start_gmem + 2 * (group + pair + e - scale_group(q));
      start[e] = inside ? *reinterpret_cast<const float2*>(from_gmem) : float2{0.0f, 0.0f};
#pragma unroll
      for (int side = 0; side < SIDES; ++side) {
        scale[side][e] = inside ? scale_of(side, group + pair + e) : 0.0f;
      }
    }
    const bool own = x_chunk != 0 && q < left;
    const int64 at = group_offset(group + q) - group_offset(chunk_group(q));
    tile(codes, own ? x_gmem + at : zeros_gmem, {start[0].x, start[0].y, start[1].x, start[1].y},
         scale, shift);
  }

  __device__ __forceinline__ void store(Sums sums_smem) const {
    const int thread = thread_anew(), q = thread % QUAD, g = thread % WARP / QUAD;
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
      float sum = sums[2 * side] + sums[2 * side + 1];
      sum += __shfl_xor_sync(ALL_LANES, sum, 1);
      if (q % 2 == 0) sums_smem[thread / WARP][side * 8 + g][q / 2] = sum;
    }
  }
};

// What accumulators with a token a column leave.
template <int NT>
__device__ __forceinline__ void store_sums(Sums sums_smem, const float (&sums)[NT][4]) {
  const int thread = thread_anew(), q = thread % QUAD, g = thread % WARP / QUAD;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums_smem[thread / WARP][i / 2 * 8 + g][n * 8 + 2 * q + i % 2] = sums[n][i];
    }
  }
}

// The blocked form.
template <class T>
struct Blocked {
  float sums[1][4] = {};
  const T* x_gmem;  // in the current chunk, of the token of this lane's column of B

  static __device__ __forceinline__ int scale_group(int q) { return q / 2 * (CHUNK / 2); }

  __device__ __forceinline__ void tile(const LaneCodes& codes, int64 x_offset, bool inside,
                                       const PairScales<T> (&scale)[SIDES], Shift shift) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      unsigned r[4], s[4];
      unpack_scaled<T>(r, word_of(codes[0], w), shift, scale[0]);
      unpack_scaled<T>(s, word_of(codes[1], w), shift, scale[1]);
      uint4 b = {0, 0, 0, 0};
      if (inside) b = load_words(x_gmem + x_offset + w * 2 * PIECE);
      Codes<T>::mma(sums[0], sums[0], r[0], s[0], r[1], s[1], b.x, b.y);
      Codes<T>::mma(sums[0], sums[0], r[2], s[2], r[3], s[3], b.z, b.w);
    }
  }

  __device__ __forceinline__ void chunk_tile(const LaneCodes& codes, int i, const LaneCodes& scales,
                                             Shift shift) {
    const unsigned half = lane_of_quad() % 2 == 0 ? 0x1010 : 0x3232;
    PairScales<T> scale[SIDES];
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
      scale[side] = PairScales<T>(__byte_perm(word_of(scales[side], i), 0, half));
    }
    tile(codes, i * PAIR, true, scale, shift);
  }

  __device__ __forceinline__ void advance(int chunks) { x_gmem += chunks * (CHUNK * GROUP); }

  template <class Scale>
  __device__ __forceinline__ void last_tile(const LaneCodes& codes, int group, int left,
                                            const fp16*, Scale scale_of, Shift shift) {
    const int q = lane_of_quad();
    PairScales<T> scale[SIDES];
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
      const float s = q < left ? scale_of(side, group + q) : 0.0f;
      scale[side] = PairScales<T>(from_float<T>(s).bits * 0x10001u);
    }
    const int64 at = group_offset(group + q) - group_offset(chunk_group(q));
    tile(codes, at, q < left, scale, shift);
  }

  __device__ __forceinline__ void store(Sums sums_smem) const { store_sums(sums_smem, sums); }
};

// Part `part` of `split` of the columns of W, through `form`.
template <class Form>
__device__ __forceinline__ void multiply(Form& form, const Int4Weights& w, const LaneRows& rows,
                                         const fp16* zeros_gmem, int part, int split, Shift shift) {
  const int q = lane_of_quad();
  // Of the current chunk: this lane's groups of codes, and its scales.
  const uint4* codes_gmem[SIDES];
  const char* scale_gmem[SIDES];
  const int scale_bytes = w.scale_kind == FP32_SCALES ? 4 : 2;
#pragma unroll
  for (int side = 0; side < SIDES; ++side) {
    const int64 row = rows.at(side);
    codes_gmem[side] = w.codes_gmem + row * w.codes_stride + part * CHUNK + chunk_group(q);
    scale_gmem[side] = static_cast<const char*>(w.scale_gmem) +
                       (row * w.scale_stride + part * CHUNK + Form::scale_group(q)) * scale_bytes;
  }
  int chunk = part;
  LaneCodes codes[TILES], scales;
  if (chunk < w.chunks) {
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
#pragma unroll
      for (int i = 0; i < TILES; ++i) codes[i][side] = load_once(codes_gmem[side] + 2 * i);
      scales[side] = load_once(scale_gmem[side]);
    }
  }
#pragma unroll 1
  for (; chunk < w.chunks; chunk += split) {
    const bool more = chunk + split < w.chunks;
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
      codes_gmem[side] += split * CHUNK;
      scale_gmem[side] += split * CHUNK * 2;  // there are no others in chunks
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      form.chunk_tile(codes[i], i, scales, shift);
#pragma unroll
      for (int side = 0; side < SIDES; ++side) {
        load_once_if(codes[i][side], codes_gmem[side] + 2 * i, more);
      }
    }
#pragma unroll
    for (int side = 0; side < SIDES; ++side) load_once_if(scales[side], scale_gmem[side], more);
    form.advance(split);
  }
  form.advance(-chunk);
#pragma unroll
  for (int side = 0; side < SIDES; ++side) {
    codes_gmem[side] -= chunk * CHUNK + chunk_group(q);
    scale_gmem[side] -= (chunk * CHUNK + Form::scale_group(q)) * scale_bytes;
  }
#pragma unroll 1
  for (int group = (w.chunks * TILES + part) * TILE; group < w.groups; group += split * TILE) {
    LaneCodes last;
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
      last[side] = {0, 0, 0, 0};
      if (group + q < w.groups) {
        last[side] = load_once(codes_gmem[side] + group + q);
      }
    }
    auto scale_of = [&](int side, int at) {
      return load_scale(scale_gmem[side], at, w.scale_kind);
    };
    form.last_tile(last, group, w.groups - group, zeros_gmem, scale_of, shift);
  }
}

// The slots of a block, in shared memory: read again after the product, they need no registers.
struct Slots {
  int count;
  int at[MAX_TOKENS];   // past the last one it again
  int row[MAX_TOKENS];  // of x

  // Every thread of the block calls it. Without `slots_gmem` they are first, first + 1, ..
  __device__ __forceinline__ void set(const int* slots_gmem, int first, int size,
                                      int slots_per_row) {
    const int i = min(static_cast<int>(threadIdx.x), size - 1);
    if (threadIdx.x == 0) count = size;
    if (threadIdx.x < MAX_TOKENS) {
      const int slot = slots_gmem ? slots_gmem[i] : first + i;
      at[threadIdx.x] = slot;
      row[threadIdx.x] = slot / slots_per_row;
    }
    __syncthreads();
  }
};

// x of all slots, rearranged and lifted.
template <class T>
struct Rearranged {
  const T* x_gmem;          // [rows, rearranged_columns]
  const fp16* lifted_gmem;  // the same
  const float* start_gmem;  // [rows, start_columns]
  const fp16* zeros_gmem;   // [ZEROS]
};

// Sums of a block over its warps' parts of K, into `sums_smem`. With `few` slots or less of them
// the form is the separated one.
template <class T>
__device__ __forceinline__ void product(Sums sums_smem, const Int4Weights& w, const LaneRows& rows,
                                        const Rearranged<T>& x, const Slots& slots_smem, int few,
                                        int split, unsigned shift_factor) {
  const int part = threadIdx.x / WARP & (split - 1);
  const int q = lane_of_quad(), g = lane_row();
  const Shift shift{shift_factor};
  const int count = slots_smem.count;
  auto row = [&](int i) { return static_cast<int64>(slots_smem.row[i]); };
  auto row_gmem = [&](int i) { return x.x_gmem + row(i) * rearranged_columns(w.groups); };
  if (count <= few) {
    const bool own = g % QUAD == q && g / QUAD < count;
    Separated<T> form(x.lifted_gmem + row(g / QUAD) * rearranged_columns(w.groups),
                      x.start_gmem + row(q / 2) * start_columns(w.groups), x.zeros_gmem, own, part);
    multiply(form, w, rows, x.zeros_gmem, part, split, shift);
    form.store(sums_smem);
  } else {
    Blocked<T> form;
    form.x_gmem = row_gmem(g) + group_offset(part * CHUNK + chunk_group(q));
    multiply(form, w, rows, x.zeros_gmem, part, split, shift);
    form.store(sums_smem);
  }
  __syncthreads();
}

// Of this warp; `split` is 1, 2 or 4.
__device__ __forceinline__ int tile_of_warp(int split) {
  return static_cast<int>(threadIdx.x) / WARP >> (split / 2);
}

// A sum over the parts of K, in their order.
__device__ __forceinline__ float sum_of_parts(Sums sums_smem, int tile, int split, int row,
                                              int token) {
  float sum = sums_smem[tile * split][row][token];
  for (int part = 1; part < split; ++part) sum += sums_smem[tile * split + part][row][token];
  return sum;
}
