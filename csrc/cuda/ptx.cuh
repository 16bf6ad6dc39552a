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
