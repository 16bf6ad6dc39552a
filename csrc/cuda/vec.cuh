// Element types and 16-byte accesses.
#pragma once
#include "ptx.cuh"

using int64 = long long;

// 16-bit floats as bits: arithmetic is in float, here and everywhere.
struct bf16 {
  unsigned short bits;
};
struct fp16 {
  unsigned short bits;
};

__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(fp16 x) { return from_fp16_bits(x.bits); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return {to_bf16_bits(x)};
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
  return {to_fp16_bits(x)};
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

// x rounded to T, as the model does between two steps of a formula.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// Elements that one 16-byte access moves.
template <class T>
constexpr int PER_VEC = 16 / static_cast<int>(sizeof(T));

// N elements that move at once: N = PER_VEC, at an address that is a multiple of 16 bytes, or 1.
template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
  T at[N];
};

template <class T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* from_gmem) {
  return *reinterpret_cast<const Vec<T, N>*>(from_gmem);
}

template <class T, int N>
__device__ __forceinline__ void store_vec(T* to_gmem, const Vec<T, N>& vec) {
  *reinterpret_cast<Vec<T, N>*>(to_gmem) = vec;
}

// The same bits, which the compiler takes for others: what it has made of them before, floats in
// twice the registers, is not kept.
template <class T, int N>
__device__ __forceinline__ void make_anew(Vec<T, N>& vec) {
  if constexpr (sizeof(vec) == 16) {
    take_anew(reinterpret_cast<uint4&>(vec));
  }
}

// Integers of torch's two widths; a launch says which.
struct Integers {
  const void* gmem;
  int bytes;  // 4 or 8

  __device__ __forceinline__ int64 operator[](int64 i) const {
    return bytes == 8 ? static_cast<const int64*>(gmem)[i] : static_cast<const int*>(gmem)[i];
  }
};
