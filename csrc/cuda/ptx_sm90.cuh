// Inline assembly that sm_90a alone has, beside `ptx.cuh` and by its rules. Included by every
// architecture's build and used by none but that one.
#pragma once
#include "ptx.cuh"

__device__ __forceinline__ unsigned shared_address(const void* smem) {
  return static_cast<unsigned>(__cvta_generic_to_shared(smem));
}

// "Parallel Synchronization and Communication Instructions: mbarrier.init". A barrier in shared
// memory whose phase ends with its `arrivals`th arrival; then the next phase begins.
__device__ __forceinline__ void mbarrier_init(unsigned long long* bar_smem, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar_smem)),
               "r"(arrivals)
               : "memory");
}

// "Parallel Synchronization and Communication Instructions: mbarrier.arrive". Publishes what this
// thread did before.
__device__ __forceinline__ void mbarrier_arrive(unsigned long long* bar_smem) {
  asm volatile(
      "mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar_smem))
      : "memory");
}

// "Parallel Synchronization and Communication Instructions: cp.async.mbarrier.arrive". An arrival
// that counts, once all copies by cp.async that this thread has started have landed.
__device__ __forceinline__ void mbarrier_arrive_on_copies(unsigned long long* bar_smem) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar_smem))
      : "memory");
}

// "Parallel Synchronization and Communication Instructions: mbarrier.try_wait". Until the phase of
// this parity has ended: of the first phase it is 0, and the one before it counts as ended.
__device__ __forceinline__ void mbarrier_wait(unsigned long long* bar_smem, int parity) {
  const unsigned address = shared_address(bar_smem);
  int ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.s32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!ended);
}

// "Parallel Synchronization and Communication Instructions: membar, fence". What is known here of
// accesses to shared memory by loads, stores and cp.async is known to wgmma behind it.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// "Miscellaneous Instructions: setmaxnreg". By all warps of a warpgroup.
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions: Matrix Descriptor Format".
// A matrix that lies in patterns of 8 rows of 128 bytes, 1,024 bytes each and beginning at a
// multiple of that; in row r of a pattern 16-byte chunk c is in the place of chunk c ^ r:
//
//   rows 0 .. 7     | 64 values | + leading: the next 64 values of these rows ..
//   + stride: rows 8 .. 15 ..
//
// K-major (A, and B as it multiplies): a row is along K, and an operation takes 16 of the 64
// values, 32 bytes from the last one's (`leading` counts for nothing). MN-major (B transposed): a
// row is along N, an operation takes 16 rows.
__device__ __forceinline__ unsigned long long matrix_descriptor(const void* smem, int leading,
                                                                int stride) {
  constexpr unsigned long long SWIZZLE_128 = 1ull << 62;
  return SWIZZLE_128 | static_cast<unsigned long long>(stride >> 4) << 32 |
         static_cast<unsigned long long>(leading >> 4) << 16 | shared_address(smem) >> 4;
}

// Of a matrix `bytes` further on.
__device__ __forceinline__ unsigned long long moved(unsigned long long descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

// "Asynchronous Multiply-and-Accumulate Instruction: wgmma.fence". Before the first product, and
// between an access to registers of one and the product.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// "Asynchronous Multiply-and-Accumulate Instruction: wgmma.commit_group".
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// "Asynchronous Multiply-and-Accumulate Instruction: wgmma.wait_group". For all groups; `d` are the
// registers of their results, which nothing may touch before.
template <int N>
__device__ __forceinline__ void wgmma_wait(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// "Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async". D = A B, plus D where `add`;
// A [64, 16], B [16, N], by the four warps of a warpgroup. Warp w of them has rows 16 w .. of D,
// and of these lane 4 r + q
//
//   d[4 j], d[4 j + 1]        row r,     columns 8 j + 2 q, 8 j + 2 q + 1
//   d[4 j + 2], d[4 j + 3]    row r + 8, the same columns
//
// A in registers is as of mma m16n8k16 (`ptx.cuh`).
#define WGMMA_8(d, i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_32(d, i) WGMMA_8(d, i), WGMMA_8(d, i + 8), WGMMA_8(d, i + 16), WGMMA_8(d, i + 24)
#define WGMMA_N64                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define WGMMA_N128                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define WGMMA(SUFFIX, TYPE)                                                                  \
  /* N = 64, A and B from shared memory, both K-major. */                                    \
  __device__ __forceinline__ void wgmma_n64_##SUFFIX(float (&d)[32], unsigned long long a,   \
                                                     unsigned long long b, int add) {        \
    asm volatile(                                                                            \
        "{\n.reg .pred add;\nsetp.ne.s32 add, %34, 0;\n"                                     \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " WGMMA_N64            \
        ", %32, %33, add, 1, 1, 0, 0;\n}"                                                    \
        : WGMMA_32(d, 0)                                                                     \
        : "l"(a), "l"(b), "r"(add)                                                           \
        : "memory");                                                                         \
  }                                                                                          \
  /* The same with A in registers, always added. */                                          \
  __device__ __forceinline__ void wgmma_n64_##SUFFIX(float (&d)[32], const unsigned (&a)[4], \
                                                     unsigned long long b) {                 \
    asm volatile(                                                                            \
        "{\n.reg .pred add;\nsetp.eq.s32 add, 0, 0;\n"                                       \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " WGMMA_N64            \
        ", {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"                                      \
        : WGMMA_32(d, 0)                                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                 \
        : "memory");                                                                         \
  }                                                                                          \
  /* N = 128, A and B from shared memory, B MN-major, always added. */                       \
  __device__ __forceinline__ void wgmma_n128_##SUFFIX(float (&d)[64], unsigned long long a,  \
                                                      unsigned long long b) {                \
    asm volatile(                                                                            \
        "{\n.reg .pred add;\nsetp.eq.s32 add, 0, 0;\n"                                       \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " " WGMMA_N128          \
        ", %64, %65, add, 1, 1, 0, 1;\n}"                                                    \
        : WGMMA_32(d, 0), WGMMA_32(d, 32)                                                    \
        : "l"(a), "l"(b)                                                                     \
        : "memory");                                                                         \
  }
WGMMA(bf16, "bf16")
WGMMA(fp16, "f16")
#undef WGMMA
#undef WGMMA_N128
#undef WGMMA_N64
#undef WGMMA_32
#undef WGMMA_8
