"""Planted bugs: the Triton interpreter names each one, its line and both programs.

Every kernel takes ``BUG``. With it, the fault must be reported at the line that ends in a comment
``# here`` (and against the line with ``# against``); without it the kernel must run clean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kimi_ops.testing.triton_interpreter import FAULTS, KernelFault, interpreted

N = 64


@dataclass(frozen=True)
class Planted:
    """One bug: the kernel, how to launch it, and what must be said."""

    kernel: Any
    kind: str
    message: str
    arguments: Callable[[], tuple[Any, ...]]
    grid: tuple[int, ...] = (4,)
    conflict: str = ""

    def __str__(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


PLANTED: list[Planted] = []


def plant(kind, message, arguments, grid=(4,), conflict=""):
    """Adds a kernel; `conflict` is "program" or "lane" where a second place is named."""

    def add(kernel):
        PLANTED.append(Planted(kernel, kind, message, arguments, grid, conflict))
        return kernel

    return add


def _one():
    return (torch.ones(N),)


def _in_and_out():
    return torch.ones(N), torch.zeros(N)


# Addresses.


@plant("out of bounds", r"0 bytes past the end of x_ptr \[64\] float32", _in_and_out, (1,))
@triton.jit
def load_one_past_the_end_kernel(x_ptr, out_ptr, BUG: tl.constexpr):
    offs = tl.arange(0, 64) + BUG
    x = tl.load(x_ptr + offs, mask=offs < 64 + BUG)  # here
    tl.store(out_ptr + tl.arange(0, 64), x)


@plant("out of bounds", "4 bytes before the start of x_ptr", _in_and_out, (1,))
@triton.jit
def load_before_the_start_kernel(x_ptr, out_ptr, BUG: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 64) - BUG)  # here
    tl.store(out_ptr + tl.arange(0, 64), x)


@plant("out of bounds", r"past the end of out_ptr \[64\] float32", _in_and_out)
@triton.jit
def store_without_its_mask_kernel(x_ptr, out_ptr, BUG: tl.constexpr):
    offs = tl.program_id(0) * 32 + tl.arange(0, 32)
    x = tl.load(x_ptr + offs, mask=offs < 64, other=0.0)
    tl.store(out_ptr + offs, x, mask=(offs < 64) | (BUG == 1))  # here


def _neighbours():
    memory = torch.zeros(2 * N)
    return memory[:N], memory[N:]


@plant("out of bounds", "inside its storage; bounds='storage'", _neighbours, (1,))
@triton.jit
def load_from_the_next_tensor_kernel(x_ptr, out_ptr, BUG: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 64) + 64 * BUG)  # here
    tl.store(out_ptr + tl.arange(0, 64), x)


def _far_apart():
    x, out = torch.zeros(N), torch.zeros(N)
    return x, out, (out.data_ptr() - x.data_ptr()) // 4


@plant("out of bounds", "bytes .* x_ptr", _far_apart, (1,))
@triton.jit
def load_that_lands_in_another_tensor_kernel(x_ptr, out_ptr, distance, BUG: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 64) + distance * BUG)  # here
    tl.store(out_ptr + tl.arange(0, 64), x)


def _rows():
    return torch.ones(4, 24)[:, :16], torch.zeros(N)


@plant("out of bounds", "lies between the rows", _rows)
@triton.jit
def load_from_the_gap_between_rows_kernel(x_ptr, out_ptr, BUG: tl.constexpr):
    offs = tl.arange(0, 16)
    x = tl.load(x_ptr + tl.program_id(0) * (24 - BUG) + offs)  # here
    tl.store(out_ptr + tl.program_id(0) * 16 + offs, x)


@triton.jit
def _load_at(x_ptr, at):
    return tl.load(x_ptr + at)  # here


@plant("out of bounds", "x_ptr", _in_and_out, (1,))
@triton.jit
def load_in_a_called_function_kernel(x_ptr, out_ptr, BUG: tl.constexpr):
    tl.store(out_ptr, _load_at(x_ptr, 64 * BUG))


@plant("out of bounds", r"out_ptr \[64\] int32", lambda: (torch.zeros(N, dtype=torch.int32),))
@triton.jit
def atomic_past_the_end_kernel(out_ptr, BUG: tl.constexpr):
    tl.atomic_add(out_ptr + 16 * (tl.program_id(0) + BUG), 1)  # here


@plant("out of bounds", "tl.gather index 64 in a block of 64", _in_and_out, (1,))
@triton.jit
def gather_index_kernel(x_ptr, out_ptr, BUG: tl.constexpr):
    offs = tl.arange(0, 64)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.gather(x, offs + BUG, 0))  # here


@plant("misaligned", "byte 2 of x_ptr", lambda: (torch.zeros(N).bfloat16(), torch.zeros(N)), (1,))
@triton.jit
def misaligned_load_kernel(x_ptr, out_ptr, BUG: tl.constexpr):
    wide = (x_ptr + BUG).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(wide))  # here


def _rows_far_apart():
    """Two rows 2**31 elements apart: numpy's zeros take no memory until they are touched."""
    memory = torch.from_numpy(np.zeros(2**31 + 64, np.int16)).view(torch.bfloat16)
    return memory.as_strided((2, 64), (2**31, 1)), torch.zeros(N)


