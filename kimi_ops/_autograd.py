"""What an op does where gradients are wanted: its implementation at torch's Autograd key.

An op that has a gradient has a module `kimi_ops/autograd/<op>.py`, found by its name. Its protocol
is that of `torch.library.register_autograd`, with names instead of positions::

    GRADIENTS = ("x", "weight")       # the arguments that have one
    CONSTANTS = ("bias",)             # optional: arguments that may require grad and get None
    def save(ctx, inputs, outputs):   # keeps what backward needs; inputs: all arguments
    def backward(ctx, *grads):        # {argument: gradient}; ctx.wanted names those in demand

`torch.library.register_autograd` itself is not used: its wrapper, in Python, stands in front of
every call and enters the dispatcher a second time. `rms_norm` of one small row takes 12.0 us with
it and 8.4 with `kernel`, also where nothing requires grad. There torch passes the keys of the call,
and where plain CPU or CUDA tensors are all that is left below Autograd, the op's own implementation
is called right away.

An argument that requires grad and has no gradient is an error, and so is a second derivative.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

_KEYS = torch._C.DispatchKey
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
# The keys of a call with nothing between Autograd and the device: no mode, subclass or transform.
_PLAIN = frozenset(
    torch._C.DispatchKeySet(device).add(autograd).raw_repr()
    for device, autograd in ((_KEYS.CPU, _KEYS.AutogradCPU), (_KEYS.CUDA, _KEYS.AutogradCUDA))
)


class _Op(Protocol):
    """What this file knows of an op (`kimi_ops._dispatch.Op`)."""

    name: str
    params: tuple[str, ...]
    mutates: tuple[str, ...]
    overload: Any

    def _complete(self, args: tuple[Any, ...]) -> tuple[Any, ...]: ...


def load_gradient(op: str) -> Any:
    """The module of an op's gradient, None for an op without one."""
    name = f"kimi_ops.autograd.{op}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def kernel(op: _Op, run: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an op at the Autograd key; ``run`` is that at CPU and CUDA."""
    gradient = load_gradient(op.name)
    function: Any = _function(op, gradient) if gradient else None
    written = op.params.index(op.mutates[0]) if op.mutates else None
    grad_enabled, any_requires_grad = torch.is_grad_enabled, torch._C._any_requires_grad

    def at_autograd(keys: Any, *args: Any) -> Any:
        if grad_enabled() and any_requires_grad(*args):
            args = op._complete(args)
            _refuse(op, gradient, args)
            outputs = function.apply(*args)
            return None if op.mutates else outputs
        if keys.raw_repr() in _PLAIN:
            if written is not None and grad_enabled() and not args[written].is_inference():
                # Another operation may have saved it for its own gradient: torch shall see that.
                torch.autograd.graph.increment_version(args[written])
            return run(*args)
        return _below(op, keys, args)

    return at_autograd


def _below(op: _Op, keys: Any, args: tuple[Any, ...]) -> Any:
    """The call handed on to what lies below Autograd: fake tensors, modes, other devices."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.overload.redispatch(keys & _AFTER_AUTOGRAD, *args)


def _refuse(op: _Op, gradient: Any, args: tuple[Any, ...]) -> None:
    """A gradient that would be missing or silently wrong becomes an error."""
    known = (*gradient.GRADIENTS, *getattr(gradient, "CONSTANTS", ())) if gradient else ()
    for name, arg in zip(op.params, args, strict=True):
        if isinstance(arg, Tensor) and arg.requires_grad and name not in known:
            lacks = f"gradient for it, only for {', '.join(known)}" if known else "backward"
            remedy = f"detach {name}, or " if known else ""
            raise RuntimeError(
                f"{op.name}: {name} requires grad, but the op has no {lacks}; "
                f"{remedy}call it under torch.no_grad() or torch.inference_mode()"
            )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{op.name}: torch.func cannot differentiate the op; use torch.autograd")


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Backward keeps its dtypes also where it is called inside autocast."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class _FirstDerivative(torch.autograd.Function):
    """A gradient as it is, and an error where it is differentiated in turn.

    torch's `once_differentiable` leaves it detached if the gradient that came in is a constant.
    """

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{ctx.op}: the op has no second derivative")


def _function(op: _Op, gradient: Any) -> Any:
    """The op as a `torch.autograd.Function` of all its arguments."""
    written = op.params.index(op.mutates[0]) if op.mutates else None

    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op.overload(*args)
        # An op that writes returns nothing; its result, for torch, is the argument it wrote.
        return outputs if written is None else args[written]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        if written is not None:
            ctx.mark_dirty(inputs[written])
        gradient.save(ctx, inputs, outputs)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        demand = zip(op.params, ctx.needs_input_grad, strict=True)
        ctx.wanted = frozenset(name for name, wanted in demand if wanted)
        with torch.no_grad(), _no_autocast(grads[0].device.type):
            found: Mapping[str, Tensor] = gradient.backward(ctx, *grads)
        found = {name: d for name, d in found.items() if name in ctx.wanted}
        if torch.is_grad_enabled():  # create_graph=True
            once: Any = _FirstDerivative.apply
            sources = (*ctx.saved_tensors, *grads)
            found = {name: once(op.name, d, *sources) for name, d in found.items()}
        return tuple(map(found.get, op.params))

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    return type(op.name, (torch.autograd.Function,), members)
