"""Triton's own output, executed: results, traffic, and bugs planted in its PTX."""

from __future__ import annotations

import os
import re

import pytest
import torch

from kimi_ops.testing.ptx import (
    Divergence,
    Kernel,
    LaunchError,
    Misaligned,
    MissingWait,
    OutOfBounds,
    PtxError,
    Race,
    Uninitialised,
)

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
# Decorating under the interpreter would make no compiled kernels.
_INTERPRET = os.environ.pop("TRITON_INTERPRET", None)
import triton.language as tl  # noqa: E402

from kimi_ops.testing.runner import compile_triton, emulated, run_triton, specialise  # noqa: E402

SEEDS = [None, 0, 1]


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i, mask=i < n), tl.load(y_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x + y, mask=i < n)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, stride, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + i, mask=i < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * n + i, (e / tl.sum(e, 0)).to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def scan_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * n + i, mask=i < n, other=0)
    tl.store(out_ptr + tl.program_id(0) * n + i, tl.cumsum(x, 0), mask=i < n)


@triton.jit
def histogram_kernel(x_ptr, out_ptr, largest_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.atomic_add(out_ptr + x, 1, mask=i < n)
    tl.atomic_max(largest_ptr, tl.max(x, 0))


@triton.jit
def sort_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.sort(tl.load(x_ptr + i)))