@plant(
    "integer overflow",
    "64 of 64 lanes, widen to int64 first",
    lambda: (*_rows_far_apart(), 2**16, 2**15),
    (1,),
    "lane",
)
@triton.jit
def offset_overflow_kernel(x_ptr, out_ptr, pages, page_size, BUG: tl.constexpr):
    offset = pages * page_size  # against
    if not BUG:
        offset = pages.to(tl.int64) * page_size
    x = tl.load(x_ptr + (offset + tl.arange(0, 64)))  # here
    tl.store(out_ptr + tl.arange(0, 64), x)


@plant("integer overflow", "1 of 1 lanes", lambda: (*_rows_far_apart(), 2**30), (1,), "lane")
@triton.jit
def loop_counter_overflow_kernel(x_ptr, out_ptr, half, BUG: tl.constexpr):
    for i in range(2, 3):
        offset = i * half  # against
        if not BUG:
            offset = i.to(tl.int64) * half
        tl.store(out_ptr, tl.load(x_ptr + offset))  # here


# Memory that holds nothing.


def _freed():
    table = torch.zeros(2, dtype=torch.int64)
    alive, gone = torch.ones(3, 5), torch.ones(3, 5)
    table[0], table[1] = alive.data_ptr(), gone.data_ptr()
    _keep[:] = [alive]
    return table, torch.zeros(1)


_keep: list[torch.Tensor] = []


@plant("freed", r"belonged to a tensor \[3, 5\] float32", _freed, (1,))
@triton.jit
def use_after_free_kernel(table_ptr, out_ptr, BUG: tl.constexpr):
    pointer = tl.load(table_ptr + BUG).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(pointer))  # here


@plant("wild", "nearest is .*_ptr .* bytes away", _freed, (1,))
@triton.jit
def wild_pointer_kernel(table_ptr, out_ptr, BUG: tl.constexpr):
    pointer = (tl.load(table_ptr) * (1 - BUG) + 4096 * BUG).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr, tl.load(pointer))  # here


def _workspace():
    return torch.ones(N), torch.empty(N)


@plant("uninitialised", "first byte 64 of work_ptr", _workspace, (1,))
@triton.jit
def load_of_what_nobody_stored_kernel(x_ptr, work_ptr, BUG: tl.constexpr):
    first = tl.arange(0, 16)
    if not BUG:
        tl.store(work_ptr + 16 + first, tl.load(x_ptr + 16 + first))
    tl.store(x_ptr + first, tl.load(work_ptr + 16 + first))  # here


def _counter():
    counter = torch.empty(1, dtype=torch.int32)
    return counter, torch.zeros(1, dtype=torch.int32)


