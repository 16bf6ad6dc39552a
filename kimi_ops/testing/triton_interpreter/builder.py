"""The operations that a kernel's line turns into: memory, shapes, hints; arithmetic is inherited.

Triton's semantic layer calls ``create_*`` of a builder. Ours derives from the interpreter's, and
every operation of that one is either replaced, or listed in `REVIEWED` as right for every type, or
refused by name. So what a later Triton adds is never executed unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock

from kimi_ops.testing.triton_interpreter.arithmetic import (
    OVERFLOWED,
    Arithmetic,
    Handle,
    handle,
    numpy_type,
)
from kimi_ops.testing.triton_interpreter.faults import UnsupportedByInterpreter
from kimi_ops.testing.triton_interpreter.numerics import Array, narrow, poison, widen

# Operations of Triton's builder that move or count elements, or start something, and never look
# at a value.
REVIEWED = frozenset(
    {
        "create_get_program_id",
        "create_get_num_programs",
        "create_make_range",
        "create_cat",
        "create_join",
        "create_split",
        "create_unsplat",
        "create_histogram",
        "create_print",
        "create_make_block_ptr",
        "create_advance",
        "create_make_tensor_descriptor",
        "create_descriptor_store",
        "create_descriptor_gather",
        "create_descriptor_scatter",
        "create_tensor_pointer_store",
    }
)


def _layout(name: str) -> Callable[..., Handle]:
    """A shape operation of Triton's builder that also moves the overflow marks."""
    original = getattr(stock.InterpreterBuilder, name)

    def create(self: Builder, *args: Any) -> Handle:
        made = original(self, *args)
        at = next(i for i, arg in enumerate(args) if isinstance(arg, stock.TensorHandle))
        if OVERFLOWED in args[at].attr:
            mask, place = args[at].attr[OVERFLOWED]
            marks = np.ascontiguousarray(np.broadcast_to(mask, args[at].data.shape))
            moved = list(args)
            moved[at] = stock.TensorHandle(marks, tl.int1)
            made.attr[OVERFLOWED] = original(self, *moved).data.astype(np.bool_), place
        return made

    return create


