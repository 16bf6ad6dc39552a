"""Sine and cosine of angles up to a quarter of a million radians, shared by every RoPE here.

``tl.sin`` and ``tl.cos`` call libdevice, whose slow path for large angles keeps a table on the
stack of every thread; the machine's own ``sin.approx`` is off by whole units there. The reduction
to an eighth of a turn below is exact enough in float64 (four instructions), and the polynomials are
within 8e-8 of the true values on it.

Source: coefficients fitted for this file (weighted least squares towards the minimax polynomial on
[-pi/4, pi/4], errors 4.2e-8 and 7.3e-8 in float32 arithmetic); the reduction is Cody and Waite's.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sin_cos(angle):
    """(sin, cos) of a float32 tensor of angles in radians, each below 2^24, in float32."""
    wide = angle.to(tl.float64)
    turns = tl.full((), 0.6366197723675814, tl.float64) * wide  # quarter turns
    nearest = tl.floor(turns + tl.full((), 0.5, tl.float64))
    quarter = nearest.to(tl.int32)
    reduced = wide - nearest * tl.full((), 1.5707963267948966, tl.float64)
    r = reduced.to(tl.float32)
    rest = (reduced - r.to(tl.float64)).to(tl.float32)  # what rounding r to float32 leaves
    z = r * r
    s = -0.16666654943530698 + z * (0.00833217813810959 + z * -0.00019517298104078628)
    s = r + (r * z * s + rest)
    c = 0.041666646866079175 + z * (-0.0013887367500582844 + z * 2.4438450070061923e-05)
    near = 1.0 - 0.5 * z
    c = near + (((1.0 - near) - 0.5 * z) + (z * z * c - r * rest))
    swapped = (quarter & 1) != 0
    sin = tl.where(swapped, c, s)
    cos = tl.where(swapped, s, c)
    sin = tl.where((quarter & 2) != 0, -sin, sin)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    return sin, cos


@triton.jit
def power_of_10000(exponent):
    """``10000 ** exponent`` of a float32 tensor, in float32, rounded once."""
    scale = tl.full((), 13.287712379549449, tl.float64)  # log2(10000)
    return tl.exp2(exponent.to(tl.float64) * scale).to(tl.float32)