@plant("uninitialised", "an atomic operation on work_ptr", _counter, (1,))
@triton.jit
def atomic_on_unset_counter_kernel(work_ptr, zero_ptr, BUG: tl.constexpr):
    at = work_ptr if BUG else zero_ptr
    tl.atomic_add(at, 1)  # here


# Who writes what.


@plant("overlapping store", "of out_ptr", _one, (1,))
@triton.jit
def lanes_store_to_one_address_kernel(out_ptr, BUG: tl.constexpr):
    offs = tl.arange(0, 64)
    tl.store(out_ptr + offs // (1 + BUG), offs.to(tl.float32))  # here


@plant("race", "of out_ptr", _one, conflict="program")
@triton.jit
def programs_overlap_by_one_kernel(out_ptr, BUG: tl.constexpr):
    offs = tl.program_id(0) * (16 - BUG) + tl.arange(0, 16)
    tl.store(out_ptr + offs, 1.0)  # here # against


@plant("race", "byte 0 of out_ptr", _one, conflict="program")
@triton.jit
def all_programs_store_the_same_value_kernel(out_ptr, BUG: tl.constexpr):
    tl.store(out_ptr, 1.0, mask=(tl.program_id(0) == 0) | (BUG == 1))  # here # against


@plant("race", "of x_ptr", _one, (2,), "program")
@triton.jit
def in_place_shift_between_programs_kernel(x_ptr, BUG: tl.constexpr):
    offs = tl.program_id(0) * 32 + tl.arange(0, 32)
    x = tl.load(x_ptr + (offs + BUG) % 64)  # here # against
    tl.debug_barrier()  # of this program alone
    tl.store(x_ptr + offs, x)  # here # against


def _flags():
    return torch.zeros(N), torch.zeros(1, dtype=torch.int32), torch.zeros(1)


@plant("race", "of partial_ptr", _flags, conflict="program")
@triton.jit
def counter_that_orders_nothing_kernel(partial_ptr, count_ptr, out_ptr, BUG: tl.constexpr):
    tl.store(partial_ptr + tl.program_id(0), 1.0)  # against
    if BUG:
        seen = tl.atomic_add(count_ptr, 1, sem="relaxed")
    else:
        seen = tl.atomic_add(count_ptr, 1, sem="acq_rel")
    if seen == 3:
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + tl.arange(0, 4))))  # here


@plant("race", "of partial_ptr", _flags, conflict="program")
@triton.jit
def store_after_the_release_kernel(partial_ptr, count_ptr, out_ptr, BUG: tl.constexpr):
    if not BUG:
        tl.store(partial_ptr + tl.program_id(0), 1.0)
    seen = tl.atomic_add(count_ptr, 1)
    if BUG:
        tl.store(partial_ptr + tl.program_id(0), 1.0)  # against
    if seen == 3:
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + tl.arange(0, 4))))  # here


@plant("race", "of out_ptr", lambda: (torch.zeros(1),), conflict="program")
@triton.jit
def plain_and_atomic_kernel(out_ptr, BUG: tl.constexpr):
    if BUG and tl.program_id(0) == 2:
        tl.store(out_ptr, 0.0)  # here # against
    tl.atomic_add(out_ptr, 1.0, sem="relaxed")  # here # against


@plant("race", "of out_ptr", lambda: (torch.zeros(1),), conflict="program")
@triton.jit
def sum_without_atomics_kernel(out_ptr, BUG: tl.constexpr):
    if BUG:
        tl.store(out_ptr, tl.load(out_ptr) + 1.0)  # here # against
    else:
        tl.atomic_add(out_ptr, 1.0)


@plant("unsynchronised", "of x_ptr", _in_and_out, (1,), "lane")
@triton.jit
def read_back_without_a_barrier_kernel(x_ptr, out_ptr, BUG: tl.constexpr):
    offs = tl.arange(0, 64)
    tl.store(x_ptr + offs, offs.to(tl.float32))  # against
    if not BUG:
        tl.debug_barrier()
    tl.store(out_ptr + offs, tl.load(x_ptr + 63 - offs))  # here


