// The product of int4 weights and many tokens: 128 rows of W for up to 64 of them, four warps.
//
// A warp has two tiles of 16 rows, and every token of the block, so that no weight is unpacked
// twice and what it reads of x serves 32 rows. Steps of four groups of K go round a ring in shared
// memory; of a step, a lane has one group of each of its four rows:
//
//   codes   [128 rows, 64 bytes]    cp.async -> ring -> 16 bytes a row -> AND-OR, times scale  -+
//   x       [tokens, 256 bytes]     cp.async -> ring -> 16 bytes a token                       -+
//   mma scales  [128 rows, 32 bytes]    16 groups at once, a ring of their own, two places
//
// Weights are rounded to T with their scale, as the reference does. A token's sum is one chain over
// K, whatever the number of tokens: the form of the batch-invariant mode.
//
// 16, 32 or 64 tokens have a loop each, with 4, 3 and 2 stages of the same ring: the more there is
// to multiply, the less must be under way.
//
// Where 16-byte pieces go in the ring, so that eight lanes never meet in a bank, writing or
// reading:
//   codes    as they come: lanes 4 g + q read group q of rows g and g + 1, 128 bytes
//   x        word w of group q of token t: half w % 2 of 256 bytes, then bits (w / 2 ^ t, q / 2 ^
//   w,
//            q) of the place; a warp writes pairs of groups and reads one word of four groups
//   scales   halves change places every four rows
#pragma once
#include "int4_product.cuh"

constexpr int MANY_WARPS = 4;
constexpr int MANY_THREADS = MANY_WARPS * WARP;
constexpr int MANY_ROWS = 128;   // of weights, a block's
constexpr int MANY_TOKENS = 64;  // of a block, at most
constexpr int WARP_TILES = 2;    // of TILE_ROWS
constexpr int WARP_ROWS = WARP_TILES * TILE_ROWS;
constexpr int RING_BYTES = 48 << 10;
constexpr int STEP = QUAD;     // groups
constexpr int SPAN_STEPS = 4;  // steps whose scales come at once
constexpr int SPAN = STEP * SPAN_STEPS;
constexpr int CODES_BYTES = MANY_ROWS * STEP * 16;
constexpr int X_ROW_BYTES = STEP * GROUP * 2;
constexpr int SPAN_BYTES = MANY_ROWS * SPAN * 2;
constexpr int PAD = 8;  // elements between tokens of results on their way out: other banks

// Shared memory of a block: what is known from the start, then the rings.
struct ManyShared {
  const void* row_gmem[MANY_ROWS];    // where rows of W begin; those past the end repeat the last
  const void* scale_gmem[MANY_ROWS];  // and their scales
  const void* x_gmem[MANY_TOKENS];    // where rows of x begin
  int slots[MANY_TOKENS];
  int count;
  int unused[3];
  alignas(16) unsigned char spans[2][SPAN_BYTES];

  // RING_BYTES: stages of codes and of x; at the end, results.
  __device__ __forceinline__ unsigned char* ring() {
    return reinterpret_cast<unsigned char*>(this + 1);
  }
};

__device__ __forceinline__ ManyShared& many_shared() {
  extern __shared__ __align__(16) unsigned char many_smem[];
  return *reinterpret_cast<ManyShared*>(many_smem);
}

// The rows of W that a block multiplies: all `rows` behind `first`, or with `width` above 0, of
// each warp, 16 gate rows and their up rows.
struct ManyRows {
  int first, rows, width;

  __device__ __forceinline__ int operator[](int i) const {
    if (width == 0) return min(first + i, rows - 1);
    const int row = first + i / WARP_ROWS * TILE_ROWS + i % TILE_ROWS;
    return min(row, width - 1) + i % WARP_ROWS / TILE_ROWS * width;
  }
};

// The tokens of a block: slots from a table, or `first` on without one.
struct ManyTokens {
  const int* slots_gmem;
  int first, count, slots_per_row;
};

