"""`interpreted`: within its block, launches of Triton kernels run here instead of on a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.backends.amd.compiler import HIPOptions
from triton.backends.nvidia.compiler import CUDAOptions
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, KernelParam, TensorWrapper, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from kimi_ops._backends import simulated
from kimi_ops._target import in_python
from kimi_ops.testing.triton_interpreter import language
from kimi_ops.testing.triton_interpreter.arithmetic import handle
from kimi_ops.testing.triton_interpreter.builder import Builder, refuse_unreviewed
from kimi_ops.testing.triton_interpreter.faults import FAULTS, Report, UnsupportedByInterpreter
from kimi_ops.testing.triton_interpreter.machine import Machine
from kimi_ops.testing.triton_interpreter.memory import is_plain
from kimi_ops.testing.triton_interpreter.rewrite import CARRY, LOGIC, NOT, RANGE, rewrite

# Patched parts of Triton must not be there when Gluon's language copies them at its first import.
if importlib.util.find_spec("triton.experimental.gluon") is not None:
    importlib.import_module("triton.experimental.gluon.language")

MAX_GRID = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, "Technical Specifications"
_OPTIONS = {f.name for options in (CUDAOptions, HIPOptions) for f in fields(options)}
_OPTIONS |= {"debug", "launch_pdl", "launch_cooperative_grid", "instrumentation_mode"}

_active: list[Machine] = []


class _Executor:
    """Runs kernels on a machine; one per block."""

    def __init__(self, machine: Machine, seed: int | None) -> None:
        self._machine = machine
        self._builder = Builder(machine)
        self._order = None if seed is None else np.random.default_rng(seed)
        self._patches = language.Patches()
        self._rewritten: dict[Any, Callable[..., Any]] = {}
        self._running = False

    def call(self, jitted: Any, *args: Any, **named: Any) -> Any:
        """Runs a jit'd function inside a kernel."""
        if not self._running:
            raise RuntimeError(f"{jitted.fn.__name__} is a kernel: launch it with a grid")
        named = {k: v for k, v in named.items() if k not in ("_semantic", "_generator")}
        args = tuple(map(language.unwrap, args))
        named = {k: language.unwrap(v) for k, v in named.items()}
        return self._python(jitted)(*args, **named)

    def _python(self, jitted: Any) -> Callable[..., Any]:
        if jitted.fn not in self._rewritten:
            if getattr(jitted, "is_gluon", lambda: False)():
                raise UnsupportedByInterpreter(f"{jitted.fn.__name__}: Gluon has no interpreter")
            names = {
                CARRY: self._carry,
                RANGE: language.tensor_range,
                LOGIC: language.logic,
                NOT: language.negate,
            }
            self._rewritten[jitted.fn] = rewrite(jitted.fn, names, self._patches.replaced)
        return self._rewritten[jitted.fn]

    def _carry(self, value: Any) -> Any:
        value = language.unwrap(value)
        return self._scalar(value, None) if isinstance(value, bool | int | float) else value

    def _scalar(self, value: float, declared: str | None) -> Any:
        """A number as the kernel gets it: int32 if it fits, float32; or as declared."""
        if declared is None:
            declared = "fp32" if isinstance(value, float) else mangle_type(value)
        declared = {"u1": "i1"}.get(declared, declared)
        dtype = _type(declared)
        storage = stock._get_np_dtype(dtype)
        if dtype == tl.bfloat16:
            return tl.tensor(self._builder.get_bf16(value), dtype)
        return tl.tensor(handle(np.array([value]).astype(storage), dtype), dtype)

    def _argument(self, name: str, value: Any, param: Any) -> Any:
        """A host value as the kernel gets it."""
        if isinstance(value, tuple):
            return tl.tuple([self._argument(f"{name}[{i}]", v, None) for i, v in enumerate(value)])
        if isinstance(value, bool | int | float):
            declared = getattr(param, "annotation_type", None) or None
            return self._scalar(value, declared)
        if isinstance(value, TensorDescriptor):
            return self._descriptor(name, value)
        if isinstance(value, TensorWrapper | Tensor):
            tensor = value.base if isinstance(value, TensorWrapper) else value
            if not is_plain(tensor):
                raise UnsupportedByInterpreter(
                    f"{name}: a {type(tensor).__name__} on {tensor.device}, not a CPU tensor"
                )
            text = mangle_type(value)
            if param is not None and param.is_const and not text.startswith("*k"):
                text = f"*k{text[1:]}"
            address = self._machine.space.argument(name, tensor)
            dtype = _type(text)
            return tl.tensor(handle(np.array([address], np.uint64), dtype), dtype)
        if value is None or isinstance(value, str | tl.dtype | tl.constexpr):
            return value
        raise UnsupportedByInterpreter(f"{name}: an argument of type {type(value).__name__}")

    def _descriptor(self, name: str, value: Any) -> Any:
        if getattr(value, "round_f32_to_tf32", False):
            raise UnsupportedByInterpreter(f"{name}: a descriptor that rounds to TF32")
        semantic = TritonSemantic(self._builder)
        # Before 3.5 what lies outside is always zero.
        padding = {"padding_option": value.padding} if hasattr(value, "padding") else {}
        # The innermost stride is a constant 1 in the descriptor's type.
        strides = [self._scalar(s, None) for s in value.strides[:-1]] + [tl.constexpr(1)]
        return semantic.make_tensor_descriptor(
            base=self._argument(name, value.base, None),
            shape=[self._scalar(s, None) for s in value.shape],
            strides=strides,
            block_shape=[tl.constexpr(b) for b in value.block_shape],
            **padding,
        )

    def launch(self, jitted: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        """What ``kernel[grid](*args, **named)`` does within the block."""
        if warmup:
            raise UnsupportedByInterpreter("warmup: the interpreter compiles nothing")
        name = jitted.fn.__name__
        signature = inspect.signature(jitted.fn)
        options = {k: named.pop(k) for k in list(named) if k not in signature.parameters}
        if unknown := [k for k in options if k not in _OPTIONS]:
            raise TypeError(f"{name}: {unknown[0]!r} is neither an argument nor a launch option")
        for hook in getattr(jitted, "pre_run_hooks", ()):
            hook(*args, **named)
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        shape = _grid(name, grid(dict(bound.arguments, **options)) if callable(grid) else grid)

        self._running = True
        language.patch(self._patches, self._builder, self.call)
        try:
            python = self._python(jitted)
            self._machine.space.begin_launch()
            values = {}
            for i, (key, param) in enumerate(signature.parameters.items()):
                declared = KernelParam(i, param, False, False)
                value = bound.arguments[key]
                if not declared.is_constexpr:
                    value = self._argument(key, value, declared)
                values[key] = language.unwrap(value)
            self._machine.begin_launch(name, shape)
            self._builder.set_grid_dim(*shape)
            with _exact_products():
                for program in self._programs(shape):
                    self._machine.begin_program(program)
                    self._builder.set_grid_idx(*program)
                    python(**values)
        finally:
            self._running = False
            self._patches.undo()

    def _programs(self, shape: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
        count = shape[0] * shape[1] * shape[2]
        order = range(count) if self._order is None else self._order.permutation(count)
        for i in order:
            rest, x = divmod(int(i), shape[0])
            yield x, rest % shape[1], rest // shape[1]


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Matrix products of torch on one thread, and in the type of their operands."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    # Below "highest", oneDNN may take bf16 for float32.
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _type(text: str) -> Any:
    """The type of a signature's entry, such as ``*bf16``."""
    # From 3.5 on it takes the constant beside the text, which only a constant has.
    extra = (None,) * (len(inspect.signature(tl.str_to_ty).parameters) - 1)
    return tl.str_to_ty(text, *extra)


def _grid(kernel: str, grid: Any) -> tuple[int, int, int]:
    dims = tuple(int(n) for n in (grid if isinstance(grid, tuple | list) else (grid,)))
    full = (*dims, 1, 1, 1)[: max(3, len(dims))]
    if len(full) > 3 or any(n < 0 or n > most for n, most in zip(full, MAX_GRID, strict=False)):
        raise ValueError(f"{kernel}: no GPU launches the grid {dims}, at most {MAX_GRID}")
    return full[0], full[1], full[2]


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif values is not None:
        for value in values:
            yield from _tensors(value)


def _watch_torch(patches: language.Patches, machine: Machine) -> None:
    """Makes torch's uninitialised tensors recognisable, and remembers who got a raw address."""

    def poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **named: Any) -> Any:
            made = allocate(*args, **named)
            if is_plain(made):
                machine.space.buffer(made).declare_uninitialised(made)
            return made

        return wrapper

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            patches.set(owner, name, poisoned(getattr(owner, name)))
    data_ptr = Tensor.data_ptr

    def remembering(tensor: Tensor) -> int:
        if is_plain(tensor):
            machine.space.hand_out(tensor)
        return data_ptr(tensor)

    patches.set(Tensor, "data_ptr", remembering)


def _refuse_stock(*_: Any, **__: Any) -> None:
    raise UnsupportedByInterpreter("this launch goes to Triton's own interpreter")


@contextlib.contextmanager
def interpreted(
    *,
    seed: int | None = 0,
    checks: bool = True,
    bounds: str = "tensor",
    keep_going: bool = False,
    ignore: Sequence[str] = (),
    uninitialised: Sequence[Any] | Tensor | None = (),
) -> Iterator[Report]:
    """Within the block, ``kernel[grid](...)`` runs on CPU tensors in Python, checked.

    Works on kernels decorated before or after, with or without ``TRITON_INTERPRET``. Programs run
    one by one. Blocks do not nest and are not for several threads.

    Args:
        seed: of the order in which the programs of each grid run; None for ascending order.
        checks: look for races, unsynchronised lanes, overlapping stores, uninitialised loads and
            integer overflows. Bounds, alignment, poison and rounding are always on.
        bounds: "tensor": an argument reaches its own elements, not even the gaps between its rows;
            "storage": everything in the storage behind it.
        keep_going: collect faults in the report instead of raising the first.
        ignore: kinds of faults (keys of `FAULTS`) that are neither raised nor collected.
        uninitialised: tensors, nested as they come, that hold nothing yet: outputs. They are filled
            with poison, and loading from them before something is stored is a fault. What
            ``torch.empty`` and its family make within the block is treated so by itself.

    Yields:
        the report: launches with their traffic, and the faults found.

    Raises:
        KernelFault: the first fault, unless ``keep_going``.
        UnsupportedByInterpreter: something that cannot be executed faithfully, by name.
        RuntimeError: blocks nest.
    """
    if bounds not in ("tensor", "storage"):
        raise ValueError(f"bounds must be 'tensor' or 'storage', got {bounds!r}")
    if unknown := set(ignore) - set(FAULTS):
        raise ValueError(f"unknown kind of fault {sorted(unknown)[0]!r} in ignore")
    if _active:
        raise RuntimeError("interpreted() blocks do not nest")
    refuse_unreviewed()
    report = Report()
    machine = Machine(report, bounds, checks, keep_going, frozenset(ignore))
    report.unwritten = lambda tensor: machine.space.buffer(tensor).unwritten(tensor)
    executor = _Executor(machine, seed)
    patches = language.Patches()
    for owner in (JITFunction, stock.InterpretedFunction):
        patches.set(owner, "run", lambda self, *a, **k: executor.launch(self, *a, **k))
        patches.set(owner, "__call__", lambda self, *a, **k: executor.call(self, *a, **k))
    if "__getitem__" in vars(stock.InterpretedFunction):  # Triton 3.4, which does not go by `run`
        patches.set(
            stock.InterpretedFunction,
            "__getitem__",
            lambda self, grid: functools.partial(executor.launch, self, grid=grid, warmup=False),
        )
    patches.set(stock.GridExecutor, "__call__", _refuse_stock)
    tune = Autotuner.run

    def tuned(self: Any, *args: Any, **named: Any) -> Any:
        if len(self.configs) > 1:
            raise UnsupportedByInterpreter(
                f"{self.base_fn.__name__} chooses among {len(self.configs)} configurations by time"
            )
        return tune(self, *args, **named)

    patches.set(Autotuner, "run", tuned)
    if checks:
        _watch_torch(patches, machine)
    _active.append(machine)
    try:
        for tensor in _tensors(uninitialised):
            machine.space.buffer(tensor).declare_uninitialised(tensor)
        with simulated("triton"), in_python():
            yield report
    finally:
        _active.clear()
        patches.undo()
