"""float8_e4m3fn in integer arithmetic, the same on every GPU.

Triton converts the type only where the GPU does (NVIDIA from sm_89 on; gfx942 has another e4m3),
and a code is a few bits of a wider number anyway:

    code      s eeee mmm                bias 7,   value = +-1.mmm * 2^(eeee - 7)
    float16   s 0eeee mmm0000000        bias 15:  the code's value * 2^-8, exactly
    float32   s 0000eeee mmm00...0      bias 127: the code's value * 2^-120, exactly

Subnormal codes become subnormal float16 and float32 numbers, which NVIDIA's and AMD's products take
as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Four codes ($2) to two pairs: each code in the upper byte of a half, its magnitude moved down to
# where the type has it. One multiplication makes bfloat16's numbers large enough to be multiplied.
_WIDEN = """{{
    .reg .b32 a, b, c, d, factor, zero;
    prmt.b32 a, 0, $2, 0x5040;
    prmt.b32 b, 0, $2, 0x7060;
    shr.u32 c, a, {shift};
    shr.u32 d, b, {shift};
    and.b32 c, c, {magnitude};
    and.b32 d, d, {magnitude};
    lop3.b32 $0, a, 0x80008000, c, 0xea;
    lop3.b32 $1, b, 0x80008000, d, 0xea;
    {then}
}}"""
_LARGER = """mov.b32 factor, 0x77807780;
    mov.b32 zero, 0x80008000;
    fma.rn.bf16x2 $0, $0, factor, zero;
    fma.rn.bf16x2 $1, $1, factor, zero;"""
_BF16 = tl.constexpr(_WIDEN.format(shift=4, magnitude="0x07f007f0", then=_LARGER))
_OPERANDS = tl.constexpr("=&r,=&r,r")
_FP16 = tl.constexpr(_WIDEN.format(shift=1, magnitude="0x3f803f80", then=""))

# `from_e4m3` gives values times 2^-8; what multiplies them instead is the caller's scale.
CODE_UNIT: tl.constexpr = tl.constexpr(256.0)

FP8_CACHE = (
    "tokens of an fp8 cache must start on 16 bytes, their bytes side by side, and C must be a "
    "multiple of 16"
)


def is_aligned_fp8(kv_cache: Tensor, kv_lora_rank: int) -> bool:
    """Whether all parts of the tokens of an fp8 cache start on 16 bytes; see `FP8_CACHE`."""
    page, token, byte = kv_cache.stride()
    return byte == 1 and (kv_cache.data_ptr() | page | token | kv_lora_rank) % 16 == 0


@triton.jit
def to_e4m3(x):
    """float32 up to 448 in magnitude (and what rounds to it) to codes in int32, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 20 of 23 mantissa bits go; a carry moves on into the exponent, as it should.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the steps are 2^-9 wide, the step of float32 from 2^14 on.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(magnitude < ((127 - 6) << 23), small, normal)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def from_e4m3(code, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Codes in uint8 to values times 2^-8 in float16 or bfloat16, exactly.

    The NaN codes become 480 / 256: a NaN is in the scale, too. ``ASSEMBLY``, NVIDIA's, takes 2.5
    instructions a code and no register of 32 bits for it; the compiler's own takes 4.5.
    """
    if ASSEMBLY and dtype == tl.float16:
        value = tl.inline_asm_elementwise(
            _FP16, _OPERANDS, [code], dtype=tl.float16, is_pure=True, pack=4
        )
    elif ASSEMBLY:
        value = tl.inline_asm_elementwise(
            _BF16, _OPERANDS, [code], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif dtype == tl.float16:
        bits = ((code.to(tl.int16) << 8) >> 1) & -0x4080
        value = bits.to(tl.float16, bitcast=True)
    else:
        word = ((code.to(tl.int32) << 24) >> 4) & -0x78100000
        value = (word.to(tl.float32, bitcast=True) * 5.192296858534828e33).to(dtype)  # 2^112
    return value