@triton.jit
def math_kernel(x_ptr, k_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, k = tl.load(x_ptr + i), tl.load(k_ptr + i)
    y = tl.sin(x) + tl.log(x) + tl.sqrt(x) + tl.rsqrt(x) + tl.floor(x) + tl.sigmoid(x) + tl.erf(x)
    q = (k // n) + (k % n) + (k // 7) + (k >> 2) + x.to(tl.int64).to(tl.int32)
    halves = x.to(tl.float16).to(tl.float32) + x.to(tl.bfloat16).to(tl.float32)
    tl.store(out_ptr + i, y + q.to(tl.float32) + halves + tl.gather(x, i ^ 1, 0))


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a_mask = (rm < M)[:, None] & (rk + k < K)[None, :]
        b_mask = (rn < N)[None, :] & (rk + k < K)[:, None]
        a = tl.load(a_ptr + rm[:, None] * K + (rk + k)[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + (rk + k)[:, None] * N + rn[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc)
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(c_ptr + rm[:, None] * N + rn[None, :], acc.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, scale, n, B: tl.constexpr, D: tl.constexpr):
    rows, d = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + d[None, :], mask=(rows < n)[:, None], other=0.0)
    top = tl.full((B,), float("-inf"), tl.float32)
    total = tl.zeros((B,), tl.float32)
    acc = tl.zeros((B, D), tl.float32)
    for start in range(0, n, B):
        keys = start + tl.arange(0, B)
        mask = (keys < n)[:, None]
        k = tl.load(k_ptr + keys[:, None] * D + d[None, :], mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        s = tl.where((keys < n)[None, :] & (keys[None, :] <= rows[:, None]), s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        fix = tl.exp2(top - new)
        total = total * fix + tl.sum(p, 1)
        v = tl.load(v_ptr + keys[:, None] * D + d[None, :], mask=mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fix[:, None])
        top = new
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * D + d[None, :], out, mask=(rows < n)[:, None])


if _INTERPRET is not None:
    os.environ["TRITON_INTERPRET"] = _INTERPRET


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 1000, 4096])
def test_vector_add(n, seed):
    x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
    report = run_triton(
        add_kernel, (-(-n // 1024),), x, y, out, n, BLOCK=1024, uninitialised=[out], seed=seed
    )
    assert torch.equal(out, x + y)
    if n == 4096:
        # 32 warps of 16 bytes a thread, twice: every sector once, none in vain.
        total = report.total
        assert (total.global_load_bytes, total.global_store_bytes) == (2 * 4 * n, 4 * n)
        assert total.global_sectors == total.global_sectors_ideal == 3 * 4 * n // 32
        assert report.unique_read_bytes == 2 * 4 * n
        assert report.unique_written_bytes == 4 * n
        assert total.opcodes["ld.global.v4"] == 2 * n // 128


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax(dtype, seed):
    x = torch.randn(7, 531).to(dtype)
    out = torch.empty_like(x)
    run_triton(softmax_kernel, (7,), x, out, 531, 531, BLOCK=1024, uninitialised=[out], seed=seed)
    want = x.float().softmax(1)
    # One rounding to the result's type, and that of exp2 and of the sum before it.
    assert ((out.float() - want).abs() <= want * 2 * torch.finfo(dtype).eps + 1e-6).all()


@pytest.mark.parametrize("arch", [86, 89, 90, 120])
def test_other_architectures(arch):
    """The same kernels for other hardware, on sm_90 with wgmma."""
    x = torch.randn(3, 300)
    out = torch.empty_like(x)
    run_triton(softmax_kernel, (3,), x, out, 300, 300, BLOCK=512, uninitialised=[out], arch=arch)
    assert torch.allclose(out, x.softmax(1), atol=1e-6, rtol=4 * 2**-23)
    x, k = torch.rand(256) * 5 + 0.1, torch.arange(256, dtype=torch.int32)
    outs = [torch.empty(256) for _ in range(2)]
    for run_arch, out in zip((80, arch), outs, strict=True):
        run_triton(math_kernel, (1,), x, k, out, 37, BLOCK=256, uninitialised=[out], arch=run_arch)
    assert torch.equal(*outs)
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.empty(64, 64)
    run_triton(
        matmul_kernel, (1, 1), a, b, c, 64, 64, 64, BM=64, BN=64, BK=32,
        uninitialised=[c], arch=arch,
    )  # fmt: skip
    assert torch.allclose(c, a.float() @ b.float(), atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("warps", [1, 4])
def test_scan(warps, seed):
    x = torch.randint(-50, 50, (9, 500), dtype=torch.int32)
    out = torch.empty_like(x)
    run_triton(
        scan_kernel, (9,), x, out, 500, BLOCK=512, num_warps=warps, uninitialised=[out], seed=seed
    )
    assert torch.equal(out, x.cumsum(1).int())


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(seed):
    x = torch.randint(0, 50, (3000,), dtype=torch.int32)
    out, largest = torch.zeros(50, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    report = run_triton(histogram_kernel, (12,), x, out, largest, 3000, BLOCK=256, seed=seed)
    assert torch.equal(out, torch.bincount(x, minlength=50).int())
    assert largest.item() == x.max()
    assert report.total.atomics == 3000 + 12


def test_sort():
    x = torch.randint(-5000, 5000, (256,), dtype=torch.int32)
    out = torch.empty_like(x)
    run_triton(sort_kernel, (1,), x, out, BLOCK=256, uninitialised=[out])
    assert torch.equal(out, x.sort().values)


def test_mathematics():
    """libdevice code with local arrays, 64-bit products and divergent loops (large sines)."""
    x = torch.rand(256) * 5 + 0.1
    x[::9] *= 1e6
    k = torch.randint(0, 10_000, (256,), dtype=torch.int32)
    out = torch.empty(256)
    run_triton(math_kernel, (1,), x, k, out, 37, BLOCK=256, uninitialised=[out])
    d = x.double()
    want = d.sin() + d.log() + d.sqrt() + d.rsqrt() + d.floor() + d.sigmoid() + d.erf()
    want += k // 37 + k % 37 + k // 7 + (k >> 2) + x.int()
    want += x.half().double() + x.bfloat16().double() + d[torch.arange(256) ^ 1]
    finite = want.isfinite()
    assert torch.equal(finite, out.isfinite())
    # The sums are float32 of seven terms: a few roundings of the largest partial sum.
    assert ((out - want).abs()[finite] <= 8 * 2**-23 * want.abs()[finite].clamp(min=1)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("dtype", "m", "n", "k", "stages"),
    [
        (torch.bfloat16, 64, 64, 96, 3),
        (torch.bfloat16, 70, 50, 72, 4),
        (torch.float16, 64, 128, 64, 2),
        (torch.float32, 64, 64, 64, 3),
    ],
)
def test_matmul(dtype, m, n, k, stages, seed):
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    c = torch.empty(m, n)
    grid = lambda meta: (triton.cdiv(m, meta["BM"]), triton.cdiv(n, meta["BN"]))  # noqa: E731
    report = run_triton(
        matmul_kernel, grid, a, b, c, m, n, k, BM=64, BN=64, BK=32,
        num_stages=stages, uninitialised=[c], seed=seed,
    )  # fmt: skip
    want = a.double() @ b.double()
    # Products are exact; float32 sums of k terms. TF32 rounds its operands to eleven bits.
    unit = 2**-10 if dtype == torch.float32 else k * 2**-24
    assert ((c - want).abs() <= unit * (a.double().abs() @ b.double().abs()) + 1e-6).all()
    assert report.total.multiply_adds == -(-m // 64) * -(-n // 64) * 64 * 64 * -(-k // 32) * 32


@pytest.mark.parametrize("seed", SEEDS)
def test_attention(seed):
    n, d = 70, 32
    q, k, v = (torch.randn(n, d).bfloat16() for _ in range(3))
    out = torch.empty(n, d)
    run_triton(
        attention_kernel, (3,), q, k, v, out, d**-0.5 * 1.4426950408889634, n, B=32, D=d,
        uninitialised=[out], seed=seed,
    )  # fmt: skip
    q, k, v = q.double(), k.double(), v.double()
    s = (q @ k.T * d**-0.5).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    # Probabilities are rounded to bf16 before the second product: at most 2^-8 of each.
    assert ((out - s.softmax(1) @ v).abs() <= 2**-8 * (s.softmax(1) @ v.abs()) + 1e-3).all()


# Bugs planted in what Triton emitted


def matmul_case():
    a, b = torch.randn(64, 160).bfloat16(), torch.randn(160, 64).bfloat16()
    c = torch.empty(64, 64)
    names = ("a_ptr", "b_ptr", "c_ptr", "M", "N", "K", "BM", "BN", "BK")
    arguments = dict(zip(names, (a, b, c, 64, 64, 160, 64, 64, 32), strict=True))
    compiled = compile_triton(matmul_kernel, arguments, num_warps=4, num_stages=3)

    def launch(ptx, seed=None):
        Kernel(ptx).launch(
            (1, 1), (128,), [a, b, c, 64, 64, 160, 0, 0],
            dynamic_shared_bytes=compiled.shared_bytes, uninitialised=[c], seed=seed,
        )  # fmt: skip
        return (c - a.float() @ b.float()).abs().max() < 1e-3

    return compiled.ptx, launch


def nth(text: str, pattern: str, number: int, new: str) -> str:
    """The text with one match of a pattern replaced; negative numbers count from the end."""
    found = list(re.finditer(pattern, text))
    at = found[number]
    return text[: at.start()] + at.expand(new) + text[at.end() :]


LOAD_OF_A = r"(ldmatrix\S+ \S+ \S+ \S+ \S+ \[%r\d+)\+2048\]"
COPY = r"(cp\.async\.cg\S+ \[ %r\d+ \+ 0 \], \[ %rd\d+) \+ 0"
MATMUL_BUGS = {
    "count of a wait": (r"cp\.async\.wait_group[ \t]+2;", 0, "cp.async.wait_group 3;", MissingWait),
    "swizzle of a read": (LOAD_OF_A, 0, r"\1+2056]", Misaligned),
    "stage of a read": (LOAD_OF_A, 0, r"\1+65536]", OutOfBounds),
    "source of a copy": (COPY, 0, r"\1 + -16", OutOfBounds),
    "an output not stored": (r"@%p\d+ st\.global\.v4", 0, "//", Uninitialised),
    "an output past its end": (r"(st\.global\.v4\S* \[ %rd\d+) \+ 0", -1, r"\1 + 16", PtxError),
}


@pytest.mark.parametrize("name", MATMUL_BUGS)
def test_bugs_planted_in_the_matmul(name):
    pattern, number, new, error = MATMUL_BUGS[name]
    ptx, launch = matmul_case()
    assert launch(ptx)
    with pytest.raises(error):
        launch(nth(ptx, pattern, number, new))


# Without these the kernel is right all the same: no copy has been waited for and no shared memory
# read at the first barrier; and the first group without its commit joins the second, for which the
# first wait waits anyway.
REDUNDANT = {("bar", 0), ("commit", 0)}
SYNCHRONISATION = {
    "bar": r"bar\.sync[ \t]+0;",
    "commit": r"cp\.async\.commit_group;",
    "wait": r"cp\.async\.wait_group[ \t]+\d;",
}


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_every_removal_of_synchronisation_from_the_matmul_is_noticed(seed):
    ptx, launch = matmul_case()
    unnoticed = set()
    for name, pattern in SYNCHRONISATION.items():
        for number in range(len(re.findall(pattern, ptx))):
            try:
                assert launch(nth(ptx, pattern, number, ""), seed)
                unnoticed.add((name, number))
            except (Race, MissingWait):
                continue
    assert unnoticed == REDUNDANT


@pytest.mark.parametrize(
    "name", ["barrier", "shuffle", "predicate of a load", "predicate of a store"]
)
def test_bugs_planted_in_the_softmax(name):
    x = torch.randn(3, 500)
    out = torch.empty_like(x)
    arguments = {"x_ptr": x, "out_ptr": out, "stride": 500, "n": 500, "BLOCK": 512}
    compiled = compile_triton(softmax_kernel, arguments, num_warps=4)

    def launch(ptx):
        kernel = Kernel(ptx)
        values = [x, out, 500, 500, 0, 0][: len(kernel.program.params)]
        kernel.launch(
            (3,), (128,), values, dynamic_shared_bytes=compiled.shared_bytes, uninitialised=[out]
        )

    launch(compiled.ptx)
    pattern, new, error = {
        "barrier": (r"bar\.sync[ \t]+0;", "", (Race, Uninitialised)),
        "shuffle": (
            r"shfl\.sync",
            "setp.lt.u32 %p1, %tid.x, 7; @%p1 bra $OUT; shfl.sync",
            Divergence,
        ),
        "predicate of a load": (r"@%p\d+ ld\.global", "ld.global", OutOfBounds),
        "predicate of a store": (r"@%p\d+ st\.global", "st.global", OutOfBounds),
    }[name]
    last = -1 if name.startswith("predicate") else 0
    broken = nth(compiled.ptx, pattern, last, new)
    broken = nth(broken, r"\n\tret;", 0, "\n$OUT:\tret;") if name == "shuffle" else broken
    with pytest.raises(error, match=r"softmax_kernel, test_ptx_triton\.py:\d+|standard\.py:\d+"):
        launch(broken)


# The launcher


def test_specialisation_is_the_launchers():
    """The same signature, constants and divisibility that Triton's own binder finds."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 80, 32))
    bind = create_function_from_signature(add_kernel.signature, add_kernel.params, backend)
    x = torch.randn(64)
    for values in (
        (x, x, x, 64), (x, x[1:], x[4:], 63), (x, x, x, 1), (x, x, x, 2**40), (x, x, x, 2**63),
        (x.bfloat16(), x.half(), x.to(torch.float8_e4m3fn), 16), (x, None, x, -16),
        (x, x, x, 1.5), (x, x, x, True), (x.bool(), x.long(), x.to(torch.uint16), -(2**31)),
    ):  # fmt: skip
        names = ("x_ptr", "y_ptr", "out_ptr", "n", "BLOCK")
        mine = specialise(add_kernel, dict(zip(names, (*values, 64), strict=True)))
        _, theirs, _ = bind(*values, BLOCK=64)
        for (kind, key), (name, mine_kind) in zip(theirs, mine.signature.items(), strict=True):
            assert mine_kind == kind, (values[3], name)
            if kind == "constexpr":
                assert mine.constants[name] == key
            else:
                assert (name in mine.divisible) == (key == "D")


def test_launches_in_a_block_go_to_the_emulator():
    x, out = torch.randn(500), torch.empty(500)
    with emulated() as emulation:
        add_kernel[(1,)](x, x, out, 500, BLOCK=512)
        add_kernel[lambda meta: (500 // meta["BLOCK"] + 1,)](x, out, out, 500, 256, num_warps=2)
    assert torch.equal(out, x + x + x)
    assert [name for name, _ in emulation.launches] == ["add_kernel"] * 2
    assert [report.threads for _, report in emulation.launches] == [128, 64]
    with pytest.raises(OutOfBounds), emulated():
        add_kernel[(1,)](x, x, out, 501, BLOCK=512)


def test_launches_that_do_not_fit():
    x = torch.randn(16)
    with pytest.raises(LaunchError, match="no value for n, BLOCK"):
        run_triton(add_kernel, (1,), x, x, x)
    with pytest.raises(LaunchError, match=r"tensors of torch\.complex64"):
        run_triton(add_kernel, (1,), x.to(torch.complex64), x, x, 16, BLOCK=16)
    with pytest.raises(LaunchError, match="argument n: str"):
        run_triton(add_kernel, (1,), x, x, x, "16", BLOCK=16)
    with pytest.raises(LaunchError, match="no compiled kernel"):
        compile_triton(print, {})