// Fills what is known from the start. Every thread calls it; `row_of` gives the address of row i of
// the block, `scale_of` that of its scales, `x_of` that of row i of x.
template <class RowOf, class ScaleOf, class XOf>
__device__ __forceinline__ void begin_many(ManyShared& shared, const ManyTokens& tokens,
                                           RowOf row_of, ScaleOf scale_of, XOf x_of) {
  const int i = threadIdx.x;
  shared.row_gmem[i] = row_of(i);
  shared.scale_gmem[i] = scale_of(i);
  if (i < MANY_TOKENS) {
    const int t = min(i, tokens.count - 1);
    const int slot = tokens.slots_gmem ? tokens.slots_gmem[t] : tokens.first + t;
    shared.slots[i] = slot;
    shared.x_gmem[i] = x_of(slot / tokens.slots_per_row);
  }
  if (i == 0) shared.count = tokens.count;
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void begin_many(ManyShared& shared, const ManyTokens& tokens,
                                           const Int4Weights& w, ManyRows rows, const T* x_gmem) {
  const int64 scale_bytes = w.scale_stride * static_cast<int64>(sizeof(T));
  begin_many(
      shared, tokens, [&](int i) { return w.codes_gmem + rows[i] * w.codes_stride; },
      [&](int i) { return static_cast<const char*>(w.scale_gmem) + rows[i] * scale_bytes; },
      [&](int i) { return x_gmem + i * rearranged_columns(w.groups); });
}

// Bytes from the start of a token's x in a stage to word w of group q.
__device__ __forceinline__ int x_place(int token, int w, int q) {
  return w % 2 * 128 + ((w / 2 ^ token) & 1) * 64 + ((q / 2 ^ w) & 1) * 32 + q % 2 * 16;
}

// Bytes from the start of a span to half `half` of a row's scales.
__device__ __forceinline__ int scale_place(int row, int half) {
  return row * (SPAN * 2) + ((half ^ row / 4) & 1) * 16;
}

// The scales of SPAN groups from `group` on; with `vectors` rows are whole 16-byte pieces.
__device__ __forceinline__ void copy_scales(ManyShared& shared, int span, int group, int groups,
                                            bool vectors) {
  unsigned char* to_smem = shared.spans[span % 2];
  if (vectors) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = j * (MANY_ROWS / 2) + threadIdx.x / 2, half = threadIdx.x % 2;
      const int from = group + half * (SPAN / 2);
      copy_async_16(to_smem + scale_place(row, half),
                    static_cast<const unsigned short*>(shared.scale_gmem[row]) + from,
                    from < groups);
    }
    return;
  }
  const auto* row_gmem = static_cast<const unsigned short*>(shared.scale_gmem[threadIdx.x]);
#pragma unroll 1
  for (int i = 0; i < SPAN; ++i) {
    auto* row_smem =
        reinterpret_cast<unsigned short*>(to_smem + scale_place(threadIdx.x, i / (SPAN / 2)));
    row_smem[i % (SPAN / 2)] = group + i < groups ? row_gmem[group + i] : 0;
  }
}

// What a thread copies of each step: pieces of codes of one column, and one piece of each eighth
// token. 16 threads have a token; pieces of x lie as pairs of groups, word by word.
template <int NT>
struct StepCopies {
  static constexpr int CODES = MANY_ROWS * STEP / MANY_THREADS;  // pieces
  static constexpr int ROWS = MANY_THREADS / STEP;               // from one to the next

  const uint4* codes_gmem[CODES];  // of step 0
  int group, x_group;              // that the pieces of the next step are of
  int x_piece;                     // of the next step, in a row of x
  int x_smem;                      // where it goes in a stage
  int tokens;                      // from this thread's first on

  __device__ __forceinline__ explicit StepCopies(const ManyShared& shared) {
    const int thread = threadIdx.x, token = thread / 16;
#pragma unroll
    for (int j = 0; j < CODES; ++j) {
      codes_gmem[j] = static_cast<const uint4*>(shared.row_gmem[j * ROWS + thread / STEP]);
    }
    group = thread % STEP;
    x_piece = thread % 16;
    x_group = x_piece / 8 * 2 + x_piece % 2;
    x_smem = CODES_BYTES + token * X_ROW_BYTES + x_place(token, x_piece % 8 / 2, x_group);
    tokens = shared.count - token;
  }

