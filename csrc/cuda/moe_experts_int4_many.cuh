// The two products of `moe_experts_int4` for many tokens: blocks of up to 64 slots of an expert.
//
//   gate_up   shared expert: row tiles x 64 tokens | block 0: row tile 0, 1, 2 .. | block 1: ..
//   down      the same                                                  -> one row per slot
//
// A row tile is 64 gate rows and their up rows, or 128 rows of down. Row tiles run fastest: x of a
// block, which all of them read, stays in L2, and the next block of the same expert finds the
// weights there. SwiGLU happens in registers, as a warp has gate rows and their up rows; results
// leave through shared memory, 16 bytes a thread.
//
// The shared expert goes round the same ring, 64 columns a step, two steps; both operands come out
// of it by ldmatrix. 16-byte piece p of row r is where piece p ^ r % 8 would be.
#pragma once
#include "int4_many.cuh"
#include "moe_experts_int4_experts.cuh"

constexpr int DENSE_STEP = 64;  // columns
constexpr int DENSE_STAGES = 2;
constexpr int DENSE_ROW_BYTES = DENSE_STEP * 2;
constexpr int DENSE_PIECES = DENSE_STEP / PIECE;
constexpr int DENSE_NT = MANY_TOKENS / 8;
constexpr int DENSE_STAGE_BYTES = (MANY_ROWS + MANY_TOKENS) * DENSE_ROW_BYTES;

__device__ __forceinline__ int dense_place(int row, int piece) {
  return row * DENSE_ROW_BYTES + (piece ^ row % 8) * 16;
}

template <class T>
__device__ __forceinline__ void copy_dense_step(ManyShared& shared, int step, int columns) {
  unsigned char* stage_smem = shared.ring() + step % DENSE_STAGES * DENSE_STAGE_BYTES;
  const int row = threadIdx.x / DENSE_PIECES, piece = threadIdx.x % DENSE_PIECES;
  const int k = step * DENSE_STEP + piece * PIECE;
  constexpr int ROWS = MANY_THREADS / DENSE_PIECES;  // at a time
#pragma unroll
  for (int j = 0; j < MANY_ROWS; j += ROWS) {
    copy_async_16(stage_smem + dense_place(j + row, piece),
                  static_cast<const T*>(shared.row_gmem[j + row]) + k, k < columns);
  }
#pragma unroll
  for (int j = 0; j < MANY_TOKENS; j += ROWS) {
    copy_async_16(stage_smem + dense_place(MANY_ROWS + j + row, piece),
                  static_cast<const T*>(shared.x_gmem[j + row]) + k, k < columns);
  }
  copy_async_commit();
}

// Sums of 16-bit weights and x, after `begin_many`. At its end the ring is free.
template <class T>
__device__ __forceinline__ void dense_many(float (&sums)[WARP_TILES][DENSE_NT][4],
                                           ManyShared& shared, int columns) {
  const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * WARP_ROWS;
  copy_dense_step<T>(shared, 0, columns);
#pragma unroll 1
  for (int step = 0; step * DENSE_STEP < columns; ++step) {
    copy_async_wait<0>();
    __syncthreads();  // this step is there, and all warps are done with the one before
    copy_dense_step<T>(shared, step + 1, columns);
    const unsigned char* stage_smem = shared.ring() + step % DENSE_STAGES * DENSE_STAGE_BYTES;
#pragma unroll
    for (int k = 0; k < DENSE_PIECES; k += 4) {  // two instructions along K
      unsigned a[2][WARP_TILES][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < WARP_TILES; ++m) {
          const int row = first + m * TILE_ROWS + lane % 16;
          load_matrices(a[half][m], stage_smem + dense_place(row, k + half * 2 + lane / 16));
        }
      }
#pragma unroll
      for (int n = 0; n < DENSE_NT; ++n) {
        unsigned b[4];
        load_matrices(b, stage_smem + dense_place(MANY_ROWS + n * 8 + lane % 8, k + lane / 8));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int m = 0; m < WARP_TILES; ++m) {
            const unsigned (&w)[4] = a[half][m];
            Codes<T>::mma(sums[m][n], sums[m][n], w[0], w[1], w[2], w[3], b[half * 2],
                          b[half * 2 + 1]);
          }
        }
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();
}

// Starts a block of the shared expert; `first` is its first token.
template <class T>
__device__ __forceinline__ void begin_dense(ManyShared& shared, const Experts<T>& experts,
                                            ManyRows rows, const T* x_gmem, int64 x_stride,
                                            int first) {
  const DenseWeights<T>& w = experts.shared;
  auto row_of = [&](int i) { return w.gmem + rows[i] * w.stride; };
  begin_many(shared, {nullptr, first, min(MANY_TOKENS, experts.tokens - first), 1}, row_of, row_of,
             [&](int i) { return x_gmem + i * x_stride; });
}

