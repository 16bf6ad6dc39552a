"""The Triton interpreter: right where Triton's own is wrong, and right on whole kernels.

What it catches is in `test_triton_interpreter_faults.py`.
"""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

import kimi_ops
from kimi_ops._dispatch import get_op
from kimi_ops.testing import assert_close_to_oracle
from kimi_ops.testing.triton_interpreter import UnsupportedByInterpreter, interpreted, numerics

BF16_STEP = 2.0**-8  # half a unit in the last place of bf16, relative
F32_STEP = 2.0**-24


# What stock Triton gets wrong. When a new Triton passes `STOCK`, drop the repair it stands for.

STOCK = """
import numpy as np, torch, triton, triton.language as tl
import sys

@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.load(y_ptr))

@triton.jit
def cast_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr).to(tl.bfloat16))

@triton.jit
def dot_kernel(x_ptr, out_ptr, PRECISION: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x, input_precision=PRECISION))

@triton.jit
def load_kernel(x_ptr, out_ptr, n):
    at = tl.arange(0, 8)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n))

@triton.jit
def max_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.maximum(tl.load(x_ptr), tl.load(x_ptr + 1)))

def sums():
    out = torch.zeros(1, dtype=torch.bfloat16)
    add_kernel[(1,)](torch.tensor([1.5]).bfloat16(), torch.tensor([2.25]).bfloat16(), out)
    return out.item() == 3.75

def casts():
    out = torch.zeros(1, dtype=torch.bfloat16)
    cast_kernel[(1,)](torch.tensor([1 + 3 * 2.0**-8]), out)
    return out.item() == 1 + 2.0**-6

def bf16_dots():
    x, out = torch.eye(16).bfloat16() * 3, torch.zeros(16, 16)
    dot_kernel[(1,)](x, out, "ieee")
    return torch.equal(out, torch.eye(16) * 9)

def tf32_dots():
    x, out = torch.eye(16) * (1 + 2.0**-12), torch.zeros(16, 16)
    dot_kernel[(1,)](x, out, "tf32")
    return torch.equal(out, torch.eye(16))

def masked_lanes():
    out = torch.zeros(8)
    load_kernel[(1,)](torch.ones(8), out, 5)
    return bool(out[5:].isnan().all())

def out_of_bounds():
    memory = torch.ones(8)
    try:
        load_kernel[(1,)](memory[:6], torch.zeros(8), 7)
    except AssertionError:
        return True
    return False

def nan_in_maximum():
    out = torch.zeros(1)
    max_kernel[(1,)](torch.tensor([float("nan"), 2.0]), out)
    return out.item() == 2.0
"""
WRONG_IN_STOCK = (
    "sums",
    "casts",
    "bf16_dots",
    "tf32_dots",
    "masked_lanes",
    "out_of_bounds",
    "nan_in_maximum",
)
# Where stock Triton is right from a version on; the repair stays for those before.
RIGHT_SINCE = {"nan_in_maximum": (3, 9)}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Each check of `STOCK` under Triton's interpreter and ours: {name: (stock, ours)}."""
    script = tmp_path_factory.mktemp("stock") / "stock.py"
    script.write_text(
        STOCK
        + textwrap.dedent(
            f"""
            from kimi_ops.testing.triton_interpreter import interpreted
            np.seterr(all="ignore")
            for name in {WRONG_IN_STOCK}:
                stock = globals()[name]()
                with interpreted():
                    ours = globals()[name]()
                print(name, stock, ours)
            """
        )
    )
    run = subprocess.run(
        [sys.executable, str(script)],
        env={"TRITON_INTERPRET": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in run.stdout.splitlines()]
    return {name: (stock == "True", ours == "True") for name, stock, ours in lines}


@pytest.mark.parametrize("check", WRONG_IN_STOCK)
def test_stock_is_wrong_and_ours_is_right(verdicts, check):
    stock, ours = verdicts[check]
    assert ours
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < RIGHT_SINCE.get(check, (99,)):
        assert not stock, f"Triton {triton.__version__} is right here: the repair can be dropped"


def test_no_rounding_in_front_of_tf32_tensor_cores():
    """Why `truncate_to_tf32` truncates; if Triton comes to emit cvt.rna, it must round."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for arch in (80, 90, 120):
        source = ASTSource(
            tf32_dot_kernel,
            signature={"x_ptr": "*fp32", "out_ptr": "*fp32"},
            constexprs={},
        )
        ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
        assert "mma" in ptx
        assert ".tf32" in ptx
        assert "cvt.rna.tf32" not in ptx


@triton.jit
def tf32_dot_kernel(x_ptr, out_ptr):
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x))


# Formats.


def test_bf16_rounding_is_torch_s_for_every_kind_of_float32():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (rng.integers(0, 2**16, 20_000, dtype=np.uint32) << 16) | np.uint32(0x8000)
    x = np.concatenate([bits, ties, ties + np.uint32(1), ties - np.uint32(1)]).view(np.float32)
    got = torch.from_numpy(numerics.f32_to_bf16(x).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(got, torch.from_numpy(x).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_float64_to_bf16_rounds_once():
    # Just above a tie of bf16, by less than float32 can tell.
    x = np.array([1 + 2.0**-8 + 2.0**-40, -(1 + 2.0**-8 + 2.0**-40), 1 + 2.0**-8, 1e300, np.nan])
    got = numerics.bf16_to_f32(numerics.f64_to_bf16(x))
    expected = np.array([1 + 2.0**-7, -(1 + 2.0**-7), 1, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "largest"),
    [(tl.float8e4nv, torch.float8_e4m3fn, 448.0), (tl.float8e5, torch.float8_e5m2, 57344.0)],
)
def test_fp8_is_torch_s_and_saturates(dtype, torch_dtype, largest):
    codes = torch.arange(256, dtype=torch.uint8)
    exact = codes.view(torch_dtype).float().numpy()
    np.testing.assert_array_equal(numerics.widen(codes.numpy(), dtype), exact)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(50_000) * np.exp2(rng.integers(-12, 8, 50_000))).astype(np.float32)
    steps = np.sort(exact[np.isfinite(exact)])
    x = np.concatenate([x, (steps[1:] + steps[:-1]) / 2]).clip(-largest, largest)
    got = numerics.widen(numerics.narrow(x, dtype), dtype)
    np.testing.assert_array_equal(got, torch.from_numpy(x).to(torch_dtype).float().numpy())
    far = numerics.widen(numerics.narrow(np.array([1e9, -np.inf, np.nan]), dtype), dtype)
    np.testing.assert_array_equal(far, np.array([largest, -largest, np.nan]))


def test_float_to_int_saturates_and_nan_is_zero():
    x = np.array([1.9, -1.9, 3e9, -3e9, np.nan, np.inf])
    got = numerics.float_to_int(x, np.dtype(np.int32))
    np.testing.assert_array_equal(got, [1, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1])
    got = numerics.float_to_int(np.array([1e19, -1e19, 2.0**62]), np.dtype(np.int64))
    np.testing.assert_array_equal(got, [2**63 - 1, -(2**63), 2**62])


# Whole kernels against torch in float64.


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_a_m, stride_b_k, stride_c_m,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BM + tl.arange(0, BM)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        left = K - k * BK
        a = tl.load(
            a_ptr + offs_m[:, None] * stride_a_m + (k * BK + offs_k)[None, :],
            mask=(offs_m[:, None] < M) & (offs_k[None, :] < left),
            other=0.0,
        )
        b = tl.load(
            b_ptr + (k * BK + offs_k)[:, None] * stride_b_k + offs_n[None, :],
            mask=(offs_k[:, None] < left) & (offs_n[None, :] < N),
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(
        c_ptr + offs_m[:, None] * stride_c_m + offs_n[None, :],
        acc.to(c_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


HAS_BF16_SPLITS = pytest.mark.skipif(
    triton.__version__ < "3.6", reason="Triton splits float32 into bf16 since 3.6"
)


@pytest.mark.parametrize(
    ("dtype", "precision", "step"),
    [
        (torch.bfloat16, "tf32", BF16_STEP),  # the result's rounding; inputs are exact
        (torch.float16, "tf32", 2.0**-11),
        (torch.float32, "tf32", 2 * 2.0**-10),  # each operand loses less than 2**-10
        (torch.float32, "tf32x3", 2.0**-19),
        pytest.param(torch.float32, "bf16x6", 2.0**-20, marks=HAS_BF16_SPLITS),
        pytest.param(torch.float32, "bf16x3", 2.0**-14, marks=HAS_BF16_SPLITS),
        (torch.float32, "ieee", 2.0**-20),
    ],
)
def test_matmul(dtype, precision, step):
    m, n, k = 70, 40, 100
    memory = torch.randn(m, k + 12).to(dtype)
    a, b = memory[:, :k], torch.randn(k, n).to(dtype)
    c = torch.empty(m, n, dtype=dtype)
    with interpreted(uninitialised=c) as report:
        matmul_kernel[(3, 2)](
            a, b, c, m, n, k, a.stride(0), b.stride(0), c.stride(0),
            BM=32, BN=32, BK=32, PRECISION=precision, num_warps=4,
        )  # fmt: skip
    assert report.unwritten(c) == 0
    assert report.launches[0].dots == 6 * 4
    exact = a.double() @ b.double()
    # Sums of k products: each rounding and each operand's error weighs |a| @ |b|.
    scale = a.double().abs() @ b.double().abs()
    error = (c.double() - exact).abs()
    assert (
        error
        <= step * torch.maximum(exact.abs(), scale * (dtype == torch.float32))
        + (k * F32_STEP * scale)
    ).all()
    if (dtype, precision) == (torch.float32, "tf32"):
        assert error.max() > 1e-4 * scale.max() / 10, "TF32 must lose bits"


@triton.jit
def int8_dot_kernel(x_ptr, out_ptr):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x.T))


def test_int8_dot_is_exact():
    x = torch.randint(-128, 128, (32, 32), dtype=torch.int8)
    x[0] = -128
    out = torch.empty(32, 32, dtype=torch.int32)
    with interpreted():
        int8_dot_kernel[(1,)](x, out)
    assert torch.equal(out, (x.double() @ x.double().T).int())


@triton.jit
def softmax_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs, mask=offs < n, other=float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row * n + offs, (p / tl.sum(p, axis=0)).to(tl.bfloat16), mask=offs < n)


def test_softmax_of_strided_rows():
    x = (torch.randn(9, 200) * 4).bfloat16()[:, :177]
    y = torch.empty(9, 177, dtype=torch.bfloat16)
    with interpreted(uninitialised=y):
        softmax_kernel[(9,)](x, y, 177, x.stride(0), BLOCK=256)
    exact = torch.softmax(x.double(), -1)
    # 1e-40: below bf16's normal range the step is absolute.
    assert ((y.double() - exact).abs() <= 1.01 * BF16_STEP * exact + 1e-40).all()


@triton.jit
def flash_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, S, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BM
    head = tl.program_id(1) * S * D
    offs_m, offs_n, offs_d = start + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    mask_m = offs_m < S
    q = tl.load(q_ptr + head + offs_m[:, None] * D + offs_d[None, :], mask=mask_m[:, None])
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)  # noqa: E741
    acc = tl.zeros([BM, D], tl.float32)
    for j in tl.range(0, tl.minimum(start + BM, S), BN):
        mask_n = j + offs_n < S
        at = head + (j + offs_n)[:, None] * D + offs_d[None, :]
        k = tl.load(k_ptr + at, mask=mask_n[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=mask_n[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        s = tl.where((offs_m[:, None] >= (j + offs_n)[None, :]) & mask_n[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        decay = tl.exp2(m - new)
        l = l * decay + tl.sum(p, 1)  # noqa: E741
        acc = acc * decay[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)
        m = new
    at = head + offs_m[:, None] * D + offs_d[None, :]
    tl.store(out_ptr + at, (acc / l[:, None]).to(tl.bfloat16), mask=mask_m[:, None])
    tl.store(lse_ptr + tl.program_id(1) * S + offs_m, (m + tl.log2(l)) * 0.6931471805599453,
             mask=mask_m)  # fmt: skip


def test_flash_attention_ignores_poisoned_query_rows():
    heads, s, d = 2, 77, 32
    q, k, v = (torch.randn(heads, s, d).bfloat16() for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(heads, s)
    scale = 1 / math.sqrt(d)
    with interpreted(seed=1, uninitialised=(out, lse)) as report:
        flash_kernel[(3, heads)](
            q, k, v, out, lse, s, scale * math.log2(math.e), D=d, BM=32, BN=16, num_stages=2
        )
    assert report.unwritten(out) == report.unwritten(lse) == 0
    scores = (q.double() @ k.double().transpose(1, 2)) * scale
    scores.masked_fill_(torch.ones(s, s).triu(1).bool(), -torch.inf)
    exact = scores.softmax(-1) @ v.double()
    # p is rounded to bf16 before it meets v, the result once more.
    weight = scores.softmax(-1) @ v.double().abs()
    assert ((out.double() - exact).abs() <= 1.1 * BF16_STEP * (weight + exact.abs())).all()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@triton.jit
def scan_kernel(x_ptr, sum_ptr, back_ptr, linear_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs).to(tl.float32)
    tl.store(sum_ptr + offs, tl.cumsum(x, 0))
    tl.store(back_ptr + offs, tl.cumsum(x, 0, reverse=True))
    decay = tl.full([N], 0.5, tl.float32)
    _, y = tl.associative_scan((decay, x), 0, linear_combine)
    tl.store(linear_ptr + offs, y)


@triton.jit
def linear_combine(a, x, b, y):
    return a * b, x * b + y


def test_scans_keep_order():
    x = torch.randn(64).bfloat16()
    forward, back, linear = torch.empty(64), torch.empty(64), torch.empty(64)
    with interpreted(uninitialised=(forward, back, linear)):
        scan_kernel[(1,)](x, forward, back, linear, N=64)
    exact = x.double()
    bound = 64 * F32_STEP * exact.abs().sum()
    assert (forward.double() - exact.cumsum(0)).abs().max() <= bound
    assert (back.double() - exact.flip(0).cumsum(0).flip(0)).abs().max() <= bound
    state, expected = 0.0, []
    for value in exact.tolist():
        state = state * 0.5 + value
        expected.append(state)
    assert (linear.double() - torch.tensor(expected, dtype=torch.float64)).abs().max() <= bound


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, max_ptr, arg_ptr, sorted_ptr, top_ptr, N: tl.constexpr):
    offs = tl.arange(0, 4)[:, None] * N + tl.arange(0, N)[None, :]
    rows = tl.arange(0, 4)
    x = tl.load(x_ptr + offs).to(tl.float32)
    tl.store(sum_ptr + rows, tl.sum(x, axis=1))
    value, index = tl.max(x, axis=1, return_indices=True)
    tl.store(max_ptr + rows, value)
    tl.store(arg_ptr + rows, index)
    tl.store(sorted_ptr + offs, tl.sort(x, dim=1))
    top = tl.topk(x, 4)
    tl.store(top_ptr + rows[:, None] * 4 + tl.arange(0, 4)[None, :], top)


def test_reductions_and_sort_of_bf16():
    x = torch.randn(4, 32).bfloat16()
    x[1, 3] = x[1, 20] = 9.0  # a tie: the lower index
    x[2, 5] = torch.nan  # max ignores it
    sums, tops = torch.empty(4).bfloat16(), torch.empty(4, 4).bfloat16()
    largest, order = torch.empty(4).bfloat16(), torch.empty(4, 32).bfloat16()
    index = torch.empty(4, dtype=torch.int32)
    with interpreted():
        reduce_kernel[(1,)](x, sums, largest, index, order, tops, N=32)
    whole = [0, 1, 3]
    # tl.sum of bf16 adds in bf16: five levels of rounding.
    error = (sums.double() - x.double().sum(1)).abs()[whole]
    assert (error <= 5 * BF16_STEP * x.double().abs().sum(1)[whole]).all()
    assert sums[2].isnan()
    assert torch.equal(largest[whole], x.amax(1)[whole])
    assert index[whole].tolist() == x.float().argmax(1)[whole].tolist()
    assert index[1] == 3
    assert torch.equal(order[whole], x.sort(1).values[whole])
    assert torch.equal(tops[whole], x.topk(4).values[whole])


@triton.jit
def histogram_kernel(ids_ptr, counts_ptr, sums_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    ids = tl.load(ids_ptr + offs, mask=mask, other=0)
    tl.atomic_add(counts_ptr + ids, 1, mask=mask)
    tl.atomic_add(sums_ptr + ids, tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)
    tl.atomic_max(counts_ptr + 8, tl.max(ids, 0))


def test_atomics_of_colliding_lanes_and_programs():
    ids = torch.randint(0, 8, (100,), dtype=torch.int32)
    x = torch.randint(-4, 5, (100,)).bfloat16()
    counts, sums = torch.zeros(9, dtype=torch.int32), torch.zeros(8).bfloat16()
    with interpreted(seed=3) as report:
        histogram_kernel[(4,)](ids, counts, sums, x, 100, BLOCK=32)
    assert torch.equal(counts[:8], torch.bincount(ids, minlength=8).int())
    assert counts[8] == ids.max()
    exact = torch.zeros(8).index_add_(0, ids.long(), x.float())
    assert torch.equal(sums.float(), exact), "small integers are exact in bf16"
    assert report.launches[0].atomics == 204


@triton.jit
def last_one_sums_kernel(x_ptr, partial_ptr, count_ptr, out_ptr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(partial_ptr + pid, tl.sum(tl.load(x_ptr + pid * BLOCK + tl.arange(0, BLOCK)), 0))
    if tl.atomic_add(count_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + tl.arange(0, 8)), 0))


@pytest.mark.parametrize("seed", [0, 1, None])
def test_an_atomic_counter_orders_what_it_guards(seed):
    x, out = torch.randn(8 * 16), torch.empty(1)
    with interpreted(seed=seed):
        partial, count = torch.empty(8), torch.zeros(1, dtype=torch.int32)
        last_one_sums_kernel[(8,)](x, partial, count, out, BLOCK=16)
    assert abs(out.item() - x.double().sum().item()) <= 128 * F32_STEP * x.abs().sum().item()


@triton.jit
def gather_kernel(table_ptr, ids_ptr, out_ptr, stride, D: tl.constexpr):
    row = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)
    offs = tl.arange(0, D)
    x = tl.load(table_ptr + row * stride + offs)
    tl.store(out_ptr + tl.program_id(0) * D + offs, tl.gather(x, D - 1 - offs, 0))


def test_gather_past_two_to_the_31_elements():
    """A row 2**31 elements away: pages that nobody touches cost nothing."""
    memory = torch.from_numpy(np.zeros(2**31 + 64, np.int16)).view(torch.bfloat16)
    rows = memory.as_strided((2, 64), (2**31, 1))
    rows.copy_(torch.randn(2, 64))
    out = torch.empty(3, 64, dtype=torch.bfloat16)
    ids = torch.tensor([1, 0, 1], dtype=torch.int32)
    with interpreted():
        gather_kernel[(3,)](rows, ids, out, rows.stride(0), D=64)
    assert torch.equal(out, rows[ids.long()].flip(1))


# The language around the kernels.


@triton.jit
def language_kernel(x_ptr, out_ptr, flag, ratio, N: tl.constexpr, MODE: tl.constexpr = "plain"):
    HALF: tl.constexpr = N // 2
    total = 0.0
    count = 0
    for half in tl.static_range(2):
        total += tl.sum(tl.load(x_ptr + half * HALF + tl.arange(0, HALF)), 0)
    while count < 3:
        count += 1
    if flag and MODE == "plain":
        total += libdevice.tanh(ratio.to(tl.float32)) + count.to(tl.float32)
    tl.store(out_ptr, total)
    tl.store(out_ptr + 1, ((-7) // tl.cast(count - 1, tl.int32)).to(tl.float32))
    tl.store(out_ptr + 2, (tl.full([], 200, tl.uint8) + tl.full([], 100, tl.uint8)).to(tl.float32))


def test_scalars_loops_and_libdevice():
    x, out = torch.arange(16.0), torch.empty(3)
    with interpreted(uninitialised=out):
        language_kernel[lambda meta: (meta["N"] // 16,)](x, out, True, 0.5, N=16)
    assert out[0].item() == pytest.approx(120 + math.tanh(0.5) + 3, rel=1e-6)
    assert out[1].item() == -3  # towards zero, where Python says -4
    assert out[2].item() == 44


@triton.jit
def block_pointer_kernel(x_ptr, out_ptr, N: tl.constexpr):
    block = tl.make_block_ptr(x_ptr, (N,), (1,), (0,), (16,), (0,))
    block = tl.advance(block, (16,))
    x = tl.load(block, boundary_check=(0,), padding_option="nan")
    out = tl.make_block_ptr(out_ptr, (16,), (1,), (0,), (16,), (0,))
    tl.store(out, x)


@pytest.mark.skipif(
    triton.__version__ >= "3.9", reason="block pointers are gone from Triton since 3.9"
)
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointer_pads_bf16_with_nan():
    x, out = torch.randn(20).bfloat16(), torch.empty(16).bfloat16()
    with interpreted():
        block_pointer_kernel[(1,)](x, out, N=20)
    assert torch.equal(out[:4], x[16:])
    assert out[4:].isnan().all()


@triton.jit
def silu_mul_kernel(x_ptr, out_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * 2 * F + offs, mask=offs < F, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + offs, mask=offs < F, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * F + offs, y.to(out_ptr.dtype.element_ty), mask=offs < F)


def test_an_op_runs_through_its_own_launch(monkeypatch):
    class Backend:
        @staticmethod
        def unsupported(gate_up):
            return None

        @staticmethod
        def launch(outputs, gate_up):
            rows, width = gate_up.shape
            silu_mul_kernel[(rows,)](gate_up, outputs, width // 2, BLOCK=64)

    monkeypatch.setitem(get_op("silu_mul")._loaded, "mine", Backend)
    x = torch.randn(5, 2 * 40).bfloat16()
    with interpreted() as report, kimi_ops.use_backend(silu_mul="mine"):
        got = kimi_ops.silu_mul(x)
    assert report.unwritten(got) == 0
    assert [launch.grid for launch in report.launches] == [(5, 1, 1)]
    with kimi_ops.use_backend("reference"):
        plain, exact = kimi_ops.silu_mul(x), kimi_ops.silu_mul(x.double())
    assert_close_to_oracle("out", got, plain, exact)


@triton.jit
def descriptor_kernel(x_desc, out_ptr, stride):
    x = x_desc.load([8, 0])
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], x)


def test_host_descriptor_fills_with_zeros():
    x, out = torch.randn(20, 16).bfloat16(), torch.empty(16, 16).bfloat16()
    with interpreted():
        descriptor_kernel[(1,)](TensorDescriptor(x, [20, 16], [16, 1], [16, 16]), out, 16)
    assert torch.equal(out[:12], x[8:])
    assert not out[12:].any()


@triton.jit
def pointer_table_kernel(table_ptr, out_ptr):
    pointer = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + tl.program_id(0), tl.load(pointer))


def test_table_of_pointers():
    a, b, out = torch.tensor([3.0]), torch.tensor([5.0]), torch.empty(2)
    table = torch.tensor([a.data_ptr(), b.data_ptr()])
    with interpreted():
        pointer_table_kernel[(2,)](table, out)
    assert out.tolist() == [3.0, 5.0]


def test_everything_is_put_back():
    before = (
        triton.JITFunction.run,
        triton.JITFunction.__call__,
        torch.empty,
        torch.Tensor.data_ptr,
        tl.load,
        tl.core.reduce,
        tl.tensor.__add__,
    )
    x, out = torch.ones(1), torch.empty(1)
    with interpreted():
        pointer_table_kernel[(1,)](torch.tensor([x.data_ptr()]), out)
        assert triton.JITFunction.run is not before[0]
    after = (
        triton.JITFunction.run,
        triton.JITFunction.__call__,
        torch.empty,
        torch.Tensor.data_ptr,
        tl.load,
        tl.core.reduce,
        tl.tensor.__add__,
    )
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert "data_ptr" not in vars(torch.Tensor)


def test_products_are_exact_whatever_torch_may_round():
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        x = torch.full((64, 64), 1 + 2.0**-20)
        out = torch.empty(64, 64)
        with interpreted():
            matmul_kernel[(1, 1)](
                x, torch.eye(64), out, 64, 64, 64, 64, 64, 64,
                BM=64, BN=64, BK=64, PRECISION="ieee",
            )  # fmt: skip
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(out, x)
    assert torch.get_num_threads() == threads


def test_blocks_do_not_nest():
    with interpreted(), pytest.raises(RuntimeError, match="do not nest"), interpreted():
        pass


# What it refuses, by name.


@triton.jit
def assembly_kernel(x_ptr):
    x = tl.load(x_ptr)
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, True, 1)
    tl.store(x_ptr, y)


@triton.jit
def scaled_kernel(x_ptr):
    x = tl.zeros([32, 32], tl.float8e5)
    s = tl.zeros([32, 1], tl.uint8)
    tl.store(x_ptr, tl.sum(tl.dot_scaled(x, s, "e5m2", x, s, "e5m2")))


@triton.jit
def bessel_kernel(x_ptr):
    tl.store(x_ptr, libdevice.j0(tl.load(x_ptr).to(tl.float32)).to(tl.int32))


@triton.autotune([triton.Config({}, num_warps=1), triton.Config({}, num_warps=2)], key=[])
@triton.jit
def tuned_kernel(x_ptr):
    tl.store(x_ptr, 1)


@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        (assembly_kernel, "inline assembly 'mov.b32"),
        (scaled_kernel, "tl.dot_scaled at scaled_kernel"),
        (bessel_kernel, "libdevice function __nv_j0f"),
        (tuned_kernel, "tuned_kernel chooses among 2 configurations"),
    ],
)
def test_unsupported_is_an_error_that_names_it(kernel, named):
    x = torch.zeros(1, dtype=torch.int32)
    with interpreted(), pytest.raises(UnsupportedByInterpreter, match=named):
        kernel[(1,)](x)


@triton.jit
def descriptor_add_kernel(x_desc):
    x_desc.atomic_add([0, 0], tl.zeros([16, 16], tl.float32))


def test_an_operation_that_nobody_reviewed_is_an_error_that_names_it():
    x = TensorDescriptor(torch.zeros(16, 16), [16, 16], [16, 1], [16, 16])
    named = r"Triton operation descriptor_reduce at descriptor_add_kernel\(0, 0, 0\)"
    with interpreted(), pytest.raises(UnsupportedByInterpreter, match=named):
        descriptor_add_kernel[(1,)](x)


def test_launch_is_checked_as_a_gpu_would():
    x = torch.zeros(1, dtype=torch.int32)
    with interpreted():
        with pytest.raises(TypeError, match="'num_wraps' is neither an argument nor a launch"):
            assembly_kernel[(1,)](x, num_wraps=4)
        with pytest.raises(ValueError, match="no GPU launches the grid"):
            assembly_kernel[(1, 70_000)](x)
        with pytest.raises(UnsupportedByInterpreter, match="not a CPU tensor"):
            assembly_kernel[(1,)](x.to("meta"))


def test_unknown_triton_is_refused(monkeypatch):
    from kimi_ops.testing.triton_interpreter import versions

    versions.require_known_triton()
    monkeypatch.setitem(versions.NEEDED, "triton.language", ("moved_away",))
    with pytest.raises(UnsupportedByInterpreter, match=r"no triton\.language\.moved_away"):
        versions.require_known_triton()
    monkeypatch.setattr(triton, "__version__", "9.1.0")
    with pytest.raises(UnsupportedByInterpreter, match=r"Triton 9\.1\.0: the interpreter was"):
        versions.require_known_triton()