  // Starts step `step`, the next one, where K has it; what K lacks of it is zeros.
  __device__ __forceinline__ void next(ManyShared& shared, unsigned char* stage_smem, int step,
                                       int groups, bool vectors) {
    const int first = step * STEP, thread = threadIdx.x;
    if (first < groups) {
      if (step % SPAN_STEPS == 0) copy_scales(shared, step / SPAN_STEPS, first, groups, vectors);
      const uint4* x_gmem[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        x_gmem[n] = static_cast<const uint4*>(shared.x_gmem[n * 8 + thread / 16]) + x_piece;
      }
#pragma unroll
      for (int j = 0; j < CODES; ++j) {
        copy_async_16(stage_smem + thread * 16 + j * (MANY_THREADS * 16), codes_gmem[j] + group,
                      group < groups);
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        copy_async_16(stage_smem + x_smem + n * (8 * X_ROW_BYTES), x_gmem[n],
                      x_group < groups && n * 8 < tokens);
      }
      group += STEP;
      x_group += STEP;
      x_piece += X_ROW_BYTES / 16;
    }
    copy_async_commit();
  }
};

// The first of a lane's rows in its block.
__device__ __forceinline__ int first_row() { return threadIdx.x / WARP * WARP_ROWS + lane_row(); }

// One step of a warp; `scale_first` is where the lane's first scale is in a span.
template <class T, int NT>
__device__ __forceinline__ void multiply_step(float (&sums)[WARP_TILES][NT][4],
                                              const unsigned char* stage_smem,
                                              const unsigned char* span_smem, int scale_first,
                                              int step, Shift shift) {
  const int q = lane_of_quad(), g = lane_row();
  const int first = first_row();
  const unsigned char* codes_smem = stage_smem + (first * STEP + q) * 16;
  // Rows 8 apart have their halves in the same place, and halves change places by one bit.
  const unsigned char* scale_smem =
      span_smem + (scale_first ^ step / 2 % 2 * 16) + step % 2 * (STEP * 2);
  LaneCodes codes[WARP_TILES];
  PairScales<T> scale[WARP_TILES][SIDES];
#pragma unroll
  for (int m = 0; m < WARP_TILES; ++m) {
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
      const int row = m * TILE_ROWS + side * 8;
      codes[m][side] = *reinterpret_cast<const uint4*>(codes_smem + row * (STEP * 16));
      const unsigned short* from =
          reinterpret_cast<const unsigned short*>(scale_smem + row * (SPAN * 2));
      scale[m][side] = PairScales<T>(pair_of(*from));
    }
  }
  const unsigned char* x_smem = stage_smem + CODES_BYTES + g * X_ROW_BYTES;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    unsigned r[WARP_TILES][4], s[WARP_TILES][4];
#pragma unroll
    for (int m = 0; m < WARP_TILES; ++m) {
      unpack_scaled<T>(r[m], word_of(codes[m][0], w), shift, scale[m][0]);
      unpack_scaled<T>(s[m], word_of(codes[m][1], w), shift, scale[m][1]);
    }
    const int place = x_place(g, w, q);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint4 b = *reinterpret_cast<const uint4*>(x_smem + n * 8 * X_ROW_BYTES + place);
#pragma unroll
      for (int m = 0; m < WARP_TILES; ++m) {
        Codes<T>::mma(sums[m][n], sums[m][n], r[m][0], s[m][0], r[m][1], s[m][1], b.x, b.y);
      }
#pragma unroll
      for (int m = 0; m < WARP_TILES; ++m) {
        Codes<T>::mma(sums[m][n], sums[m][n], r[m][2], s[m][2], r[m][3], s[m][3], b.z, b.w);
      }
    }
  }
}

// The sums of a block, after `begin_many`: of NT * 8 tokens. At its end the ring is free.
template <class T, int NT>
__device__ __forceinline__ void many_product(float (&sums)[WARP_TILES][NT][4], ManyShared& shared,
                                             int groups, bool vectors, Shift shift) {
  constexpr int STAGE_BYTES = CODES_BYTES + NT * 8 * X_ROW_BYTES;
  constexpr int STAGES = RING_BYTES / STAGE_BYTES;  // 4, 3, 2
  StepCopies<NT> copies(shared);
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    copies.next(shared, shared.ring() + step * STAGE_BYTES, step, groups, vectors);
  }
  const int scale_first = scale_place(first_row(), 0) + lane_of_quad() * 2;
  int stage = 0, ahead = STAGES - 1;
