"""The kernels of every op, Triton and CUDA C++: no schedule changes a bit, nor, in batch-invariant
mode, does the rest of the batch.

An ordinary run has two schedules more on one architecture, and two parts of a batch: of Triton in
the interpreter, which needs no compiler, of CUDA C++ emulated where that is quick. ``--full`` has
twenty schedules of both, on two architectures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch

import kimi_ops
from kimi_ops._backends import GPU_BACKENDS, has_kernel
from kimi_ops._dispatch import get_op
from kimi_ops._mla_plan import INVARIANT_TOKENS
from kimi_ops.testing import cases
from kimi_ops.testing.check import as_tuple, bitwise_equal
from kimi_ops.testing.inputs import int4, mla, moe, norm, vision

pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")
pytest.importorskip("cuda.bindings", reason="needs NVRTC: pip install 'kimi-ops[compile]'")

from kimi_ops._target import targeting
from kimi_ops.testing.runner import emulated, target_of
from kimi_ops.testing.triton_interpreter import interpreted

KERNELS = [
    pytest.param(op, language, id=f"{op}-{language}")
    for op in kimi_ops.op_names()
    for language in GPU_BACKENDS
    if has_kernel(op, language)
]
FULL = pytest.mark.full
SCHEDULES = 20
# One of the op's own cases, small since it runs often: several warps, and several thread blocks
# but in vision_pos_embed, where more than one would take seconds each time.
CASE = {
    "rms_norm": "bf16-hostile",
    "add_rms_norm": "bf16-hostile",
    "silu_mul": "bf16-hostile",
    "mla_latent_write": "bf16-small",
    "mla_absorb_query": "bf16-small",
    "mla_decode": "bf16-small",
    "mla_decode_value": "bf16-small",
    "mla_project_value": "bf16-small",
    "mla_prefill": "bf16-small",
    "merge_attention": "bf16-17x4",
    "moe_route": "bf16-9x64",
    "moe_route_sort": "bf16-9x64",
    "moe_select": "bf16-groups",
    "moe_sort": "skewed",
    "moe_experts_int4": "bf16-9",
    "int4_linear": "bf16-3x256x96",
    "vision_pos_embed": "bf16-smallest",
    "vision_rope": "bf16-head-4",
    "vision_attention": "bf16-one",
    "patch_merge": "bf16-small",
}


def _clone(args):
    """Copies with strides and gaps kept: a kernel may be chosen by them."""
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a)
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    )


def _run(op, language, args, arch, seed):
    """Outputs and written arguments, and the launches; interpreted for no architecture."""
    args = _clone(args)
    contract = get_op(op)
    with contextlib.ExitStack() as stack:
        stack.enter_context(kimi_ops.use_backend(f"{op}={language}"))
        if arch is None:
            stack.enter_context(targeting(target_of(80)))
            record = stack.enter_context(interpreted(seed=seed))
        else:
            record = stack.enter_context(emulated(arch=arch, seed=seed))
        outputs = as_tuple(contract.overload(*args))
    written = tuple(args[contract.params.index(name)] for name in contract.mutates)
    return (*outputs, *written), record.launches


def _full(request):
    return request.config.getoption("--full")


# The most to compile and to emulate; the test body itself has one other schedule in every run.
SLOW = {("moe_experts_int4", "cuda"), ("mla_decode", "cuda"), ("mla_latent_write", "cuda")}


@pytest.mark.parametrize(
    ("op", "language", "arch"),
    [
        pytest.param(
            *kernel.values, arch, id=f"{kernel.id}-sm_{arch}",
            marks=FULL if arch == 90 or kernel.values in SLOW else [],
        )
        for kernel in KERNELS
        for arch in (80, 90)
    ],
)  # fmt: skip
def test_no_schedule_changes_a_bit(op, language, arch, request):
    args = next(case for case in cases(op) if case.name == CASE[op]).args()
    first, launches = _run(op, language, args, arch, None)
    assert any(report.ctas * report.threads > 32 for _, report in launches)  # several warps
    for seed in range(SCHEDULES if _full(request) else 2):
        again, _ = _run(op, language, args, arch, seed)
        for one, other in zip(first, again, strict=True):
            assert bitwise_equal(one, other), f"schedule {seed}"


# op -> arguments for a whole batch, and those of its members from i to j with the places of their
# results: how to compare a part with the whole.
Slices = tuple[slice, ...]
Part = Callable[[tuple[Any, ...], int, int], tuple[tuple[Any, ...], Slices]]


def _rows(*batched: int) -> Part:
    """Members are rows of these arguments and of every output."""

    def part(args, i, j):
        chosen = tuple(a[i:j] if n in batched else a for n, a in enumerate(args))
        return chosen, (slice(i, j),) * 2

    return part


def _sequences(args, i, j):
    """Of a paged cache, with a page table as wide as these sequences need."""
    q, cache, table, lengths, *rest = args
    columns = max(1, -(-int(lengths[i:j].max()) // cache.shape[1]))
    return (q[i:j], cache, table[i:j, :columns], lengths[i:j], *rest), (slice(i, j),) * 2


def _prefill(args, i, j):
    q, k, v, cu_q, cu_k, *_, scale, causal = args
    rows, keys = slice(cu_q[i], cu_q[j]), slice(cu_k[i], cu_k[j])
    cu_q, cu_k = cu_q[i : j + 1] - cu_q[i], cu_k[i : j + 1] - cu_k[i]
    longest = (int(cu.diff().max()) for cu in (cu_q, cu_k))
    return (q[rows], k[keys], v[keys], cu_q, cu_k, *longest, scale, causal), (rows,) * 2


def _attention(args, i, j):
    q, k, v, cu, _, scale = args
    rows = slice(int(cu[i]), int(cu[j]))
    cu = cu[i : j + 1] - cu[i]
    return (q[rows], k[rows], v[rows], cu, int(cu.diff().max()), scale), (rows,)


def _starts(sizes: torch.Tensor) -> list[int]:
    return list(accumulate(sizes.tolist(), initial=0))


def _pictures(at: int) -> Part:
    """Members are the entries of the grid, argument ``at``; x and the output have their patches."""

    def part(args, i, j):
        grid = args[at]
        start = _starts(grid.prod(1))
        rows = slice(start[i], start[j])
        return (args[0][rows], *args[1:at], grid[i:j], *args[at + 1 :]), (rows,)

    return part


def _merged(args, i, j):
    (x, grid, *rest), _ = _pictures(1)(args, i, j)
    start = _starts(args[1][:, 1:].prod(1) // 4)
    return (x, grid, start[j] - start[i], *rest[1:]), (slice(start[i], start[j]),)


_GRIDS = ((1, 2, 4), (3, 4, 2), (1, 2, 10), (4, 2, 2))
_LENGTHS = (8, 70, 0, 33)
_CACHED = (INVARIANT_TOKENS + 28, 0, 1, 40, 130)  # the first in two splits
BATCHES: dict[str, tuple[Callable[[torch.Generator], tuple[Any, ...]], Part, int]] = {
    "rms_norm": (lambda g: norm.rms_norm(g, (70, 200), torch.bfloat16), _rows(0), 70),
    "add_rms_norm": (lambda g: norm.add_rms_norm(g, (70, 200), torch.bfloat16), _rows(0, 1), 70),
    "silu_mul": (lambda g: norm.silu_mul(g, (70, 200), torch.bfloat16), _rows(0), 70),
    "mla_latent_write": (lambda g: mla.mla_latent_write(g, 70, (96, 32, 16)), _rows(0, 3, 5), 70),
    "mla_absorb_query": (
        lambda g: mla.mla_absorb_query(g, 70, 2, (40, 8, 72)),
        _rows(0, 2),
        70,
    ),
    "mla_decode": (
        lambda g: mla.mla_decode(g, _CACHED, 4, 1, 16, (32, 16)),
        _sequences,
        5,
    ),
    "mla_decode_value": (
        lambda g: mla.mla_decode_value(g, _CACHED, 4, 24, new=1, page=16, widths=(32, 16)),
        _sequences,
        5,
    ),
    "mla_project_value": (lambda g: mla.mla_project_value(g, 70, 2, (40, 72)), _rows(0), 70),
    "mla_prefill": (
        lambda g: mla.mla_prefill(g, _LENGTHS, (9, 90, 3, 33), 2, (24, 16)),
        _prefill,
        4,
    ),
    "merge_attention": (lambda g: mla.merge_attention(g, (70, 2, 40)), _rows(0, 1, 2, 3), 70),
    "moe_route": (lambda g: moe.moe_route(g, 70, 320, 48, 4), _rows(0), 70),
    "moe_select": (
        lambda g: moe.moe_select(g, tokens=70, d=64, experts=48, top_k=4),
        _rows(0),
        70,
    ),
    "moe_experts_int4": (
        lambda g: moe.moe_experts_int4(g, 70, 4, 2, 64, 64, shared=32),
        _rows(0, 5, 6),
        70,
    ),
    "int4_linear": (lambda g: int4.int4_linear(g, (70, 96), 72), _rows(0), 70),
    "vision_pos_embed": (
        lambda g: vision.vision_pos_embed(g, _GRIDS, 72, (8, 8)),
        _pictures(2),
        4,
    ),
    "vision_rope": (lambda g: vision.vision_rope(g, _GRIDS, 3), _pictures(1), 4),
    "vision_attention": (lambda g: vision.vision_attention(g, _LENGTHS, 2), _attention, 4),
    "patch_merge": (lambda g: vision.patch_merge(g, _GRIDS, 72), _merged, 4),
}


def test_every_op_whose_results_have_rows_is_tried_in_batches():
    """The tables of a sort are of the batch itself; what comes before them is `moe_route`."""
    assert set(BATCHES) == set(kimi_ops.op_names()) - {"moe_sort", "moe_route_sort"}


# CUDA C++ that an ordinary run has in batches too: each way of sharing work among blocks once.
QUICK = ("rms_norm", "moe_route", "moe_select", "mla_decode", "int4_linear", "vision_rope")


def _ways(op, language):
    """Architectures, None for the interpreter; those that an ordinary run leaves out are marked."""
    ordinary = {None} if language == "triton" else {80} if op in QUICK else set()
    for arch in (None, 80, 90):
        if arch is not None or language == "triton":
            name = f"sm_{arch}" if arch else "interpreted"
            marks = [] if arch in ordinary else FULL
            yield pytest.param(op, language, arch, id=f"{op}-{language}-{name}", marks=marks)


@pytest.mark.parametrize(
    ("op", "language", "arch"),
    [way for kernel in KERNELS if kernel.values[0] in BATCHES for way in _ways(*kernel.values)],
)
def test_batch_invariant_mode_is_blind_to_the_rest_of_the_batch(op, language, arch, request):
    """First, middle and last member alone, and parts of other sizes, against the whole."""
    build, part, count = BATCHES[op]
    args = build(torch.Generator().manual_seed(7))
    middle = count // 2
    parts = [(middle, middle + 1), (middle - 1, count), (0, 1), (count - 1, count), (0, middle)]
    with kimi_ops.batch_invariant():
        whole, _ = _run(op, language, args, arch, None)
        for number in range(SCHEDULES if _full(request) and arch else 2):
            i, j = parts[number % len(parts)]
            chosen, places = part(args, i, j)
            found, _ = _run(op, language, chosen, arch, number)
            if op == "mla_latent_write":
                _compare_written_slots(args[5][i:j], found[1], whole[1])
                found = found[:1]
            for mine, all_, place in zip(found, whole, places, strict=False):
                assert bitwise_equal(mine, all_[place]), f"members {i} to {j}, schedule {number}"


def _compare_written_slots(slots, mine, whole):
    slots = slots[(slots >= 0) & (slots < mine[..., 0].numel())].long()
    assert bitwise_equal(mine.flatten(0, 1)[slots], whole.flatten(0, 1)[slots])