// h of a tile on its way out, zeros from row `rows` on; `place` is where row i of it goes.
template <class T, int NT, class Place>
__device__ __forceinline__ void store_gated(ManyShared& shared,
                                            const float (&sums)[WARP_TILES][NT][4], int rows,
                                            Place place) {
  const int first = threadIdx.x / WARP * TILE_ROWS;
  each_sum(sums, [&](int token, int row, float gate, float up) {
    const float h = first + row < rows ? silu(gate) * up : 0.0f;
    result_of<T>(shared, token)[place(first + row)] = from_float<T>(h);
  });
}

// A tile of h, of 8 NT tokens.
template <class T, int NT>
__device__ __forceinline__ void gate_up_tile(ManyShared& shared, int groups, int rows, bool vectors,
                                             Shift shift) {
  float sums[WARP_TILES][NT][4] = {};
  many_product<T>(sums, shared, groups, vectors, shift);
  store_gated<T>(shared, sums, rows, [](int i) {
    return static_cast<int>(group_offset(i / GROUP)) + column_offset(i % GROUP);
  });
}

template <class T>
__device__ __forceinline__ void gate_up_many(ManyShared& shared, const Experts<T>& experts,
                                             const T* x_gmem, int64 x_stride,
                                             const T* xr_gmem,  // as `prepare` leaves it
                                             T* h_gmem,         // [slots, rearranged_columns of F]
                                             T* h_shared_gmem,  // [T, F' rounded up to 8]
                                             int width, int shared_width, int choices,
                                             int row_tiles, bool vectors) {
  constexpr int ROWS = MANY_ROWS / 2;
  const int routed = static_cast<int>(blockIdx.x) - experts.shared_tiles * experts.shared_blocks;
  if (routed < 0) {
    const int first = blockIdx.x / experts.shared_blocks * ROWS;
    begin_dense(shared, experts, {first, shared_width, shared_width}, x_gmem, x_stride,
                blockIdx.x % experts.shared_blocks * MANY_TOKENS);
    float sums[WARP_TILES][DENSE_NT][4] = {};
    dense_many<T>(sums, shared, experts.shared.columns);
    store_gated<T>(shared, sums, shared_width - first, [](int i) { return i; });
    const int columns = (shared_width + PIECE - 1) / PIECE * PIECE;
    copy_out<T, ROWS>(shared, h_shared_gmem, 0, first, columns, true);
    return;
  }
  const BlockTables& tables = experts.tables;
  const int block = routed / row_tiles;
  const int size = tables.sizes()[block];
  if (size == 0) return;
  const int first = routed % row_tiles * ROWS;
  const Int4Weights w = experts.of(block);
  begin_many(shared, {tables.gmem + tables.starts()[block], 0, size, choices}, w,
             {first, width, width}, xr_gmem);
  const Shift shift{experts.shift_factor};
  if (size <= 16) {
    gate_up_tile<T, 2>(shared, w.groups, width - first, vectors, shift);
  } else if (size <= 32) {
    gate_up_tile<T, 4>(shared, w.groups, width - first, vectors, shift);
  } else {
    gate_up_tile<T, 8>(shared, w.groups, width - first, vectors, shift);
  }
  copy_out<T, ROWS>(shared, h_gmem, 0, first, static_cast<int>(rearranged_columns(width / GROUP)),
                    true);
}

template <class T>
__device__ __forceinline__ void down_many(
    ManyShared& shared, const Experts<T>& experts, const T* h_gmem, const T* h_shared_gmem,
    T* rows_gmem,  // [slots (+ T), D]: the shared expert's last
    int depth, int row_tiles, bool vectors) {
  const BlockTables& tables = experts.tables;
  const int routed = static_cast<int>(blockIdx.x) - experts.shared_tiles * experts.shared_blocks;
  if (routed < 0) {
    const int first = blockIdx.x / experts.shared_blocks * MANY_ROWS;
    begin_dense(shared, experts, {first, depth, 0}, h_shared_gmem,
                static_cast<int64>(experts.shared.columns),
                blockIdx.x % experts.shared_blocks * MANY_TOKENS);
    float sums[WARP_TILES][DENSE_NT][4] = {};
    dense_many<T>(sums, shared, experts.shared.columns);
    store_rows<T>(shared, sums);
    copy_out<T, MANY_ROWS>(shared, rows_gmem, tables.slot_count, first, depth, true);
    return;
  }
  const int block = routed / row_tiles;
  const int size = tables.sizes()[block];
  if (size == 0) return;
  const int first = routed % row_tiles * MANY_ROWS;
  const Int4Weights w = experts.of(block);
  begin_many(shared, {tables.gmem + tables.starts()[block], 0, size, 1}, w, {first, depth, 0},
             h_gmem);
  rows_tile<T>(shared, w.groups, vectors, Shift{experts.shift_factor});
  copy_out<T, MANY_ROWS>(shared, rows_gmem, 0, first, depth, true);
}
