"""Makes ``triton.language`` call our builder, for as long as a launch runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.language.semantic import TritonSemantic

from kimi_ops.testing.triton_interpreter import reduction
from kimi_ops.testing.triton_interpreter.arithmetic import handle
from kimi_ops.testing.triton_interpreter.builder import Builder
from kimi_ops.testing.triton_interpreter.faults import UnsupportedByInterpreter

_MISSING = object()


class Patches:
    """Attributes set for a while; `undo` puts every one of them back.

    Attributes:
        replaced: by the id of what was replaced, what is there now.
    """

    def __init__(self) -> None:
        self.replaced: dict[int, Any] = {}
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of a module or class."""
        own = vars(owner).get(name, _MISSING)
        self._undo.append((owner, name, own))
        if isinstance(owner, ModuleType) and own is not _MISSING:
            self.replaced[id(own)] = value
        setattr(owner, name, value)

    def undo(self) -> None:
        """Puts back what was there, the last change first."""
        while self._undo:
            owner, name, own = self._undo.pop()
            if own is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def unwrap(value: Any) -> Any:
    """The Python value of a tl.constexpr, or the value itself."""
    return value.value if isinstance(value, tl.constexpr) else value


def _index(value: Any) -> int:
    value = unwrap(value)
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)


def tensor_range(*bounds: Any, **_: Any) -> Iterator[Any]:
    """``range`` and ``tl.range`` of a kernel: counts in int32, or in int64 if a bound is."""
    wide = any(isinstance(b, tl.tensor) and b.dtype.primitive_bitwidth > 32 for b in bounds)
    dtype, storage = (tl.int64, np.int64) if wide else (tl.int32, np.int32)
    for i in range(*map(_index, bounds)):
        yield tl.tensor(handle(np.array([i], storage), dtype), dtype)


def logic(name: str, left: Any, right: Callable[[], Any]) -> Any:
    """``left and right()`` or ``left or right()``; of a tensor, element by element."""
    if isinstance(left, tl.tensor):
        return getattr(left, name)(right())
    taken = unwrap(left) if name == "logical_and" else not unwrap(left)
    return right() if taken else left


def negate(value: Any) -> Any:
    """``not value``; of a tensor, element by element."""
    return value.__not__() if isinstance(value, tl.tensor) else not unwrap(value)


def _tl_range(
    arg1: Any, arg2: Any = None, step: Any = None, _semantic: Any = None, **hints: Any
) -> Iterator[Any]:
    bounds = (0, arg1) if arg2 is None else (arg1, arg2)
    return tensor_range(*bounds, 1 if step is None else step)


def _static_range(arg1: Any, arg2: Any = None, step: Any = None, **_: Any) -> range:
    start, stop = (0, arg1) if arg2 is None else (arg1, arg2)
    return range(_index(start), _index(stop), 1 if step is None else _index(step))


def _static_assert(condition: Any, message: Any = "", **_: Any) -> None:
    if not unwrap(condition):
        raise AssertionError(f"tl.static_assert: {unwrap(message)}")


def _bool(self: Any) -> bool:
    data = self.handle.data
    if data.size == 1:
        return bool(data.item())
    # Triton's own code asks "is there a mask?" this way; a kernel that does has no answer.
    asker = inspect.currentframe()
    assert asker is not None
    assert asker.f_back is not None
    if asker.f_back.f_globals.get("__name__", "").startswith("triton."):
        return True
    raise ValueError(f"the truth of a block of shape {list(data.shape)}: only scalars have one")


def _transposed(self: Any) -> Any:
    if len(self.shape) != 2:
        raise ValueError(f".T of a tensor of {len(self.shape)} dimensions")
    return tl.trans(self)


def _hint(builder: Builder, name: str) -> Callable[..., Any]:
    def hint(tensor: Any, values: Any, _semantic: Any = None) -> Any:
        values = [_index(v) for v in (values if isinstance(values, list | tuple) else [values])]
        if isinstance(tensor, tl.tensor) and tensor.dtype.is_int():
            builder.check_hint(name, tensor.handle.data, values)
        return tensor

    return hint


def _refuse(builder: Builder, name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedByInterpreter(f"tl.{name} at {builder.machine.place()}")

    return refuse


def _forward(member: Callable[..., Any], semantic: TritonSemantic) -> Callable[..., Any]:
    def builtin(*args: Any, **named: Any) -> Any:
        named.pop("_generator", None)
        return member(*args, **{**named, "_semantic": semantic})

    return builtin


def patch(patches: Patches, builder: Builder, call: Callable[..., Any]) -> None:
    """Points the language at a builder.

    Args:
        patches: undo it with this.
        builder: executes the operations.
        call: ``call(jit_function, *args)`` runs a jit'd function.
    """
    semantic = TritonSemantic(builder)
    owners = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base, cuda_libdevice)
    for owner in owners:
        for name, member in inspect.getmembers(owner):
            if tl.core.is_builtin(member):
                patches.set(owner, name, _forward(member, semantic))
    # The generic libdevice is a list of names for which the compiler picks the target's functions.
    for name, _ in inspect.getmembers(libdevice, inspect.isfunction):
        if (member := getattr(cuda_libdevice, name, None)) is not None:
            patches.set(libdevice, name, member)

    def new_reduce(
        inputs: Any, axis: Any, combine_fn: Any, keep_dims: Any = False, **_: Any
    ) -> Any:
        return reduction.reduce(call, inputs, unwrap(axis), combine_fn, bool(unwrap(keep_dims)))

    def new_scan(inputs: Any, axis: Any, combine_fn: Any, reverse: Any = False, **_: Any) -> Any:
        return reduction.scan(call, inputs, unwrap(axis), combine_fn, bool(unwrap(reverse)))

    for owner in (tl, tl.core):
        patches.set(owner, "range", _tl_range)
        patches.set(owner, "static_range", _static_range)
        patches.set(owner, "static_assert", _static_assert)
        patches.set(owner, "static_print", lambda *values, **_: print(*values))
        patches.set(owner, "multiple_of", _hint(builder, "multiple_of"))
        patches.set(owner, "max_contiguous", _hint(builder, "max_contiguous"))
        # Both need more of the compiler than a builder: their arguments are its own objects.
        for name in ("dot_scaled", "map_elementwise"):
            patches.set(owner, name, _refuse(builder, name))
        patches.set(owner, "max_constancy", lambda tensor, values, **_: tensor)
    for owner in (tl, tl.core, tl.tensor):
        patches.set(owner, "reduce", new_reduce)
        patches.set(owner, "associative_scan", new_scan)
    # Signed and unsigned differ in numpy, so a type stands for itself, not for an MLIR type.
    patches.set(tl.dtype, "to_ir", lambda self, builder: self)
    patches.set(tl.tensor, "__index__", _index)
    patches.set(tl.tensor, "__bool__", _bool)
    patches.set(tl.tensor, "__repr__", lambda self: repr(self.handle.data))
    patches.set(tl.tensor, "__str__", lambda self: str(self.handle.data))
    patches.set(tl.tensor, "T", property(_transposed))
