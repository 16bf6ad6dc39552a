"""One or two tokens on int4 weights, in Gluon: codes loaded straight into the operand's layout.

The separated form of `_int4_few`, with three differences:

- No shared memory for weights. A lane of the four that hold a row loads 16 bytes along K, one whole
  group, and those are the lane's elements of the operand. A tile is 8 / TOKENS groups, so that
  TOKENS * groups are the 8 columns of the matrix instruction::

      lane of a row   0        1        2        3     ( 0        1        2        3    )  1 token
      group of a tile 0        1        2S       2S+1  ( 4S       4S+1     6S       6S+1 )  S steps
      columns         0 1               2 3              4 5               6 7              of acc

  The groups of S tiles are dealt out such that a lane's scales for all S lie side by side, and that
  two lanes read a whole sector of codes.
- x of a (token, group) is multiplied by a power of two (`_int4.lift`), so that codes can enter
  the product as they are, the bits of a subnormal number: four ANDs and one shift unpack 8 weights.
  Its reciprocal and the bias, now only 8, come with x. Tensor cores take subnormal operands as what
  they are (Fasi et al., Numerical behavior of NVIDIA tensor cores, PeerJ CS 7:e330, 2021).
- Lanes that do not own a column read zeros, from memory too: no instruction makes them.

Codes and scales are loaded two tiles ahead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kimi_ops.kernels._int4 import unlift_of

ROWS = gl.constexpr(32)  # of each of the two sets, 16 a warp
ACC = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [2, 1], [16, 8]))
A = gl.constexpr(gl.DotOperandLayout(0, ACC, 2))
B = gl.constexpr(gl.DotOperandLayout(1, ACC, 2))
COLUMN_OF_ACC = gl.constexpr(gl.SliceLayout(0, ACC))


@gluon.constexpr_function
def weights_layout(COLUMNS, MINE):
    """[ROWS, COLUMNS]: a lane has MINE side by side, 16 bytes, of the rows that `A` gives it."""
    columns = [[0, 1 << bit] for bit in range(MINE.bit_length() - 1)]
    if COLUMNS == 8 * MINE:
        columns.append([0, 4 * MINE])
    lanes = [[0, MINE], [0, 2 * MINE], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([*columns, [8, 0]], lanes, [[16, 0]], [], [32, COLUMNS])


@gluon.constexpr_function
def x_layout(UNITS):
    """[UNITS, 8]: the same units, and the columns that `B` gives the lane."""
    units = [[1, 0], [2, 0], [4, 0], *([[32, 0]] if UNITS == 64 else [])]
    lanes = [[8, 0], [16, 0], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout(units, lanes, [[0, 0]], [], [UNITS, 8])


# $8: two units; $9: 2^24, so that the upper half of a product is a shift, done where
# multiplications are. It must be unknown to the compiler, or it becomes a shift again.
_SPLIT = gl.constexpr("""{
    .reg .b32 upper, plane;
    mul.hi.u32 upper, $8, $9;
    and.b32 plane, $8, 0x000f000f;
    mov.b32 {$0, $1}, plane;
    and.b32 plane, $8, 0x00f000f0;
    mov.b32 {$2, $3}, plane;
    and.b32 plane, upper, 0x000f000f;
    mov.b32 {$4, $5}, plane;
    and.b32 plane, upper, 0x00f000f0;
    mov.b32 {$6, $7}, plane;
}""")
_OPERANDS = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")
_EIGHT = gl.constexpr((gl.int16,) * 8)


@gluon.jit
def rows_from(first, last, layout: gl.constexpr, EXACT: gl.constexpr):
    """ROWS row numbers in int64; those behind the last repeat it."""
    n = first + gl.arange(0, ROWS, layout)
    if not EXACT:
        n = gl.minimum(n, last)
    return n.to(gl.int64)


@gluon.jit
def _part(s, j: gl.constexpr, C: gl.constexpr, PARTS: gl.constexpr):
    """[ROWS, 4, C, PARTS] -> part j [ROWS, 4, C]."""
    if PARTS == 4:
        even, odd = gl.split(s.reshape([ROWS, 4, C, 2, 2]))
        left, right = gl.split(even if j % 2 == 0 else odd)
        s = left if j < 2 else right
    elif PARTS == 2:
        left, right = gl.split(s)
        s = left if j == 0 else right
    return s.reshape([ROWS, 4, C])


@gluon.jit
def _tile_scales(s, j: gl.constexpr, TILES: gl.constexpr, HALVES: gl.constexpr):
    """Scales of a step, [ROWS, 8 TILES] -> tile j's [ROWS, 8] float32 as the accumulator lies.

    ``HALVES``: their type, if ``s`` is int32 [ROWS, 4 TILES], two scales a word; else None.
    """
    if HALVES is None:
        s = s.reshape([ROWS, 4, TILES, 2]).permute([0, 1, 3, 2])
        s = _part(s, j, 2, TILES).to(gl.float32)
    else:
        s = _part(s.reshape([ROWS, 4, 1, TILES]), j, 1, TILES).reshape([ROWS, 4])
        if gl.bfloat16 == HALVES:
            low = (s << 16).to(gl.float32, bitcast=True)
            high = (s & -65536).to(gl.float32, bitcast=True)
        else:
            low = s.to(gl.int16).to(HALVES, bitcast=True).to(gl.float32)
            high = (s >> 16).to(gl.int16).to(HALVES, bitcast=True).to(gl.float32)
        s = gl.join(low, high)
    return gl.convert_layout(s.reshape([ROWS, 8]), ACC, assert_trivial=True)


@gluon.jit
def as_a(units):
    """[ROWS, UNITS] in `codes_layout` -> the operand, without moving anything.

    A sum over K may go in any order: a matrix instruction takes two neighbouring registers of a
    lane, four units side by side.
    """
    groups: gl.constexpr = units.shape[1] // 32
    units = units.reshape([units.shape[0], groups, 4, 4, 2]).permute([0, 1, 3, 2, 4])
    return gl.convert_layout(units.reshape([units.shape[0], 32 * groups]), A, assert_trivial=True)


@gluon.jit
def as_b(x):
    """[UNITS, 8] in `x_layout` -> the operand; the same order."""
    groups: gl.constexpr = x.shape[0] // 32
    x = x.reshape([groups, 4, 4, 2, 8]).permute([0, 2, 1, 3, 4])
    return gl.convert_layout(x.reshape([32 * groups, 8]), B, assert_trivial=True)


@gluon.jit
def _plane(low, high, dtype: gl.constexpr):
    """The halves of words [ROWS, W] -> an operand [ROWS, 2 W]."""
    both = gl.join(low, high).reshape([ROWS, 2 * low.shape[1]])
    return as_a(both.to(dtype, bitcast=True))


@gluon.jit
def _product(words, x0, x1, x2, x3, start, shift):
    """A tile of codes times x of its four planes, from ``start`` on."""
    l0, h0, l1, h1, l2, h2, l3, h3 = gl.inline_asm_elementwise(
        _SPLIT, _OPERANDS, [words, shift], dtype=_EIGHT, is_pure=True, pack=1
    )
    acc = mma_v2(_plane(l0, h0, x0.dtype), x0, start)
    acc = mma_v2(_plane(l1, h1, x0.dtype), x1, acc)
    acc = mma_v2(_plane(l2, h2, x0.dtype), x2, acc)
    return mma_v2(_plane(l3, h3, x0.dtype), x3, acc)


@gluon.jit
def direct(
    words_ptr,  # int32, at the expert
    scale_ptr,
    first_a,  # rows first_a .. first_a + ROWS - 1, and those of the second set
    first_b,
    last,  # row of the weights
    stride_words_n,  # in groups
    stride_scale_n,
    x_ptr,  # [.., K/64 rounded up, 4, 2, 8], lifted: `_int4.rearrange_lifted`
    bias_ptr,  # [.., 2, K/32] float32: where sums start, and what takes the lift off
    zeros_ptr,  # [256] like x
    slots_ptr,  # at the block
    count,  # of slots
    slots_per_row,
    groups,
    steps,  # of TILES tiles
    shift,  # 2^24
    TOKENS: gl.constexpr,
    HALVES: gl.constexpr,  # type of scales that come as int32, two a word, or None
    TILES: gl.constexpr,  # 1, 2 or 4 per load of scales; 1 if not EVEN
    EVEN: gl.constexpr,  # K holds whole steps
    EXACT: gl.constexpr,  # and the weights whole tiles of rows
):
    """W x^T of two sets of ROWS rows: two float32 [ROWS, TOKENS]. `_int4_product.product` else."""
    GS: gl.constexpr = 8 // TOKENS
    STEP: gl.constexpr = GS * TILES
    if EVEN:
        groups = steps * STEP  # known to be a multiple

    CODES: gl.constexpr = weights_layout(4 * GS, 4)
    offs_w = gl.arange(0, 4 * GS, gl.SliceLayout(0, CODES))
    # Word w of a tile: two groups of each lane pair side by side, the next pair 2 TILES on.
    at = offs_w // 8 * (8 * TILES) + offs_w % 8
    row_w: gl.constexpr = gl.SliceLayout(1, CODES)
    rows_a = rows_from(first_a, last, row_w, EXACT) * (stride_words_n * 4)
    rows_b = rows_from(first_b, last, row_w, EXACT) * (stride_words_n * 4)
    a_ptrs = words_ptr + rows_a[:, None] + at[None, :]
    b_ptrs = words_ptr + rows_b[:, None] + at[None, :]

    PER_WORD: gl.constexpr = 1 if HALVES is None else 2
    SCALES: gl.constexpr = weights_layout(8 * TILES // PER_WORD, 2 * TILES // PER_WORD)
    offs_s = gl.arange(0, 8 * TILES // PER_WORD, gl.SliceLayout(0, SCALES)) % (STEP // PER_WORD)
    row_s: gl.constexpr = gl.SliceLayout(1, SCALES)
    rows_a = rows_from(first_a, last, row_s, EXACT) * stride_scale_n
    rows_b = rows_from(first_b, last, row_s, EXACT) * stride_scale_n
    sa_ptrs = scale_ptr + rows_a[:, None] + offs_s[None, :]
    sb_ptrs = scale_ptr + rows_b[:, None] + offs_s[None, :]

    # x: a lane owns the column of its own token and group.
    X: gl.constexpr = x_layout(8 * GS)
    offs_u = gl.arange(0, 8 * GS, gl.SliceLayout(1, X))
    column = gl.arange(0, 8, gl.SliceLayout(0, X))
    own = (offs_u // 8)[:, None] == (column % GS)[None, :]
    slots = gl.load(slots_ptr + gl.minimum(column // GS, count - 1)).to(gl.int64)
    group_x = offs_u // 16 * (2 * TILES) + offs_u // 8 % 2
    own_ptrs = x_ptr + (slots // slots_per_row * ((groups + 1) // 2) * 64)[None, :]
    own_ptrs += (offs_u // 16 * (TILES * 64) + offs_u // 8 % 2 * 8 + offs_u % 8)[:, None]
    zero_ptrs = zeros_ptr + (offs_u % 8)[:, None] + (column * 0)[None, :]
    x_ptrs = gl.where(own, own_ptrs, zero_ptrs)
    x_step = gl.where(own, STEP * 32, 0)

    column = gl.arange(0, 8, COLUMN_OF_ACC)
    slots = gl.load(slots_ptr + gl.minimum(column // GS, count - 1)).to(gl.int64)
    group_c = column % GS // 2 * (2 * TILES) + column % 2
    bias_ptrs = bias_ptr + slots // slots_per_row * (2 * groups) + group_c

    total_a = gl.zeros([ROWS, 8], gl.float32, ACC)
    total_b = gl.zeros([ROWS, 8], gl.float32, ACC)
    if EVEN:
        sa = gl.load(sa_ptrs)
        sb = gl.load(sb_ptrs)
        a = gl.load(a_ptrs)
        b = gl.load(b_ptrs)
    else:
        mask_s = (offs_s * PER_WORD < groups)[None, :]
        sa = gl.load(sa_ptrs, mask=mask_s, other=0)
        sb = gl.load(sb_ptrs, mask=mask_s, other=0)
        mask_w = (at // 4 < groups)[None, :]
        a = gl.load(a_ptrs, mask=mask_w, other=0)
        b = gl.load(b_ptrs, mask=mask_w, other=0)
    if TILES > 1:
        odd_a = gl.load(a_ptrs + 8)
        odd_b = gl.load(b_ptrs + 8)
    for step in range(steps):
        left = groups - (step + 1) * STEP  # after this step
        # What the last step loads ahead is its own once more: a mask would cost zeros.
        ahead = STEP if left > 0 or not EVEN else 0
        for j in gl.static_range(TILES):
            if EVEN:
                start = gl.load(bias_ptrs + 2 * j)
                lower = gl.load(bias_ptrs + 2 * j + groups)
                xj_ptrs = x_ptrs + 64 * j
            else:
                inside = group_c < left + STEP
                start = gl.load(bias_ptrs, mask=inside, other=0.0)
                lower = gl.load(bias_ptrs + groups, mask=inside, other=0.0)
                xj_ptrs = gl.where((group_x < left + STEP)[:, None], x_ptrs, zero_ptrs)
            x0 = as_b(gl.load(xj_ptrs))
            x1 = as_b(gl.load(xj_ptrs + 16))
            x2 = as_b(gl.load(xj_ptrs + 32))
            x3 = as_b(gl.load(xj_ptrs + 48))
            start, _ = gl.broadcast(start[None, :], total_a)
            tile_sa = _tile_scales(sa, j, TILES, HALVES)
            tile_sb = _tile_scales(sb, j, TILES, HALVES)
            if j == TILES - 1:
                sa_ptrs += ahead // PER_WORD
                sb_ptrs += ahead // PER_WORD
            if j == TILES - 1 and EVEN:
                sa = gl.load(sa_ptrs)
                sb = gl.load(sb_ptrs)
            elif j == TILES - 1:
                mask_s = (offs_s * PER_WORD < left)[None, :]
                sa = gl.load(sa_ptrs, mask=mask_s, other=0)
                sb = gl.load(sb_ptrs, mask=mask_s, other=0)
            if j % 2 == 0:
                acc_a = _product(a, x0, x1, x2, x3, start, shift)
                acc_b = _product(b, x0, x1, x2, x3, start, shift)
            else:
                acc_a = _product(odd_a, x0, x1, x2, x3, start, shift)
                acc_b = _product(odd_b, x0, x1, x2, x3, start, shift)
            total_a += acc_a * (tile_sa * lower[None, :])
            total_b += acc_b * (tile_sb * lower[None, :])
            # The registers are free: for the tile after the next, of this step or of the coming.
            if j == TILES - 2 or TILES == 1:
                a_ptrs += ahead * 4
                b_ptrs += ahead * 4
            if TILES == 4 and j == 0:
                a = gl.load(a_ptrs + 16)
                b = gl.load(b_ptrs + 16)
            elif TILES == 4 and j == 1:
                odd_a = gl.load(a_ptrs + 24)
                odd_b = gl.load(b_ptrs + 24)
            elif j % 2 == 1:
                odd_a = gl.load(a_ptrs + 8)
                odd_b = gl.load(b_ptrs + 8)
            elif EVEN:
                a = gl.load(a_ptrs)
                b = gl.load(b_ptrs)
            else:
                mask_w = (at // 4 < left)[None, :]
                a = gl.load(a_ptrs, mask=mask_w, other=0)
                b = gl.load(b_ptrs, mask=mask_w, other=0)
        x_ptrs += x_step
        bias_ptrs += STEP
    unlift: gl.constexpr = unlift_of(x_ptr.dtype.element_ty)
    a = gl.sum(total_a.reshape([ROWS, TOKENS, GS]), 2) * unlift
    b = gl.sum(total_b.reshape([ROWS, TOKENS, GS]), 2) * unlift
    return a, b