@plant("unsynchronised", "of x_ptr", _one, (1,), "lane")
@triton.jit
def in_place_rotation_kernel(x_ptr, BUG: tl.constexpr):
    offs = tl.arange(0, 64)
    partner = tl.load(x_ptr + (offs ^ 1))  # against
    if not BUG:
        tl.debug_barrier()
    tl.store(x_ptr + offs, partner)  # here


# Promises and waiting.


@plant("false hint", r"tl.multiple_of\(\[16\]\) of 17", lambda: (torch.zeros(N), 17), (1,))
@triton.jit
def false_divisibility_kernel(out_ptr, stride, BUG: tl.constexpr):
    stride = stride - (1 - BUG)
    stride = tl.multiple_of(stride, 16)  # here
    tl.store(out_ptr + stride, 1.0)


@plant("false hint", r"tl.max_contiguous\(\[64\]\)", _one, (1,))
@triton.jit
def false_contiguity_kernel(out_ptr, BUG: tl.constexpr):
    offs = (tl.arange(0, 64) + BUG) % 64
    tl.store(out_ptr + tl.max_contiguous(offs, 64), 1.0)  # here


@plant("false hint", "tl.assume", lambda: (torch.zeros(N), 0), (1,))
@triton.jit
def false_assumption_kernel(out_ptr, n, BUG: tl.constexpr):
    tl.assume(n >= BUG)  # here
    tl.store(out_ptr, 1.0)


@plant("failed assertion", "n must be positive", lambda: (torch.zeros(N), 0), (1,))
@triton.jit
def device_assert_kernel(out_ptr, n, BUG: tl.constexpr):
    tl.device_assert(n >= BUG, "n must be positive")  # here
    tl.store(out_ptr, 1.0)


@plant("waits forever", "programs here run one by one", lambda: (torch.zeros(1).int(),), (1,))
@triton.jit
def spin_on_a_later_program_kernel(flag_ptr, BUG: tl.constexpr):
    if not BUG:
        tl.atomic_xchg(flag_ptr, 1)
    while tl.atomic_cas(flag_ptr, 1, 0) == 0:  # here
        pass


def _lines(kernel, mark):
    """Absolute line numbers of a mark, in a kernel or in what it calls."""
    found = set()
    for function in (kernel.fn, _load_at.fn):
        lines, first = inspect.getsourcelines(function)
        found |= {first + i for i, line in enumerate(lines) if mark in line}
        if found:
            break
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_planted_bug_is_reported(planted, seed):
    with interpreted(seed=seed) as report:
        arguments = planted.arguments()
        with pytest.raises(KernelFault, match=planted.message) as caught:
            planted.kernel[planted.grid](*arguments, BUG=1)
    fault = caught.value
    assert fault.kind == planted.kind
    assert str(fault).startswith(f"{planted.kind}: {planted.kernel.__name__}(")
    assert fault.where.file == __file__
    assert fault.where.line in _lines(planted.kernel, "# here")
    assert report.faults == [fault] or planted.kind == "waits forever"
    if planted.conflict:
        assert fault.other is not None
        assert f"against {fault.other}" in str(fault)
        assert fault.other.line in _lines(planted.kernel, "# against")
        assert (fault.other.program != fault.where.program) == (planted.conflict == "program")
    else:
        assert fault.other is None


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_kernel_without_the_bug_runs_clean(planted, seed):
    with interpreted(seed=seed) as report:
        planted.kernel[planted.grid](*planted.arguments(), BUG=0)
    assert report.faults == []


def test_every_kind_of_fault_is_planted():
    assert {planted.kind for planted in PLANTED} == set(FAULTS)


