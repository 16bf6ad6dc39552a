// Sine and cosine for every RoPE here: right to 8e-8 up to angles of 2^24 radians, in registers.
// (sincosf's slow path for large angles keeps a table on the stack; sin.approx is off by whole
// units there.)
//
// Source: coefficients fitted for this project (weighted least squares towards the minimax
// polynomial on [-pi/4, pi/4]); the reduction is Cody and Waite's, in double.
#pragma once

struct SinCos {
  float sin, cos;
};

__device__ __forceinline__ SinCos sin_cos(double angle) {
  const double nearest = floor(angle * 0.6366197723675814 + 0.5);  // quarter turns
  const int quarter = static_cast<int>(nearest);
  const double reduced = fma(nearest, -1.5707963267948966, angle);
  const float r = static_cast<float>(reduced);
  const float rest = static_cast<float>(reduced - r);  // what rounding to float leaves
  const float z = r * r;
  const float s_tail =
      -0.16666654943530698f + z * (0.00833217813810959f + z * -0.00019517298104078628f);
  const float s = r + (r * z * s_tail + rest);
  const float c_tail =
      0.041666646866079175f + z * (-0.0013887367500582844f + z * 2.4438450070061923e-05f);
  const float near = 1.0f - 0.5f * z;
  const float c = near + (((1.0f - near) - 0.5f * z) + (z * z * c_tail - r * rest));
  const bool swapped = quarter & 1;
  const float sin = swapped ? c : s;
  const float cos = swapped ? s : c;
  return {quarter & 2 ? -sin : sin, (quarter + 1) & 2 ? -cos : cos};
}

// (even, odd) turned by an angle, in float.
__device__ __forceinline__ float2 rotated(float even, float odd, SinCos by) {
  return {even * by.cos - odd * by.sin, odd * by.cos + even * by.sin};
}
