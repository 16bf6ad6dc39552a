"""Selection of K experts from a row of logits: what both forms of the router end with.

    s = sigmoid(logits);  ids = the K largest of s + bias (in the kept groups);  w = s[ids]

Rows of E experts are tiles ``[C, R, L]``: chunks of L neighbouring experts, R rows. The shape is
that way round so that Triton deals L out to the lanes of a warp, R to the warps and C to registers:
a row then stays in one warp, and no reduction leaves it. E = 384 is two tiles, of 2 and 1 chunks::

    expert    0 ......... 127 | 128 ....... 255 | 256 ....... 383
    tile      a[0]            | a[1]            | b[0]             lane i: experts 4i .. 4i + 3 of
                                                                   each chunk, 12 in all

With groups a chunk is a group.

K dependent rounds, each one maximum (in registers, then one warp reduction of 32-bit integers) and
one comparison per expert, because a key holds value and expert at once::

    key = fixed-point(choice - best choice of the row, in -1 .. 0, 21 bits) << 10 | 1023 - expert

Rounding to 21 bits never inverts an order, but can make a tie. So one round more is run, and where
two neighbours of the K + 1 tie, or the last one chosen is more than 1 below the best (NaN and
infinities are), the row is chosen again with exact keys: the float's bits as an ordered integer,
and a second reduction for the lowest expert that has the best. Exact ties are rare in real rows,
and cost time, not correctness.

The weights of the K chosen are computed anew from their logits, K lanes at once, with an
exponential as good as libm's; selection itself uses the fast one.

Source: DeepSeek-V3, arXiv 2412.19437 section 2.1.2 (auxiliary-loss-free balancing).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# 21 bits behind the point of a float32 in [4, 5); 5 itself would reach the sign of the key.
_BELOW_FIVE = tl.constexpr(5.0 - 2.0**-21)
_ID_BITS = tl.constexpr(10)
_ID_MASK = tl.constexpr(1023)
_NOBODY = tl.constexpr(1 << 20)  # above every expert and group
# Exact keys below that of -inf: what is no number, and what cannot be chosen (again).
_KEY_NAN = tl.constexpr(-(2**31) + 1)
_KEY_NONE = tl.constexpr(-(2**31))


class Shape(NamedTuple):
    """Tiles of a row, see above: chunks of the first and of the second tile, experts of a chunk."""

    C0: int
    C1: int
    L: int


def shape_of(experts: int, n_group: int, topk_group: int) -> Shape:
    """The tiles for E experts; 128 is a 16-byte load for each lane of a warp."""
    if topk_group < n_group:
        size = experts // n_group
        return Shape(triton.next_power_of_2(n_group), 0, triton.next_power_of_2(size))
    if experts <= 128:
        return Shape(1, 0, triton.next_power_of_2(experts))
    chunks = triton.cdiv(experts, 128)
    c0 = 1 << (chunks.bit_length() - 1)
    return Shape(c0, triton.next_power_of_2(chunks - c0) if chunks > c0 else 0, 128)


@triton.jit
def _sigmoid_fast(x):
    """exp of nothing above 0: no overflow, and a divisor from 1 to 2."""
    t = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, t, 1.0) / (1.0 + t)


@triton.jit
def _sigmoid(x):
    """Within two units in the last place, subnormal results included.

    exp(y) = 2^n exp(r) with r from -ln(2)/2 to ln(2)/2: the remainder of its Taylor series after
    r^7 is below 6e-9. 2^n goes in as two factors since n reaches -150. NaN takes a way around the
    conversion to an integer, which is not defined for it.
    """
    y = -tl.abs(x)
    y = tl.where(y >= -104.0, y, -104.0)
    n = tl.floor(y * 1.4426950408889634 + 0.5)
    r = tl.fma(n, -0.693145751953125, y)
    r = tl.fma(n, -1.428606820309417e-06, r)
    p = tl.fma(r, 1.0 / 5040.0, 1.0 / 720.0)
    p = tl.fma(r, p, 1.0 / 120.0)
    p = tl.fma(r, p, 1.0 / 24.0)
    p = tl.fma(r, p, 1.0 / 6.0)
    p = tl.fma(r, p, 0.5)
    p = tl.fma(r, p, 1.0)
    p = tl.fma(r, p, 1.0)
    whole = n.to(tl.int32)
    half = whole >> 1
    t = p * ((half + 127) << 23).to(tl.float32, bitcast=True)
    t = t * ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    s = tl.div_rn(tl.where(x < 0.0, t, 1.0), 1.0 + t)
    return tl.where(x == x, s, x)


@triton.jit
def _ordered(x):
    """int32 that compare as the floats do; NaN comes below -inf. There is no -0 among them."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), _KEY_NAN)