def test_masked_lanes_hold_poison_of_their_type():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x, out = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
        with interpreted():
            masked_kernel[(1,)](x, out)
        assert out.isnan().tolist() == [False] * 4 + [True] * 4
    for dtype, poison in ((torch.int32, 0x5A5A5A5A), (torch.int8, 0x5A), (torch.bool, 1)):
        x, out = torch.zeros(8, dtype=dtype), torch.zeros(8, dtype=dtype)
        with interpreted():
            masked_kernel[(1,)](x, out)
        assert out.tolist() == [0] * 4 + [poison] * 4


@triton.jit
def masked_kernel(x_ptr, out_ptr):
    offs = tl.arange(0, 8)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < 4))


@triton.jit
def half_kernel(out_ptr):
    tl.store(out_ptr + tl.arange(0, 32), 1.0)


def test_what_a_kernel_leaves_unwritten_is_counted_and_is_nan():
    out = torch.empty(N)
    with interpreted(uninitialised=(out, None)) as report:
        half_kernel[(1,)](out)
        assert report.unwritten(out) == 4 * 32
        assert out[32:].isnan().all()
        out[32:40] = 5.0  # torch may finish the work
        assert report.unwritten(out) == 4 * 24
        assert report.unwritten(torch.zeros(1)) == 0


def test_keep_going_collects_each_pair_of_lines_once():
    with interpreted(keep_going=True) as report:
        x = torch.ones(N)
        programs_overlap_by_one_kernel[(4,)](x, BUG=1)
        load_one_past_the_end_kernel[(1,)](x, out := torch.zeros(N), BUG=1)
        load_one_past_the_end_kernel[(1,)](x, out, BUG=1)
    assert report.kinds() == ["race", "out of bounds"]
    assert len(report.faults) == 2
    assert out[:-1].eq(1).all()
    assert out[-1].isnan()


def test_bounds_of_the_storage_allow_what_lies_behind_a_view():
    memory = torch.arange(2.0 * N)
    with interpreted(bounds="storage"):
        load_from_the_next_tensor_kernel[(1,)](memory[:N], out := torch.zeros(N), BUG=1)
    assert torch.equal(out, memory[N:])
    with interpreted(bounds="storage"), pytest.raises(KernelFault, match="out of bounds"):
        load_from_the_next_tensor_kernel[(1,)](memory[N:], out, BUG=1)
    with pytest.raises(ValueError, match="bounds must be"), interpreted(bounds="page"):
        pass


def test_a_kind_that_is_ignored_is_passed_over():
    with interpreted(ignore=["race"]) as report:
        programs_overlap_by_one_kernel[(4,)](torch.ones(N), BUG=1)
        with pytest.raises(KernelFault, match="overlapping store"):
            lanes_store_to_one_address_kernel[(1,)](torch.ones(N), BUG=1)
    assert report.kinds() == ["overlapping store"]
    with (
        pytest.raises(ValueError, match="unknown kind of fault 'rice'"),
        interpreted(ignore=["rice"]),
    ):
        pass


def test_without_checks_bounds_remain():
    with interpreted(checks=False) as report:
        x = torch.ones(N)
        programs_overlap_by_one_kernel[(4,)](x, BUG=1)
        assert report.faults == []
        with pytest.raises(KernelFault, match="out of bounds"):
            load_one_past_the_end_kernel[(1,)](x, x, BUG=1)


def test_a_freed_storage_under_a_live_tensor_is_empty():
    x = torch.ones(N)
    x.untyped_storage().resize_(0)
    with interpreted(), pytest.raises(KernelFault, match="out of bounds"):
        load_before_the_start_kernel[(1,)](x, torch.zeros(N), BUG=0)


def test_launches_are_ordered_one_after_the_other():
    x = torch.ones(N)
    with interpreted() as report:
        for _ in range(3):
            half_kernel[(1,)](x)
            in_place_shift_between_programs_kernel[(2,)](x, BUG=0)
    assert report.faults == []
    assert [launch.stored_bytes for launch in report.launches] == [128, 256] * 3
