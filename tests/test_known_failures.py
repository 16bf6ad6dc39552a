"""Failures that users reported of other packages: that docs/known-failures.md names real tests, and
those tests that have no better place."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from op_calls import clone, op_args

import kimi_ops
from kimi_ops._backends import has_kernel
from kimi_ops._dispatch import get_op
from kimi_ops.testing import cases, poisoned_outputs
from kimi_ops.testing.check import as_tuple, bitwise_equal
from kimi_ops.testing.inputs import int4, mla, moe

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")

from kimi_ops._target import targeting  # noqa: E402
from kimi_ops.testing.ptx import Checks  # noqa: E402
from kimi_ops.testing.runner import emulated, target_of  # noqa: E402
from kimi_ops.testing.ways import WAYS, with_way  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/known-failures.md").read_text()
assert [way.name for way in WAYS[:2]] == ["triton[interpreted]", "triton[sm_80]"]
INTERPRETED = WAYS[0]
# Without what the check for races between blocks keeps of each byte, of 4 GiB and more.
CUDA = replace(
    next(way for way in WAYS if way.name == "cuda[sm_80]"),
    context=lambda outputs, number: emulated(
        arch=80, uninitialised=outputs, checks=Checks(global_races=False)
    ),
)


def _rows() -> list[list[str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("row", _rows()[1:], ids=lambda row: row[0][:40])
def test_every_failure_has_a_source_and_tests_that_exist(row):
    what, source, covered = row
    assert what
    assert re.search(r"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+", source)
    named = re.findall(r"`(test_\w+\.py)::(\w+)(?:\[([^\]]+)\])?`", covered)
    assert named
    for file, function, case in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert function in functions, f"{file} has no {function}"
        if case:
            op = file.removeprefix("test_").removesuffix(".py")
            (found,) = (c for c in cases(op) if c.name == case)
            assert all(way.takes(found, full=False) for way in WAYS[:2]), f"{case} is too large"


def _far(x: torch.Tensor) -> torch.Tensor:
    """The same values, the last row more than 2^31 elements (4 GiB) behind the first one.

    Nearly all of the storage is never touched, so that it takes no memory.
    """
    per_word = x.element_size() // 2  # codes of int4 weights are read in 16 bits
    stride = (2**31 // per_word // (len(x) - 1) // 64 + 2) * 64
    storage = torch.empty((len(x) - 1) * stride + x[0].numel(), dtype=x.dtype)
    return storage.as_strided(x.shape, (stride, *x[0].contiguous().stride())).copy_(x)


# CUDA C++ whose compiler takes longest.
SLOW = ("mla_decode", "moe_experts_int4", "mla_latent_write")


@pytest.mark.parametrize(
    ("op", "way"),
    [
        pytest.param(
            op, way, id=f"{op}-{way.name}",
            marks=pytest.mark.full if way.backend == "cuda" and op in SLOW else [],
        )
        for op in kimi_ops.op_names()
        if op != "moe_sort"
        for way in (INTERPRETED, CUDA)
        if has_kernel(op, way.backend)
    ],
)  # fmt: skip
def test_offsets_beyond_31_bits(op, way):
    """Every tensor of 16-bit values or int4 codes in turn; the ids of `moe_sort` are neither."""
    args, contract = op_args(op, 2, torch.bfloat16), get_op(op)

    def results(args):
        outputs = as_tuple(contract.overload(*args))
        return *outputs, *(args[contract.params.index(name)] for name in contract.mutates)

    stretched = 0
    with with_way(op, way) as backend, kimi_ops.use_backend(f"{op}={backend}"):
        expected = results(clone(args))
        for at, (name, arg) in enumerate(zip(contract.params, args, strict=True)):
            wide = isinstance(arg, torch.Tensor) and arg.dim() > 1 and len(arg) > 1
            if wide and (arg.dtype == torch.bfloat16 or "packed" in name):
                mine = list(clone(args))
                mine[at] = _far(arg)
                for one, other in zip(expected, results(mine), strict=True):
                    assert bitwise_equal(one, other), name
                stretched += 1
    assert stretched or op == "moe_select"  # whose logits are float32


def test_queries_without_keys_are_written():
    """Sequences with queries and no cached keys: 0 and -inf, from outputs that were full of NaN."""
    q, k, v = torch.randn(5, 2, 24), torch.randn(2, 2, 24), torch.randn(2, 2, 16)
    cu_q, cu_k = torch.tensor([0, 3, 5]).int(), torch.tensor([0, 0, 2]).int()
    with (
        with_way("mla_prefill", INTERPRETED) as backend,
        kimi_ops.use_backend(mla_prefill=backend),
        poisoned_outputs("mla_prefill"),
    ):
        halves = (x.bfloat16() for x in (q, k, v))
        out, lse = kimi_ops.mla_prefill(*halves, cu_q, cu_k, 3, 2, 0.2)
    assert not out[:3].any()
    assert (lse[:3] == -torch.inf).all()
    assert out[3:].isfinite().all()


def _experts(x, *rest):
    with (
        with_way("moe_experts_int4", INTERPRETED) as backend,
        kimi_ops.use_backend(moe_experts_int4=backend),
    ):
        return kimi_ops.moe_experts_int4(x, *rest[:6])


def test_poisoned_padding_rows_stay_among_themselves():
    """Rows that belong to nobody, as all-to-all buffers have them: NaN, with ids of no expert."""
    args = list(moe.moe_experts_int4(torch.Generator().manual_seed(1), 9, 4, 2, 64, 32)[:7])
    args[6] = args[6].clone()
    args[6][[2, 8]] = -1
    clean = _experts(*args)
    args[0] = args[0].clone()
    args[0][[2, 8]] = torch.nan
    poisoned = _experts(*args)
    others = [0, 1, 3, 4, 5, 6, 7]
    assert bitwise_equal(clean[others], poisoned[others])
    # A NaN row that did choose experts is NaN itself, and nobody else is.
    args[6][2] = args[6][0]
    chosen = _experts(*args)
    assert chosen[2].isnan().all()
    assert bitwise_equal(clean[others], chosen[others])


def test_weights_replaced_in_place_are_seen():
    """Training that updates int4 weights: nothing is kept from an earlier call."""
    generator = torch.Generator().manual_seed(2)
    args = moe.moe_experts_int4(generator, 3, 4, 2, 64, 32)[:7]
    _experts(*args)
    for at, (n, k) in {1: (64, 64), 3: (64, 32)}.items():
        packed, scale = int4.weights(generator, 4, n, k)
        args[at].copy_(packed)
        args[at + 1].copy_(scale)
    assert bitwise_equal(_experts(*args), _experts(*(a.clone() for a in args)))


def test_ranks_of_widths_add_up_to_the_whole():
    """Tensor parallelism cuts the experts' width: two ranks of F/2, their results added."""
    x, up, up_scale, down, down_scale, *routing = moe.moe_experts_int4(
        torch.Generator().manual_seed(3), 5, 4, 2, 64, 64, torch.float64
    )[:7]
    whole = kimi_ops.moe_experts_int4(x, up, up_scale, down, down_scale, *routing)
    parts = torch.zeros_like(whole)
    for rank in range(2):
        rows = [*range(32 * rank, 32 * rank + 32), *range(64 + 32 * rank, 96 + 32 * rank)]
        mine = slice(4 * rank, 4 * rank + 4), slice(rank, rank + 1)
        parts += kimi_ops.moe_experts_int4(
            x, up[:, rows], up_scale[:, rows],
            down[..., mine[0]], down_scale[..., mine[1]], *routing,
        )  # fmt: skip
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("heads", [1, 8, 16, 24, 32, 64])
def test_few_heads_are_not_padded_to_64(heads, arch):
    """The tile is the least power of two, from 16 on, that holds all query rows."""
    args = mla.mla_decode(torch.Generator(), (40,), heads, 1, 16, (32, 16))
    rows = []

    def run(kernel, *positional, **named):
        rows.extend(value for name, value in named.items() if name == "BLOCK_M")

    contract = get_op("mla_decode")
    with (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", run),
        targeting(target_of(arch)),
    ):
        contract.load("triton").launch(contract.outputs(*args), *args)
    assert rows == [max(16, 1 << (heads - 1).bit_length())]
