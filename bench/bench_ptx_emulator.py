"""What the PTX emulator takes for kernels as Triton compiles them.

Run with `pytest bench/bench_ptx_emulator.py`.

Four kernels for sm_80, all checks on: a grid of a matrix product (many CTAs in one numpy step), one
CTA of flash attention, one of an int4 matrix product, and one of MLA decode (64 heads over 1,024
cached tokens, the size that must stay under five seconds). Two rows each: ``fused`` as it runs,
``plain`` with every instruction on its own. ``lane_instructions_per_second`` is in the extra
information: 32 per warp instruction of the launch.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
import triton.language as tl  # noqa: E402

from kimi_ops.testing.runner import compile_triton  # noqa: E402

# The decode CTA is compiled for as many heads and values as the model has.
HEADS, LATENT, ROPE, PAGE, TOKENS = 64, 512, 64, 64, 1024


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a = tl.load(a_ptr + rm[:, None] * K + (rk + k)[None, :])
        b = tl.load(b_ptr + (rk + k)[:, None] * N + rn[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rm[:, None] * N + rn[None, :], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, scale, n, B: tl.constexpr, D: tl.constexpr):
    rows, d = tl.arange(0, B), tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + d[None, :])
    top = tl.full((B,), float("-inf"), tl.float32)
    total = tl.zeros((B,), tl.float32)
    acc = tl.zeros((B, D), tl.float32)
    for start in range(0, n, B):
        keys = start + tl.arange(0, B)
        k = tl.load(k_ptr + keys[:, None] * D + d[None, :], mask=(keys < n)[:, None], other=0.0)
        s = tl.where((keys < n)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        fix = tl.exp2(top - new)
        total = total * fix + tl.sum(p, 1)
        v = tl.load(v_ptr + keys[:, None] * D + d[None, :], mask=(keys < n)[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fix[:, None])
        top = new
    tl.store(out_ptr + rows[:, None] * D + d[None, :], (acc / total[:, None]).to(q.dtype))


@triton.jit
def int4_kernel(
    x_ptr, w_ptr, s_ptr, out_ptr, K, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rm, rn, rk = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(x_ptr + rm[:, None] * K + (k + rk)[None, :])
        w = tl.load(w_ptr + rn[None, :] * (K // 8) + ((k + rk) // 8)[:, None])
        w = ((w >> ((rk % 8) * 4)[:, None]) & 15) - 8
        s = tl.load(s_ptr + rn[None, :] * (K // 32) + ((k + rk) // 32)[:, None])
        acc = tl.dot(x, (w.to(tl.float32) * s.to(tl.float32)).to(x.dtype), acc)
    tl.store(out_ptr + rm[:, None] * N + rn[None, :], acc.to(out_ptr.dtype.element_ty))


@triton.jit
def decode_kernel(
    q_ptr, kv_ptr, page_table_ptr, out_ptr, lse_ptr, scale, n,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    h, dc, dr = tl.arange(0, H), tl.arange(0, C), tl.arange(0, R)
    qc = tl.load(q_ptr + h[:, None] * (C + R) + dc[None, :])
    qr = tl.load(q_ptr + h[:, None] * (C + R) + C + dr[None, :])
    top = tl.full((H,), float("-inf"), tl.float32)
    total = tl.zeros((H,), tl.float32)
    acc = tl.zeros((H, C), tl.float32)
    for start in range(0, n, B):
        t = start + tl.arange(0, B)
        page = tl.load(page_table_ptr + t // P, mask=t < n, other=0).to(tl.int64)
        row = kv_ptr + (page * P + t % P) * (C + R)
        kc = tl.load(row[:, None] + dc[None, :], mask=(t < n)[:, None], other=0.0)
        kr = tl.load(row[:, None] + C + dr[None, :], mask=(t < n)[:, None], other=0.0)
        s = tl.dot(qr, tl.trans(kr), tl.dot(qc, tl.trans(kc))) * scale
        s = tl.where((t < n)[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        fix = tl.exp2(top - new)
        total = total * fix + tl.sum(p, 1)
        acc = tl.dot(p.to(kc.dtype), kc, acc * fix[:, None])
        top = new
    tl.store(out_ptr + h[:, None] * C + dc[None, :], acc / total[:, None])
    tl.store(lse_ptr + h, top + tl.log2(total))


def _case(name):
    """(kernel, arguments by name, compiler options, grid) of a case."""
    torch.manual_seed(0)
    if name == "matmul grid":
        a, b, c = torch.randn(256, 256).half(), torch.randn(256, 256).half(), torch.empty(256, 256)
        arguments = {"a_ptr": a, "b_ptr": b, "c_ptr": c, "N": 256, "K": 256}
        return matmul_kernel, arguments | {"BM": 64, "BN": 64, "BK": 32}, {}, (4, 4)
    if name == "flash attention":
        q, k, v = (
            torch.randn(64, 64).half(),
            torch.randn(256, 64).half(),
            torch.randn(256, 64).half(),
        )
        arguments = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": torch.empty(64, 64).half()}
        return attention_kernel, arguments | {"scale": 0.18, "n": 256, "B": 64, "D": 64}, {}, (1,)
    if name == "int4 product":
        x, s = torch.randn(16, 256).bfloat16(), torch.rand(64, 8).bfloat16()
        w = torch.randint(-(2**31), 2**31 - 1, (64, 32), dtype=torch.int32)
        out = torch.empty(16, 64).bfloat16()
        arguments = {"x_ptr": x, "w_ptr": w, "s_ptr": s, "out_ptr": out, "K": 256, "N": 64}
        return int4_kernel, arguments | {"BM": 16, "BN": 64, "BK": 64}, {}, (1,)
    width = LATENT + ROPE
    pages = TOKENS // PAGE
    arguments = {
        "q_ptr": torch.randn(HEADS, width).bfloat16(),
        "kv_ptr": torch.randn(pages + 2, PAGE, width).bfloat16(),
        "page_table_ptr": torch.randperm(pages + 2)[:pages].int(),
        "out_ptr": torch.empty(HEADS, LATENT),
        "lse_ptr": torch.empty(HEADS),
        "scale": 0.06,
        "n": TOKENS,
    }
    sizes = {"H": HEADS, "C": LATENT, "R": ROPE, "P": PAGE, "B": 32}
    return decode_kernel, arguments | sizes, {"num_warps": 4, "num_stages": 2}, (1,)


@pytest.mark.parametrize("way", ["fused", "plain"])
@pytest.mark.parametrize("name", ["matmul grid", "flash attention", "int4 product", "mla decode"])
def test_emulate(benchmark, name, way):
    jit, arguments, options, grid = _case(name)
    compiled = compile_triton(jit, arguments, **options)
    values = [
        arguments[given]
        for given, kind in compiled.specialisation.signature.items()
        if kind != "constexpr"
    ]
    values += [0] * (len(compiled.kernel.program.params) - len(values))

    def launch():
        return compiled.kernel.launch(
            grid,
            (compiled.threads,),
            values,
            dynamic_shared_bytes=compiled.shared_bytes,
            fuse=way == "fused",
        )

    benchmark.group = name
    report = benchmark(launch)
    lanes = 32 * report.total.warp_instructions
    benchmark.extra_info["warp_instructions"] = report.total.warp_instructions
    benchmark.extra_info["lane_instructions_per_second"] = lanes / benchmark.stats["min"]
