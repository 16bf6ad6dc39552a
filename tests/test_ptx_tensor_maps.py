"""Tensor maps in the emulator: tiles against plain indexing, descriptors made on the device."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hopper_kernels import COPY_OUT, kernel

from kimi_ops.testing.ptx import (
    LaunchError,
    Misaligned,
    MissingFence,
    PtxError,
    TensorMap,
    UnsupportedPtx,
)

LOAD = (
    """@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {size};
@%p1 cp.async.bulk.tensor.{rank}d.shared::cta.global.tile.mbarrier::complete_tx::bytes
[%r1], [%d1, {{{coords}}}], [%r2];
W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra W;
"""
    + COPY_OUT
)
STORE = """mov.u32 %r3, %r0;
O: shl.b32 %r4, %r3, 2; setp.ge.u32 %p3, %r4, {size}; @%p3 bra D; cvt.u64.u32 %d2, %r4;
add.u64 %d2, %d2, %d0; add.u32 %r4, %r4, %r1; ld.global.b32 %r5, [%d2];
st.shared.b32 [%r4], %r5; add.u32 %r3, %r3, 32; bra O;
D: fence.proxy.async.shared::cta; bar.sync 0; // fence
@%p1 {op}.{rank}d.global.shared::cta{how}.tile.bulk_group [%d1, {{{coords}}}], [%r1];
@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;
"""


def in_shared(tile: np.ndarray, swizzle: int) -> np.ndarray:
    """Bytes of a tile [rows, row bytes] as a swizzle puts them, from the pictures of "Tensors".

    A row of 128, 64 or 32 bytes has 8, 4 or 2 chunks of 16; of every 128 bytes the number of the
    line decides how its chunks change places.
    """
    if not swizzle:
        return tile.reshape(-1)
    out = np.empty_like(tile).reshape(-1)
    chunks = swizzle // 16
    for r, c in itertools.product(range(len(tile)), range(chunks)):
        line = (r * swizzle // 128) % chunks
        to = (r * chunks + (c ^ line)) * 16
        out[to : to + 16] = tile[r, 16 * c : 16 * c + 16]
    return out


def tile_of(x: torch.Tensor, box, start, steps, fill):
    """The tile of a tensor at a coordinate (in the tensor's order), element by element."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    source = x.view(bits).numpy()
    counts = [-(-b // s) for b, s in zip(box[:-1], steps[:-1], strict=True)] + [box[-1]]
    places = np.full(counts, -1, np.int64)
    out = np.full(counts, fill, source.dtype)
    for at in itertools.product(*map(range, counts)):
        steps_here = (*steps[:-1], 1)
        c = [s + i * k for s, i, k in zip(start, at, steps_here, strict=True)]
        if all(0 <= v < n for v, n in zip(c, x.shape, strict=True)):
            out[at] = source[tuple(c)]
            places[at] = np.ravel_multi_index(c, x.shape)
    return out, places


CASES = [
    # dtype, shape, box, start, swizzle, element strides, NaN fill
    (torch.bfloat16, (20, 72), (8, 64), (3, 5), 128, None, False),
    (torch.bfloat16, (20, 72), (16, 64), (-3, 40), 128, None, True),
    (torch.float16, (20, 40), (8, 32), (15, -7), 64, None, False),
    (torch.int8, (40, 48), (16, 32), (30, 20), 32, None, False),
    (torch.float32, (7, 12), (4, 4), (5, 9), 0, None, True),
    (torch.bfloat16, (64,), (24,), (50,), 0, None, False),
    (torch.int32, (3, 5, 8), (2, 3, 4), (2, -1, 6), 0, (1, 2, 1), False),
    (torch.bfloat16, (2, 3, 4, 16), (1, 2, 3, 16), (1, 2, 0, 0), 32, (1, 1, 2, 1), False),
    (torch.int64, (2, 2, 3, 2, 4), (2, 1, 2, 2, 2), (0, 1, 2, -1, 3), 0, None, False),
]


@pytest.mark.parametrize("tiling", CASES)
def test_tiles_against_plain_indexing(tiling):
    dtype, shape, box, start, swizzle, steps, nan = tiling
    steps = steps or (1,) * len(shape)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-100, 100, shape, generator=generator).to(dtype)
    fill = {2: 0x7FFF, 4: 0x7FFFFFFF}[x.element_size()] if nan else 0
    want, places = tile_of(x, box, start, steps, fill)
    rows = want.reshape(-1, want.shape[-1]).view(np.uint8)
    size = rows.size
    coords = [c & 0xFFFFFFFF for c in reversed(start)] + [0] * (5 - len(start))

    out = torch.zeros(size, dtype=torch.uint8)
    tensor_map = TensorMap(x, box, swizzle, steps, nan)
    report = kernel(LOAD, len(shape), size).launch((1,), (32,), [tensor_map, out, *coords])
    assert np.array_equal(out.numpy(), in_shared(rows, swizzle))
    # What lies outside the tensor is not read, but counts at the mbarrier.
    assert report.total.bulk_load_bytes == size
    assert report.total.global_load_bytes == (places >= 0).sum() * x.element_size()

    target = torch.zeros_like(x)
    new = np.random.default_rng(2).integers(0, 100, want.shape).astype(want.dtype)
    tile = torch.from_numpy(in_shared(new.reshape(rows.shape[0], -1).view(np.uint8), swizzle))
    text = STORE.replace("{op}", "cp.async.bulk.tensor").replace("{how}", "")
    kernel(text, len(shape), size).launch(
        (1,), (32,), [TensorMap(target, box, swizzle, steps), tile, *coords]
    )
    expected = np.zeros(x.numel(), want.dtype)
    expected[places[places >= 0]] = new[places >= 0]
    assert np.array_equal(target.view(torch.from_numpy(want).dtype).numpy().reshape(-1), expected)


@pytest.mark.parametrize(
    ("dtype", "operation", "function"),
    [
        (torch.bfloat16, "add", torch.add),
        (torch.float32, "add", torch.add),
        (torch.float16, "max", torch.maximum),
        (torch.int32, "min", torch.minimum),
        (torch.int64, "xor", torch.bitwise_xor),
    ],
)
def test_reductions_into_a_tensor(dtype, operation, function):
    x, y = (torch.randint(-9, 9, (6, 16)).to(dtype) for _ in range(2))
    box = (4, 16)
    tile = torch.zeros(4, 16, dtype=dtype)
    tile[:3] = y[3:]
    text = STORE.replace("{op}", "cp.reduce.async.bulk.tensor").replace("{how}", f".{operation}")
    want = x.clone()
    want[3:] = function(x[3:], y[3:])
    size = 64 * x.element_size()
    kernel(text, 2, size).launch((1,), (32,), [TensorMap(x, box), tile, 0, 3, 0, 0, 0])
    assert torch.equal(x, want)


# The device-made descriptor: an 8 x 8 int32 tensor, built in shared memory, copied, acquired.
DEVICE_MADE = """shl.b32 %r4, %r0, 2; add.u32 %r4, %r4, %r1; st.shared.b32 [%r4], 0;
bar.warp.sync -1;
@%p1 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r1], %d0;
@%p1 tensormap.replace.tile.rank.shared::cta.b1024.b32 [%r1], 1;
@%p1 tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%r1], 0, 8;
@%p1 tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%r1], 1, 4;
@%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r1], 0, 8;
@%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r1], 1, 8;
@%p1 tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%r1], 0, 32;
@%p1 tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%r1], 0, 1;
@%p1 tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%r1], 1, 1;
@%p1 tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [%r1], 3;
@%p1 tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [%r1], 0;
@%p1 tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%r1], 1;
@%p1 tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [%r1], 0;
bar.warp.sync -1;
add.u64 %d3, %d0, 256;
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned
[%d3], [%r1], 128;
fence.proxy.tensormap::generic.acquire.gpu [%d3], 128; // acquire
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; fence.proxy.async; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 128;
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
[%r1+256], [%d3, {{0, 4}}], [%r2];
W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra W;
ld.shared.b32 %r5, [%r4+256]; mad.wide.u32 %d4, %r0, 4, %d0; st.global.b32 [%d4], %r5;
"""


def device_made(body: str) -> torch.Tensor:
    x = torch.arange(96, dtype=torch.int32)
    map_of = TensorMap(torch.zeros(8, 8, dtype=torch.int32), (8, 8))
    kernel(body, 2, 256).launch((1,), (32,), [map_of, x, 0, 0, 0, 0, 0])
    return x


def test_descriptors_made_on_the_device():
    rows = torch.arange(32, 64, dtype=torch.int32).reshape(4, 8)
    assert device_made(DEVICE_MADE)[:32].tolist() == rows.flatten().tolist()
    for old, new, error, message in (
        ("fence.proxy.tensormap::generic.acquire.gpu [%d3], 128; // acquire", "", MissingFence,
         "tensor map at"),
        ("[%r1], 0, 32;", "[%r1], 0, 24;", Misaligned, "strides"),
        ("elemtype.shared::cta.b1024.b32 [%r1], 3", "elemtype.shared::cta.b1024.b32 [%r1], 13",
         UnsupportedPtx, "elemtype 13"),
        ("layout.shared::cta.b1024.b32 [%r1], 0", "layout.shared::cta.b1024.b32 [%r1], 1",
         UnsupportedPtx, "interleave 1"),
        ("mode.shared::cta.b1024.b32 [%r1], 1", "mode.shared::cta.b1024.b32 [%r1], 4",
         UnsupportedPtx, "swizzle_mode 4"),
        ("mode.shared::cta.b1024.b32 [%r1], 1", "mode.shared::cta.b1024.b32 [%r1], 3",
         UnsupportedPtx, "32 bytes in a 128B swizzle"),
        ("[%r1], 0, 8;\n@%p1 tensormap.replace.tile.box_dim", "[%r1], 0, 16;\n"
         "@%p1 tensormap.replace.tile.box_dim", PtxError, "64 bytes of a box row in a 32B"),
        ("[%r1], 1, 4;", "[%r1], 1, 0;", PtxError, "out of its range"),
        ("rank.shared::cta.b1024.b32 [%r1], 1", "rank.shared::cta.b1024.b32 [%r1], 2", PtxError,
         "range|3 dimensions"),
        ("rank.shared::cta.b1024.b32 [%r1], 1", "rank.shared::cta.b1024.b32 [%r1], 5", PtxError,
         "rank 5"),
        ("[%r1+256], [%d3", "[%r1+272], [%d3", Misaligned, "multiple of 128"),
        ("add.u64 %d3, %d0, 256", "add.u64 %d3, %d0, 240", Misaligned, "multiple of 64"),
        ("[%r1], 1, 8;", "[%r1], 1, 16;", None, ""),
        ("[%d3, {{0, 4}}]", "[%d3, {{0, 40}}]", None, ""),
        (".2d.", ".1d.", UnsupportedPtx, "2 coordinates"),
        ("[%r1], 0, 1;", "[%r1], 5, 1;", UnsupportedPtx, "element 5 of the tensor map"),
    ):  # fmt: skip
        assert DEVICE_MADE.count(old) == 1, old
        broken = DEVICE_MADE.replace(old, new)
        if error is None:
            device_made(broken)
            continue
        with pytest.raises(error, match=message):
            device_made(broken)


def test_tensor_maps_that_the_driver_refuses():
    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    TensorMap(x, (8, 64), 128)
    for make, message in (
        (lambda: TensorMap(x, (8,)), "with box"),
        (lambda: TensorMap(x.t(), (64, 8)), "not contiguous"),
        (lambda: TensorMap(x[:, :20], (8, 4)), "a box row of 8 bytes"),
        (lambda: TensorMap(torch.zeros(8, 9), (8, 4)), "multiples of 16"),
        (lambda: TensorMap(x, (8, 64), 64), "128 bytes of a box row in a 64B swizzle"),
        (lambda: TensorMap(x, (8, 64), 96), "swizzle 96"),
        (lambda: TensorMap(x, (257, 64)), "out of its range"),
        (lambda: TensorMap(x, (8, 64), 0, (9, 1)), "out of its range"),
        (lambda: TensorMap(torch.zeros(8, 16, dtype=torch.int8), (8, 16), nan_fill=True),
         "integers that fills with NaN"),
        (lambda: TensorMap(torch.zeros(8, 8, dtype=torch.complex64), (8, 8)), "complex"),
    ):  # fmt: skip
        with pytest.raises(LaunchError, match=message):
            make()