#pragma unroll 1
  for (int step = 0; step * STEP < groups; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // this step is there, and all warps are done with the one before
    copies.next(shared, shared.ring() + ahead * STAGE_BYTES, step + STAGES - 1, groups, vectors);
    multiply_step<T>(sums, shared.ring() + stage * STAGE_BYTES, shared.spans[step / SPAN_STEPS % 2],
                     scale_first, step, shift);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    ahead = ahead + 1 == STAGES ? 0 : ahead + 1;
  }
  copy_async_wait<0>();
  __syncthreads();
}

// Results of a block on their way out: [token][MANY_ROWS], PAD apart.
template <class T>
__device__ __forceinline__ T* result_of(ManyShared& shared, int token) {
  return reinterpret_cast<T*>(shared.ring()) + token * (MANY_ROWS + PAD);
}

// What a warp's sums are of: `store(token, row, sums)` for each token and row of its first tile.
template <int NT, class Store>
__device__ __forceinline__ void each_sum(const float (&sums)[WARP_TILES][NT][4], Store store) {
  const int q = lane_of_quad(), g = lane_row();
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store(n * 8 + 2 * q + i % 2, i / 2 * 8 + g, sums[0][n][i], sums[1][n][i]);
    }
  }
}

// Rows of the product, as they are.
template <class T, int NT>
__device__ __forceinline__ void store_rows(ManyShared& shared,
                                           const float (&sums)[WARP_TILES][NT][4]) {
  const int first = threadIdx.x / WARP * WARP_ROWS;
  each_sum(sums, [&](int token, int row, float a, float b) {
    T* to_smem = result_of<T>(shared, token) + first + row;
    to_smem[0] = from_float<T>(a);
    to_smem[TILE_ROWS] = from_float<T>(b);
  });
}

// A tile of the product itself, of 8 NT tokens; then of as many as the block has.
template <class T, int NT>
__device__ __forceinline__ void rows_tile_of(ManyShared& shared, int groups, bool vectors,
                                             Shift shift) {
  float sums[WARP_TILES][NT][4] = {};
  many_product<T>(sums, shared, groups, vectors, shift);
  store_rows<T>(shared, sums);
}
template <class T>
__device__ __forceinline__ void rows_tile(ManyShared& shared, int groups, bool vectors,
                                          Shift shift) {
  if (shared.count <= 16) {
    rows_tile_of<T, 2>(shared, groups, vectors, shift);
  } else if (shared.count <= 32) {
    rows_tile_of<T, 4>(shared, groups, vectors, shift);
  } else {
    rows_tile_of<T, 8>(shared, groups, vectors, shift);
  }
}

// COLUMNS results of each token to columns `first` .. of its row of y [.., columns], `slot` rows
// further down than its own; with `vectors` rows of y are whole 16-byte pieces.
template <class T, int COLUMNS>
__device__ __forceinline__ void copy_out(ManyShared& shared, T* y_gmem, int slot, int first,
                                         int columns, bool vectors) {
  __syncthreads();
  constexpr int PIECES = COLUMNS / PIECE;
#pragma unroll 1
  for (int i = threadIdx.x; i < shared.count * PIECES; i += MANY_THREADS) {
    const int token = i / PIECES, column = i % PIECES * PIECE, there = columns - first - column;
    const T* from_smem = result_of<T>(shared, token) + column;
    T* to_gmem = y_gmem + static_cast<int64>(slot + shared.slots[token]) * columns + first + column;
    if (vectors && there >= PIECE) {
      store_vec<T, PIECE>(to_gmem, load_vec<T, PIECE>(from_smem));
    } else {
#pragma unroll 1
      for (int e = 0; e < min(there, PIECE); ++e) to_gmem[e] = from_smem[e];
    }
  }
}