@triton.jit
def _load_logits(logits_ptr, offs, mask, stride_logits_s, SPLITS: tl.constexpr):
    """Logits, the sum of SPLITS partial ones in their order."""
    x = tl.load(logits_ptr + offs, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        part_ptr = logits_ptr + tl.cast(stride_logits_s, tl.int64) * split
        x += tl.load(part_ptr + offs, mask=mask, other=0.0)
    return x


@triton.jit
def _choice(
    logits_ptr, bias_ptr, rows, mask_t, ids, real,
    stride_logits_s, stride_logits_e, stride_bias_e, SPLITS: tl.constexpr,
):  # fmt: skip
    """Biased scores ``[C, R, L]``; what is no expert is -inf.

    The bias is loaded for each row, so that it comes in the layout of the logits.
    """
    mask = real & mask_t[None, :, None]
    offs = rows[None, :, None] + ids.to(tl.int64) * stride_logits_e
    x = _load_logits(logits_ptr, offs, mask, stride_logits_s, SPLITS)
    offs = tl.zeros_like(rows)[None, :, None] + ids.to(tl.int64) * stride_bias_e
    bias = tl.load(bias_ptr + offs, mask=mask, other=0.0)
    return tl.where(real, _sigmoid_fast(x) + bias, float("-inf"))


@triton.jit
def _kept_groups(
    choice, n_group: tl.constexpr, topk_group: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr
):
    """``[C, R]``: whether a group is among the topk_group with the best sums of two."""
    number = tl.where(choice == choice, choice, float("-inf"))
    pair = tl.max(number, 2)
    if SIZE > 1:
        lane = tl.arange(0, choice.shape[2])[None, None, :]
        at = tl.min(tl.where(number == pair[:, :, None], lane, _NOBODY), 2)
        pair += tl.max(tl.where(lane == at[:, :, None], float("-inf"), number), 2)
    group = tl.arange(0, C)[:, None]
    keys = tl.where(group < n_group, _ordered(pair), _KEY_NONE)
    kept = tl.zeros_like(keys)
    for _ in range(topk_group):
        best = tl.max(keys, 0)
        winner = tl.min(tl.where(keys == best[None, :], group, _NOBODY), 0)
        hit = group == winner[None, :]
        kept = tl.where(hit, 1, kept)
        keys = tl.where(hit, _KEY_NONE, keys)
    return kept != 0


@triton.jit
def _maximum(a, b, TWO: tl.constexpr):
    """Maxima ``[R]`` of rows in one or two tiles: over registers first, then over a warp."""
    lanes = tl.max(a, 0)
    if TWO:
        lanes = tl.maximum(lanes, tl.max(b, 0))
    return tl.max(lanes, 1)


@triton.jit
def _top(a, b, TWO: tl.constexpr):
    """Maxima of floats, as integers where they go through a warp: one instruction, not five."""
    lanes = tl.max(a, 0)
    if TWO:
        lanes = tl.maximum(lanes, tl.max(b, 0))
    top = tl.max(_ordered(lanes), 1)
    return (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _packed(choice, top, ids, real):
    """Keys of value and expert, -1 for what cannot be chosen. The shift drops the exponent."""
    fixed = tl.maximum(choice - top[None, :, None], -1.0) + _BELOW_FIVE
    keys = (fixed.to(tl.int32, bitcast=True) << _ID_BITS) | (_ID_MASK - ids)
    return tl.where(real, keys, -1)


@triton.jit
def _choose_exactly(
    choice_a, choice_b, ids_a, ids_b, real_a, real_b, K, offs_k, chosen, TWO: tl.constexpr
):
    """The K best in two reductions a round: the best value, and the lowest expert that has it."""
    a = tl.where(real_a, _ordered(choice_a), _KEY_NONE)
    b = tl.where(real_b, _ordered(choice_b), _KEY_NONE)
    for k in range(K):
        best = _maximum(a, b, TWO)[None, :, None]
        mine_a = tl.where(a == best, ids_a, _NOBODY)
        mine_b = tl.where(b == best, ids_b, _NOBODY)
        winner = -_maximum(-mine_a, -mine_b, TWO)
        a = tl.where(ids_a == winner[None, :, None], _KEY_NONE, a)
        b = tl.where(ids_b == winner[None, :, None], _KEY_NONE, b)
        chosen = tl.where(offs_k == k, winner[:, None], chosen)
    return chosen


@triton.jit
def select_rows(
    logits_ptr,  # [SPLITS, T, E] float32
    bias_ptr,  # [E] float32
    weights_ptr,  # [T, K] float32, contiguous
    ids_ptr,  # [T, K] int32, contiguous
    offs_t,  # [R]
    mask_t,  # [R]
    stride_logits_s,
    stride_logits_t,
    stride_logits_e,
    stride_bias_e,
    scale,
    K: tl.constexpr,
    E: tl.constexpr,
    n_group: tl.constexpr,
    topk_group: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Chooses and writes experts and weights of R rows."""
    TWO: tl.constexpr = C1 > 0
    rows = offs_t.to(tl.int64) * stride_logits_t
    chunk = tl.arange(0, C0)[:, None, None]
    lane = tl.arange(0, L)[None, None, :]
    if topk_group < n_group:
        ids_a = chunk * (E // n_group) + lane
        real_a = (lane < E // n_group) & (chunk < n_group)
    else:
        ids_a = chunk * L + lane
        real_a = ids_a < E
    choice_a = _choice(
        logits_ptr, bias_ptr, rows, mask_t, ids_a, real_a,
        stride_logits_s, stride_logits_e, stride_bias_e, SPLITS,
    )  # fmt: skip
    ids_b, real_b, choice_b = ids_a, real_a, choice_a
    if TWO:
        ids_b = C0 * L + tl.arange(0, C1)[:, None, None] * L + lane
        real_b = ids_b < E
        choice_b = _choice(
            logits_ptr, bias_ptr, rows, mask_t, ids_b, real_b,
            stride_logits_s, stride_logits_e, stride_bias_e, SPLITS,
        )  # fmt: skip
    if topk_group < n_group:
        real_a &= _kept_groups(choice_a, n_group, topk_group, C0, E // n_group)[:, :, None]
        real_b = real_a

    top = _top(tl.where(real_a, choice_a, float("-inf")), choice_b, TWO)
    a = _packed(choice_a, top, ids_a, real_a)
    b = _packed(choice_b, top, ids_b, real_b)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros([offs_t.shape[0], BLOCK_K], tl.int32)
    last = tl.zeros_like(offs_t) - 1
    unsure = tl.zeros_like(offs_t)
    for k in tl.static_range(K):
        best = _maximum(a, b, TWO)
        a = tl.where(a == best[None, :, None], -1, a)
        b = tl.where(b == best[None, :, None], -1, b)
        chosen = tl.where(offs_k == k, _ID_MASK - (best[:, None] & _ID_MASK), chosen)
        unsure = tl.where(best >> _ID_BITS == last >> _ID_BITS, 1, unsure)
        last = best
    best = _maximum(a, b, TWO)
    tie = (best >> _ID_BITS == last >> _ID_BITS) | (last >> _ID_BITS == 0)
    if tl.max(tl.where(mask_t & (tie | (unsure != 0)), 1, 0), 0) != 0:
        chosen = _choose_exactly(
            choice_a, choice_b, ids_a, ids_b, real_a, real_b, K, offs_k, chosen, TWO
        )

    mask = mask_t[:, None] & (offs_k < K)
    offs = rows[:, None] + chosen.to(tl.int64) * stride_logits_e
    score = _sigmoid(_load_logits(logits_ptr, offs, mask, stride_logits_s, SPLITS))
    score = tl.where(mask, score, 0.0)
    weights = score
    if NORMALIZE:
        total = tl.sum(score, 1)[:, None] + 1e-20
        weights = tl.div_rn(score, total + tl.zeros_like(score))
    offs_out = offs_t.to(tl.int64)[:, None] * K + offs_k
    tl.store(weights_ptr + offs_out, weights * scale, mask=mask)
    tl.store(ids_ptr + offs_out, chosen, mask=mask)