class Builder(Arithmetic):
    """Executes the operations of one program after the other on a `Machine`."""

    create_reshape, create_trans = _layout("create_reshape"), _layout("create_trans")
    create_expand_dims, create_broadcast = (
        _layout("create_expand_dims"),
        _layout("create_broadcast"),
    )
    create_splat = _layout("create_splat")

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("create_", "get_")):
            raise UnsupportedByInterpreter(
                f"Triton operation {name.removeprefix('create_')} at {self.machine.place()}"
            )
        raise AttributeError(name)

    def create_inline_asm(self, asm: str, *_: Any) -> Handle:
        """Refused: PTX text runs in the PTX emulator, not here."""
        raise UnsupportedByInterpreter(f"inline assembly {asm.strip()!r} at {self.machine.place()}")

    def create_addptr(self, ptr: Handle, offset: Handle) -> Handle:
        """Pointer plus elements; the offset is widened from its own type, sign and all."""
        size = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
        moved = ptr.data + np.uint64(size) * offset.data.astype(np.uint64)
        return handle(moved, ptr.dtype, ptr, offset)

    def _active(self, ptrs: Handle, mask: Any) -> tuple[Array, Array]:
        """Flat addresses (int64) and lanes (uint32) of the lanes that a mask lets through."""
        chosen = mask.data if isinstance(mask, stock.TensorHandle) else mask
        shape = ptrs.data.shape
        flat = np.broadcast_to(chosen, shape).reshape(-1)
        if OVERFLOWED in ptrs.attr and self.machine.checks:
            wrong, place = ptrs.attr[OVERFLOWED]
            bad = np.broadcast_to(wrong, shape).reshape(-1) & flat
            if bad.any():
                detail = f"{int(bad.sum())} of {int(flat.sum())} lanes, widen to int64 first"
                self.machine.fault("integer overflow", detail, place)
        addresses = np.ascontiguousarray(ptrs.data).reshape(-1).view(np.int64)
        if flat.all():
            return addresses, np.arange(addresses.size, dtype=np.uint32)
        return addresses[flat], np.flatnonzero(flat).astype(np.uint32)

    def create_masked_load(
        self, ptrs: Handle, mask: Any, other: Handle | None, *policy: Any, **named: Any
    ) -> Handle:
        """tl.load; a lane that is masked off without `other` gets poison."""
        # How caches are told differs between versions; whether it is volatile comes last.
        is_volatile = bool(named.get("is_volatile", policy[-1] if policy else False))
        dtype = ptrs.get_element_ty()
        storage = numpy_type(dtype)
        shape = ptrs.data.shape
        addresses, lanes = self._active(ptrs, mask)
        if other is None:
            out = poison(shape, dtype, storage).reshape(-1)
        else:
            out = np.broadcast_to(other.data, shape).astype(storage).reshape(-1)
        loaded = poison((addresses.size,), dtype, storage)
        self.machine.load(addresses, lanes, loaded, is_volatile)
        out[lanes] = loaded
        return handle(out.reshape(shape), dtype)

    def create_load(self, ptr: Handle, *policy: Any) -> Handle:
        """tl.load without a mask."""
        return self.create_masked_load(ptr, np.True_, None, *policy)

    def create_store(self, ptr: Handle, value: Handle, *_: Any) -> None:
        """tl.store without a mask."""
        self.create_masked_store(ptr, value, np.True_)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Any, *_: Any) -> None:
        """tl.store."""
        storage = numpy_type(ptrs.get_element_ty())
        addresses, lanes = self._active(ptrs, mask)
        values = np.broadcast_to(value.data, ptrs.data.shape).reshape(-1)[lanes]
        self.machine.store(addresses, lanes, np.ascontiguousarray(values, storage))

    def _padding(self, option: Any, shape: tuple[int, ...], dtype: Any) -> Handle | None:
        """What lies outside a block pointer's or descriptor's shape."""
        if option is None:
            return None
        zeros = np.zeros(shape, numpy_type(dtype))
        if option == ir.PADDING_OPTION.PAD_ZERO:
            return handle(zeros, dtype)
        return handle(narrow(np.full(shape, np.nan), dtype), dtype)

    def create_tensor_pointer_load(
        self, ptr: Any, boundary: Any, padding: Any, cache: Any, evict: Any, is_volatile: bool
    ) -> Handle:
        """tl.load of a block pointer."""
        ptrs, mask = ptr.materialize_pointers(boundary)
        other = self._padding(padding, ptrs.data.shape, ptrs.get_element_ty())
        return self.create_masked_load(ptrs, mask, other, cache, evict, is_volatile)

    def create_descriptor_load(self, desc: Any, indices: Any, *_: Any, **__: Any) -> Handle:
        """Load through a tensor descriptor."""
        ptrs, mask = desc.materialize_pointers(indices)
        option = getattr(desc, "padding", ir.PADDING_OPTION.PAD_ZERO)
        other = self._padding(option, ptrs.data.shape, ptrs.get_element_ty())
        return self.create_masked_load(ptrs, mask, other)

    def _atomic(
        self, ptr: Handle, mask: Any, sem: Any, dtype: Any, change: Callable[..., Array]
    ) -> Handle:
        storage = numpy_type(dtype)
        addresses, lanes = self._active(ptr, mask)
        old = poison((addresses.size,), dtype, storage)
        order = ir.MEM_SEMANTIC
        acquire = sem in (order.ACQUIRE, order.ACQUIRE_RELEASE)
        release = sem in (order.RELEASE, order.ACQUIRE_RELEASE)
        self.machine.atomic(
            addresses, old, lambda was, at: change(was, lanes[at]), acquire, release
        )
        out = poison(ptr.data.shape, dtype, storage).reshape(-1)
        out[lanes] = old
        return handle(out.reshape(ptr.data.shape), dtype)

    def create_atomic_rmw(
        self, op: Any, ptr: Handle, val: Handle, mask: Handle, sem: Any, scope: Any
    ) -> Handle:
        """tl.atomic_add and its family; lanes masked off return poison."""
        kinds = ir.ATOMIC_OP
        dtype = val.dtype.scalar
        functions: dict[Any, Callable[..., Any]] = {
            kinds.ADD: np.add,
            kinds.MIN: np.minimum,
            kinds.UMIN: np.minimum,
            kinds.MAX: np.maximum,
            kinds.UMAX: np.maximum,
            kinds.AND: np.bitwise_and,
            kinds.OR: np.bitwise_or,
            kinds.XOR: np.bitwise_xor,
            kinds.XCHG: lambda old, new: new,
            kinds.FADD: lambda old, new: narrow(widen(old, dtype) + widen(new, dtype), dtype),
        }
        if op not in functions:
            raise UnsupportedByInterpreter(f"atomic operation {op}")
        values = np.broadcast_to(val.data, ptr.data.shape).reshape(-1)
        storage = numpy_type(dtype)

        def change(old: Array, lanes: Array) -> Array:
            with np.errstate(all="ignore"):
                return np.asarray(functions[op](old, values[lanes])).astype(storage, copy=False)

        return self._atomic(ptr, mask, sem, dtype, change)

    def create_atomic_cas(
        self, ptr: Handle, cmp: Handle, val: Handle, sem: Any, scope: Any
    ) -> Handle:
        """tl.atomic_cas; compares bits, as the hardware does."""
        shape = ptr.data.shape
        bits = f"u{numpy_type(val.dtype.scalar).itemsize}"
        expected = np.broadcast_to(cmp.data, shape).reshape(-1)
        values = np.broadcast_to(val.data, shape).reshape(-1)

        def change(old: Array, lanes: Array) -> Array:
            same = old.view(bits) == expected[lanes].view(bits)
            return np.where(same, values[lanes], old)

        return self._atomic(ptr, np.True_, sem, val.dtype.scalar, change)

    def create_gather(self, src: Handle, indices: Handle, axis: int) -> Handle:
        """tl.gather; an index outside the block is a fault, and takes element 0."""
        size = src.data.shape[axis]
        outside = (indices.data < 0) | (indices.data >= size)
        if outside.any():
            bad = int(indices.data[outside][0])
            self.machine.fault("out of bounds", f"tl.gather index {bad} in a block of {size}")
        at = np.where(outside, 0, indices.data)
        return handle(np.take_along_axis(src.data, at, axis=axis), src.dtype.scalar)

    def create_barrier(self) -> None:
        """tl.debug_barrier."""
        self.machine.barrier()

    def create_assert(self, condition: Handle, message: str, *_: Any) -> None:
        """tl.device_assert, always on here."""
        if not condition.data.all():
            self.machine.fault("failed assertion", str(message))

    def create_assume(self, condition: Handle) -> None:
        """tl.assume."""
        if not condition.data.all():
            self.machine.fault("false hint", "tl.assume of something that does not hold")

    def check_hint(self, name: str, data: Array, values: list[int]) -> None:
        """What tl.multiple_of and tl.max_contiguous promise the compiler, which trusts them.

        A scalar must be a multiple itself; of a block, the first element must be. Contiguous means
        that each run of that many elements along the dimension, from a multiple of it, counts up.
        """
        data = data.astype(np.int64)
        if name == "multiple_of":
            if (data.reshape(-1)[:1] % values[0] != 0).any():
                first = int(data.reshape(-1)[0])
                self.machine.fault("false hint", f"tl.multiple_of({values}) of {first}")
            return
        for axis, run in enumerate(values):
            run = min(run, data.shape[axis])
            steps = np.diff(data, axis=axis)
            inside = (np.arange(steps.shape[axis]) + 1) % run != 0
            if (np.compress(inside, steps, axis=axis) != 1).any():
                self.machine.fault("false hint", f"tl.max_contiguous({values}), dimension {axis}")


def refuse_unreviewed() -> None:
    """Gives `Builder` a refusal for each operation of Triton's that nobody has looked at."""
    for name in dir(stock.InterpreterBuilder):
        if name.startswith("create_") and name not in REVIEWED:
            inherited = getattr(Builder, name) is getattr(stock.InterpreterBuilder, name)
            if inherited:
                setattr(Builder, name, _refusal(name))


def _refusal(name: str) -> Callable[..., Any]:
    def create(self: Builder, *_: Any, **__: Any) -> Any:
        return self.__getattr__(name)

    return create
