// Every line of inline assembly of this package, one wrapper an instruction, each with the section
// of the PTX ISA (8.7) that defines it. Fragment layouts are drawn where a wrapper has one.
//
// No header of CUDA is included anywhere in csrc/cuda/: NVRTC needs no include folder, and sources
// compile the same with every toolkit from 12.4 on.
#pragma once

// "Data Movement and Conversion Instructions: cvt". Round to nearest even; NaN becomes 0x7fff.
__device__ __forceinline__ unsigned short to_bf16_bits(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// As above, two at a time: `low` in bits 0..15.
__device__ __forceinline__ unsigned to_bf16x2(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ unsigned short to_fp16_bits(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float from_fp16_bits(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// "Parallel Synchronization and Communication Instructions: barrier". A barrier of its own for the
// first `threads` threads to arrive at it; number 0 is __syncthreads().
__device__ __forceinline__ void named_barrier_sync(int number, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// "Logic and Shift Instructions: lop3". (x & mask) | bits in one instruction, whatever the compiler
// knows of the operands.
__device__ __forceinline__ unsigned and_or(unsigned x, unsigned mask, unsigned bits) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
  return result;
}

// "Half Precision Floating Point Instructions: fma". a * b + c of two halves, each rounded once.
__device__ __forceinline__ unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
  unsigned result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

__device__ __forceinline__ unsigned fma_fp16x2(unsigned a, unsigned b, unsigned c) {
  unsigned result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// "Data Movement and Conversion Instructions: mov". 16 bits, twice: ptxas reads one half twice,
// where a product by 0x10001 would be an instruction.
__device__ __forceinline__ unsigned pair_of(unsigned short half) {
  unsigned pair;
  asm("mov.b32 %0, {%1, %1};" : "=r"(pair) : "h"(half));
  return pair;
}

// "Data Movement and Conversion Instructions: ld.global.nc". 16 bytes that are read once: they
// leave L1 to what is read again.
__device__ __forceinline__ uint4 load_once(const void* from_gmem) {
  uint4 x;
  asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(from_gmem));
  return x;
}

// As above where `wanted`, else x stays. No branch: one would keep loads and what is computed
// between them apart.
__device__ __forceinline__ void load_once_if(uint4& x, const void* from_gmem, bool wanted) {
  asm("{\n"
      ".reg .pred wanted;\n"
      "setp.ne.s32 wanted, %5, 0;\n"
      "@wanted ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
      : "l"(from_gmem), "r"(static_cast<int>(wanted)));
}

// No instruction: only the compiler sees other numbers, which it knows nothing of.
__device__ __forceinline__ void take_anew(uint4& x) {
  asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
}

// "Special Registers: %tid". Read anew at each call: what follows from it holds no registers
// before.
__device__ __forceinline__ unsigned thread_anew() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// "Warp Level Matrix Multiply-Accumulate Instructions: mma, m16n8k16 with floating point types".
// D = A B + C. Of a warp, lane 4 r + q (r = 0 .. 7, q = 0 .. 3) holds, two 16-bit numbers a word:
//
//   A [16, 16]  a0: row r,     columns 2 q, 2 q + 1        a2: row r,     columns 2 q + 8, 2 q + 9
//               a1: row r + 8, columns 2 q, 2 q + 1        a3: row r + 8, columns 2 q + 8, 2 q + 9
//   B [16, 8]   b0: rows 2 q, 2 q + 1 of column r          b1: rows 2 q + 8, 2 q + 9 of column r
//   C, D [16, 8] float32   0, 1: row r, columns 2 q, 2 q + 1     2, 3: row r + 8, the same columns
#define MMA_M16N8K16(NAME, TYPE)                                                                 \
  __device__ __forceinline__ void NAME(float (&d)[4], const float (&c)[4], unsigned a0,          \
                                       unsigned a1, unsigned a2, unsigned a3, unsigned b0,       \
                                       unsigned b1) {                                            \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                   \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"               \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                         \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
          "f"(c[3]));                                                                            \
  }
MMA_M16N8K16(mma_m16n8k16_bf16, "bf16")
MMA_M16N8K16(mma_m16n8k16_fp16, "f16")
#undef MMA_M16N8K16

// "Data Movement and Conversion Instructions: cp.async". 16 bytes to shared memory, past L1; both
// addresses are multiples of 16. With `present` false zeros are written and nothing is read.
__device__ __forceinline__ void copy_async_16(void* to_smem, const void* from_gmem, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to_smem))),
               "l"(__cvta_generic_to_global(from_gmem)), "r"(present ? 16 : 0)
               : "memory");
}

// The same of 4 bytes, at addresses that are multiples of 4, through L1.
__device__ __forceinline__ void copy_async_4(void* to_smem, const void* from_gmem, bool present) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to_smem))),
               "l"(__cvta_generic_to_global(from_gmem)), "r"(present ? 4 : 0)
               : "memory");
}

// "Data Movement and Conversion Instructions: cp.async.commit_group".
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// "Data Movement and Conversion Instructions: cp.async.wait_group". Until at most PENDING of this
// thread's groups are under way; what other threads copied is there after a barrier only.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// "Warp-level matrix load instruction: ldmatrix". Four 8 x 8 matrices of 16-bit elements; lane l
// gives the address of row l % 8 of matrix l / 8. Of each matrix it gets a pair of one row:
//
//            columns 0 1   2 3   4 5   6 7              transposed, a pair of one column:
//   row 0     lane   0     1     2     3                rows 0 1, column 0: lane 0
//   row 1            4     5     6     7                rows 2 3, column 0: lane 1
//   ..                                                  rows 0 1, column 1: lane 4
__device__ __forceinline__ void load_matrices(unsigned (&rmem)[4], const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(rmem[0]), "=r"(rmem[1]), "=r"(rmem[2]), "=r"(rmem[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row_smem)))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&rmem)[4],
                                                         const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(rmem[0]), "=r"(rmem[1]), "=r"(rmem[2]), "=r"(rmem[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row_smem)))
               : "memory");
}

// "Floating Point Instructions: ex2". 2^x, off by two units in the last place at most.
__device__ __forceinline__ float exp2_approx(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

__device__ __forceinline__ unsigned to_fp16x2(float low, float high) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// "Parallel Synchronization and Communication Instructions: atom", acq_rel at scope gpu. What this
// thread knows of (its block's stores behind a barrier too) is published, and what threads that
// came before it published can be read by it, and behind a barrier by its block. The old value.
__device__ __forceinline__ int atomic_add_acq_rel(int* at_gmem, int value) {
  int old;
  asm volatile("atom.global.add.acq_rel.gpu.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(at_gmem)), "r"(value)
               : "memory");
  return old;
}

// "Floating Point Instructions: rcp". 1 / x, off by one unit in the last place at most.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}
