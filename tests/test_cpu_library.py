"""The CPU library as a whole: instruction sets, threads, batches, memory-mapped weights."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from op_calls import op_args
from test_kernels_schedules import BATCHES

import kimi_ops
from kimi_ops import _native
from kimi_ops._backends import has_kernel
from kimi_ops._dispatch import get_op
from kimi_ops.testing import cases
from kimi_ops.testing.check import as_tuple, bitwise_equal, copied

if _native.missing():
    pytest.skip(f"no CPU library: {_native.missing()}", allow_module_level=True)

OPS = [op for op in kimi_ops.op_names() if has_kernel(op, "cpu")]
BF16 = torch.bfloat16


@pytest.fixture(params=_native.cpu_isas())
def isa(request):
    with _native.using_isa(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _results(op, args):
    """Outputs and written arguments of the CPU backend."""
    contract, mine = get_op(op), copied(args, "cpu")
    with kimi_ops.use_backend(f"{op}=cpu"):
        outputs = as_tuple(contract.overload(*mine))
    return (*outputs, *(mine[contract.params.index(name)] for name in contract.mutates))


def test_every_op_has_a_cpu_backend():
    assert tuple(OPS) == kimi_ops.op_names()


def test_every_declaration_is_an_entry_with_every_instruction_set():
    for op, parameters in _native.parameters().items():
        assert len({name for _, name in parameters}) == len(parameters)
        for isa in _native.cpu_isas():
            found = tuple(name for name, _ in _native._entry(op, isa).arguments)
            assert found == tuple(name for _, name in parameters)


def test_a_watcher_is_told_what_was_written_and_nothing_else():
    args = op_args("add_rms_norm", 4, BF16)
    told = []
    with _native.watching(told.append), kimi_ops.use_backend("add_rms_norm=cpu"):
        outputs = kimi_ops.add_rms_norm(*args)
    assert [t.data_ptr() for t in told] == [t.data_ptr() for t in outputs]
    with kimi_ops.use_backend("add_rms_norm=cpu"):
        kimi_ops.add_rms_norm(*args)
    assert len(told) == 2


@pytest.mark.parametrize("op", OPS)
def test_results_do_not_depend_on_the_number_of_threads(op, isa, threads):
    args = op_args(op, 37, BF16) if op != "moe_sort" else op_args(op, 37)
    threads(1)
    one = _results(op, args)
    for number in (2, 3, 7):
        threads(number)
        for mine, other in zip(_results(op, args), one, strict=True):
            assert bitwise_equal(mine, other), f"{number} threads"


@pytest.mark.parametrize("op", ["mla_decode", "moe_experts_int4"])
def test_a_hundred_runs_are_one(op, threads):
    """On changing numbers of threads, each time."""
    name = {"mla_decode": "bf16-h64", "moe_experts_int4": "bf16-129"}[op]
    args = next(case for case in cases(op) if case.name == name).args()
    first = _results(op, args)
    for run in range(100):
        threads(1 + run % 4)
        for mine, other in zip(_results(op, args), first, strict=True):
            assert bitwise_equal(mine, other), f"run {run}"


@pytest.mark.parametrize("op", sorted(BATCHES))
def test_batch_invariant_mode_is_blind_to_the_rest_of_the_batch(op, isa, threads):
    build, part, count = BATCHES[op]
    args = build(torch.Generator().manual_seed(7))
    middle = count // 2
    with kimi_ops.batch_invariant():
        whole = _results(op, args)
        for i, j in ((middle, middle + 1), (middle - 1, count), (0, 1), (count - 1, count)):
            chosen, places = part(args, i, j)
            found = _results(op, chosen)
            if op == "mla_latent_write":
                found = found[:1]
            for mine, all_, place in zip(found, whole, places, strict=False):
                assert bitwise_equal(mine, all_[place]), f"members {i} to {j}"


def _run_python(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_environment_forces_a_lower_instruction_set():
    lowest = _native.cpu_isas()[-1]
    code = "from kimi_ops import _native; print(_native.cpu_isa())"
    assert _run_python(code, KIMI_OPS_CPU_ISA=lowest).stdout.strip() == lowest


def test_instruction_set_that_the_host_has_not_is_an_error_that_lists_those_it_has():
    code = "import torch, kimi_ops; kimi_ops.silu_mul(torch.ones(2, 4))"
    result = _run_python(code, KIMI_OPS_CPU_ISA="avx1024")
    assert result.returncode != 0
    isas = ", ".join(_native.cpu_isas())
    wanted = f"KIMI_OPS_CPU_ISA: 'avx1024' does not run here; there are {isas}"
    assert wanted in result.stderr


def test_call_with_other_arguments_than_the_header_states_is_an_error():
    with pytest.raises(TypeError, match=r"rms_norm: takes dtype, y, x, .*; got y"):
        _native.call("rms_norm", y=torch.empty(1))


def test_threads_are_those_of_torch():
    """One pool: torch's OpenMP runs the tasks of the library."""
    assert _native.shares_torch_threads()


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_work_from_a_memory_mapped_file(tokens, tmp_path, isa):
    """Weights of a file that is only readable, as safetensors maps it."""
    args = list(op_args("moe_experts_int4", tokens, BF16))
    expected = _results("moe_experts_int4", args)[0]
    for place in (1, 2, 3, 4):
        weights = args[place].contiguous()
        path = tmp_path / f"{place}.bin"
        path.write_bytes(weights.view(torch.uint8).numpy().tobytes())
        mapped = torch.from_file(str(path), shared=False, size=weights.numel(), dtype=weights.dtype)
        args[place] = mapped.view(weights.shape)
    with kimi_ops.use_backend("moe_experts_int4=cpu"):
        assert bitwise_equal(kimi_ops.moe_experts_int4(*args[:7], shared_gate_up=args[7],
                                                       shared_down=args[8]), expected)  # fmt: skip


def test_int4_linear_without_columns_is_zero():
    packed, scale = torch.ones((3, 0), dtype=torch.int32), torch.ones((3, 0), dtype=BF16)
    with kimi_ops.use_backend("int4_linear=cpu"):
        assert kimi_ops.int4_linear(torch.ones((2, 0), dtype=BF16), packed, scale).eq(0).all()
