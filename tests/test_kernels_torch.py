"""The Triton kernels behind PyTorch's own machinery: opcheck, whole-graph compilation, refusals
that say what to do; and launches of both languages that a CUDA graph can record."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from op_calls import Requests, call, clone, op_args, tensors
from torch._dynamo.backends.debugging import aot_eager

import kimi_ops
from kimi_ops._backends import GPU_BACKENDS, has_kernel, simulated
from kimi_ops._dispatch import BackendError, get_op
from kimi_ops.testing import cases

triton = pytest.importorskip("triton", reason="needs triton: pip install 'triton>=3.4'")

from kimi_ops._target import targeting  # noqa: E402
from kimi_ops.cuda._launcher import use_launcher  # noqa: E402
from kimi_ops.testing.runner import target_of  # noqa: E402
from kimi_ops.testing.ways import ways_of, with_way  # noqa: E402

OPS = [op for op in kimi_ops.op_names() if has_kernel(op, "triton")]


def _args(op, size):
    return op_args(op, size, torch.bfloat16)


@contextlib.contextmanager
def _interpreted(op):
    """The op's calls run its Triton kernels in the interpreter, which needs no compiler."""
    (way,) = (way for way in ways_of(op) if way.name == "triton[interpreted]")
    with with_way(op, way) as backend, kimi_ops.use_backend(f"{op}={backend}"):
        yield


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    with _interpreted(op):
        result = torch.library.opcheck(get_op(op).overload, _args(op, 3))
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_with_dynamic_shapes(op):
    torch._dynamo.reset()
    size, compiled_for = 5, []

    def keep(graph, inputs):
        compiled_for.append(size)
        return aot_eager(graph, inputs)

    compiled = torch.compile(
        lambda *args: call(op, args), backend=keep, fullgraph=True, dynamic=True
    )
    with _interpreted(op):
        for size in (5, 3):
            args = _args(op, size)
            eager, traced = clone(args), clone(args)
            result = tensors(compiled(*traced))
        expected = tensors(call(op, eager))
    for a, b in zip((*expected, *eager), (*result, *traced), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    # More than once at the first size: torch starts again where it finds float arguments.
    assert set(compiled_for) == {5}


# What torch may be asked for in a launch: allocations without content, fills, copies on the device.
# A CUDA graph records all of these, and none of them waits.
RECORDABLE = {
    "empty", "new_empty", "empty_like", "zeros", "zero_", "fill_", "clone", "copy_", "_to_copy",
}  # fmt: skip


class _Launches:
    """Takes CUDA C++ launches and runs none."""

    def __init__(self, launched):
        self._launched = launched

    def launch(self, source, name, grid, block, args, *, shared_bytes=0):
        plain = [a for a in args if not isinstance(a, torch.Tensor)]
        self._launched.append((name, tuple(grid), (*block, shared_bytes, *plain)))


def _record(op, language, args):
    """What a launch asks for, of torch and of the device: kernel, grid, and all that is no tensor.

    No kernel runs.
    """
    contract, launched = get_op(op), []

    def run(kernel, *positional, grid, warmup, **named):
        assert not positional
        assert not warmup
        plain = {n: v for n, v in named.items() if not isinstance(v, torch.Tensor)}
        launched.append((kernel.__name__, tuple(grid), plain))

    with simulated(language):
        module = contract.load(language)
        outputs = contract.outputs(*args)
        with (
            mock.patch.object(triton.runtime.jit.JITFunction, "run", run),
            use_launcher(_Launches(launched)),
            Requests() as requests,
        ):
            module.launch(outputs, *args)
    return launched, {function.overloadpacket.__name__ for function in requests.made}


def _without_storage(x):
    """The same shape, strides and offset, and no values."""
    count = x.untyped_storage().nbytes() // x.element_size()
    whole = torch.empty(count, dtype=x.dtype, device="meta")
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("op", "language"),
    [
        pytest.param(op, language, id=f"{op}-{language}")
        for op in kimi_ops.op_names()
        for language in GPU_BACKENDS
        if has_kernel(op, language)
    ],
)
def test_launch_reads_nothing_from_the_device(op, language, arch):
    """Tensors without storage raise where they are read; and what is launched is the same."""
    for case in cases(op):
        args = case.args()
        bare = tuple(_without_storage(a) if isinstance(a, torch.Tensor) else a for a in args)
        with targeting(target_of(arch)), simulated(language):
            if get_op(op).load(language).unsupported(*args) is not None:
                continue
            launched, requests = _record(op, language, bare)
            assert launched == _record(op, language, args)[0], case
        assert requests <= RECORDABLE, case
        assert all(1 <= n < 2**31 for _, grid, _ in launched for n in grid), case


@pytest.mark.parametrize("op", OPS)
def test_on_the_cpu_the_error_says_how_to_run_it(op):
    with kimi_ops.use_backend(f"{op}=triton"), pytest.raises(BackendError) as error:
        call(op, _args(op, 3))
    message = str(error.value)
    assert message.startswith(f"{op}: backend 'triton' was chosen explicitly but cannot run: ")
    assert "run on a GPU, the tensors are on cpu" in message
    assert "kimi_ops.testing.runner.emulated()" in message
    assert "kimi_ops.testing.triton_interpreter.interpreted()" in message


@pytest.mark.parametrize("op", [op for op in OPS if op != "moe_sort"])
def test_float64_is_refused_by_name(op):
    args = op_args(op, 3, torch.float64)
    if op == "moe_select":
        args = (args[0].double(), *args[1:])
    with targeting(target_of(80)), simulated("triton"):
        reason = get_op(op).why_not("triton", args)
    assert "float64" in reason, reason
    assert op in reason or "Triton" in reason, reason
