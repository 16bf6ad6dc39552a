"""Which ops have gradients, and calls of them that can be differentiated."""

from __future__ import annotations

import torch
from op_calls import call, tensors

import kimi_ops
from kimi_ops import _autograd
from kimi_ops._dispatch import get_op

GRADIENTS = {op: _autograd.load_gradient(op) for op in kimi_ops.op_names()}
WITH = [op for op, module in GRADIENTS.items() if module]
WITHOUT = [op for op, module in GRADIENTS.items() if not module]


def differentiable(op, args, run=None):
    """``f(*inputs)``, the floating results of the op as a function of the arguments that have a
    gradient, and those arguments, requiring one."""
    contract = get_op(op)
    run = run or (lambda *args: call(op, args))
    places = [
        i
        for i, (name, a) in enumerate(zip(contract.params, args, strict=True))
        if name in GRADIENTS[op].GRADIENTS and a is not None
    ]

    def f(*inputs):
        now = list(args)
        for i, x in zip(places, inputs, strict=True):
            now[i] = x * 1 if contract.mutates else x  # a leaf cannot be written
        result = run(*now)
        if contract.mutates and result is None:
            result = now[places[0]]
        return tuple(r for r in tensors(result) if r.is_floating_point())

    return f, [args[i].detach().clone().requires_grad_() for i in places]


def gradients(f, inputs, seed=5):
    """Gradients of a random projection of the results of ``f``, from gradients with the dimensions
    in memory the other way round."""
    results = f(*inputs)
    g = torch.Generator().manual_seed(seed)
    grads = [torch.randn(r.shape[::-1], generator=g).bfloat16().to(r.dtype) for r in results]
    grads = [x.permute(*reversed(range(x.dim()))) for x in grads]
    return torch.autograd.grad(results, inputs, grads)
