// float8_e4m3fn by integer arithmetic, the same bits on every architecture (the machine has the
// conversion from sm_89 on only).
#pragma once

constexpr float LARGEST_E4M3 = 448.0f;
constexpr unsigned char NAN_E4M3 = 0x7f;

// Rounds to nearest even. |value| must be at most 464, what rounds to 448.
__device__ __forceinline__ unsigned char to_e4m3(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned sign = bits >> 24 & 0x80u;
  const unsigned magnitude = bits & 0x7fffffffu;
  // Normal from 2^-6 on: 3 of 23 mantissa bits stay, and the exponent's bias goes from 127 to 7.
  const unsigned normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  const unsigned tiny = __float2uint_rn(__uint_as_float(magnitude) * 512.0f);  // steps of 2^-9
  const bool is_normal = magnitude >= (127u - 6u) << 23;
  return static_cast<unsigned char>(sign | (is_normal ? normal - ((127u - 7u) << 3) : tiny));
}
