"""The promises that every op makes to PyTorch: opcheck, fullgraph compilation, honest fakes."""

from __future__ import annotations

import inspect

import pytest
import torch
from op_calls import call, clone, op_args, tensors
from torch._subclasses.fake_tensor import FakeTensorMode

import kimi_ops
from kimi_ops._dispatch import get_op
from kimi_ops.testing import cases

OPS = kimi_ops.op_names()


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    result = torch.library.opcheck(get_op(op).overload, op_args(op, 5))
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_with_dynamic_shapes(op):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def function(*args):
        return call(op, args)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    counting = torch.compile(function, backend=keep, fullgraph=True, dynamic=True)
    for size in (5, 9, 7):  # odd: grids and positions of even ones are int32
        args = op_args(op, size)
        eager, traced, counted = clone(args), clone(args), clone(args)
        expected, result = tensors(call(op, eager)), tensors(compiled(*traced))
        counting(*counted)
        for a, b in zip((*expected, *eager), (*result, *traced), strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    # One graph serves every size, up to a size in a Python list (grids, lengths) that torch burns
    # in because an int argument of the op follows from it.
    assert len(graphs) == 1, f"{op} was compiled {len(graphs)} times"


@pytest.mark.parametrize("op", OPS)
def test_fake_equals_real(op):
    for case in cases(op)[::4]:
        args = case.args()
        real = tensors(get_op(op).overload(*clone(args)))
        with FakeTensorMode() as mode:
            fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = tensors(get_op(op).overload(*fake_args))
        assert len(real) == len(fake)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride(), r.device) == (
                f.shape,
                f.dtype,
                f.stride(),
                f.device,
            )
            assert r.is_contiguous()


@pytest.mark.parametrize("op", OPS)
def test_public_function_and_schema_agree(op):
    """Same argument names, order and defaults; torch.ops users get the defaults too."""
    signature = inspect.signature(getattr(kimi_ops, op))
    contract = get_op(op)
    assert tuple(signature.parameters) == contract.params
    for parameter, default in zip(signature.parameters.values(), contract.defaults, strict=True):
        expected = inspect.Parameter.empty if default is None else default
        if parameter.default is not None:
            assert parameter.default == expected, parameter.name
    args = cases(op)[0].args()
    required = [p for p in signature.parameters.values() if p.default is inspect.Parameter.empty]
    short = contract.overload(*clone(args)[: len(required)])
    assert len(tensors(short)) == len(contract.overload._schema.returns)


@pytest.mark.parametrize("op", OPS)
def test_written_arguments_are_declared(op):
    args = op_args(op, 5)
    after = clone(args)
    call(op, after)
    contract = get_op(op)
    changed = {
        name
        for name, a, b in zip(contract.params, args, after, strict=True)
        if isinstance(a, torch.Tensor) and not torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    }
    assert changed == set(contract.mutates)


def test_compiles_with_a_length_that_the_trace_does_not_know():
    """`merged_length` from `.item()`, the natural way to get it."""

    def merge(x, grid, *norms):
        merged = (grid[:, 1] * grid[:, 2] // 4).sum().item()
        return kimi_ops.patch_merge(x, grid, merged, *norms, 1e-5)

    x, grid, _, *norms, _ = op_args("patch_merge", 5)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")(x, grid, *norms)
    assert torch.equal(compiled, merge(x, grid, *norms))


def test_inductor_runs_a_block_of_ops():
    def block(x, residual, weight, packed, scale):
        y, h = kimi_ops.add_rms_norm(x, residual, weight, 1e-5)
        return kimi_ops.silu_mul(kimi_ops.int4_linear(y * 2, packed, scale)) + h[..., :20]

    x, weight = torch.randn(3, 64), torch.randn(64)
    packed, scale = op_args("int4_linear", 3)[1:]
    args = (x, x.flip(0), weight, packed, scale)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(*args), block(*args))
