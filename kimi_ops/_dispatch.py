"""Defines the ops, and decides which backend runs a call: the only place that does.

An op has one contract (`kimi_ops/ops/<op>.py`) and up to four backends (`kimi_ops._backends`).

The automatic choice takes the first backend of the device's order that declares no reason against
the call. An explicit choice (`use_backend`, or the environment variable ``KIMI_OPS_BACKEND``) never
falls back: where it cannot run, it raises `BackendError` with the reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from kimi_ops import _autograd
from kimi_ops._backends import (
    AUTOMATIC_ORDER,
    AUTOMATIC_ORDER_OF_OP,
    BACKENDS,
    GPU_BACKENDS,
    SIMULATED,
    Backend,
    as_backend,
    load_backend,
)
from kimi_ops._batch_invariant import is_batch_invariant
from kimi_ops._check import Checks
from kimi_ops._dlpack import takes_arrays
from kimi_ops._target import too_old

_LIBRARY = torch.library.Library("kimi_ops", "DEF")
_OPS: dict[str, Op] = {}
_DEVICE_TYPES: dict[torch.device, str] = {}  # torch builds a new string at every `device.type`


def _device_type(device: torch.device) -> str:
    return _DEVICE_TYPES.setdefault(device, device.type)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run the call, or none at all can."""


class Op:
    """One op: its contract, its entry in `torch.ops.kimi_ops`, and its backends as they load."""

    def __init__(self, schema: str, checks: Mapping[str, str], outputs: Callable[..., Any]) -> None:
        parsed = torch._C.parse_schema(f"kimi_ops::{schema}")
        self.name = parsed.name.removeprefix("kimi_ops::")
        self.schema = schema
        self.params = tuple(a.name for a in parsed.arguments)
        self.mutates = tuple(
            a.name for a in parsed.arguments if a.alias_info and a.alias_info.is_write
        )
        self.required = {a.name for a in parsed.arguments if not a.has_default_value()}
        self.defaults = tuple(a.default_value for a in parsed.arguments)
        self.checks = Checks(self.name, self.params, checks, written=self.mutates)
        self._check, self._arity = self.checks.run, len(self.params)
        self.outputs = outputs
        self._device_arg = self.params.index(next(iter(self.checks.tensors)))
        self._loaded: dict[str, Backend | str] = {}
        self._simulated: dict[str, Backend | str] = {}
        self._automatic: dict[str, tuple[tuple[str, Backend], ...]] = {}

        # Defined without ops.impl per device beyond these two: on any other device torch itself
        # says that the op has no kernel there, which is the truth.
        tags = (torch.Tag.pt2_compliant_tag,)
        _LIBRARY.define(schema, tags=tags)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, self._run, key)
        torch.library.register_fake(f"kimi_ops::{self.name}", self._fake, lib=_LIBRARY)
        self.overload = getattr(torch.ops.kimi_ops, self.name).default
        at_autograd = _autograd.kernel(self, self._run)
        _LIBRARY.impl(self.name, at_autograd, "Autograd", with_keyset=True)

    def _complete(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with the trailing defaults that torch leaves out put back."""
        return args + self.defaults[len(args) :] if len(args) != len(self.params) else args

    def bind(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """All arguments of a call in the order of the schema, defaults filled in."""
        rest = self.params[len(args) :]
        if unknown := [name for name in named if name not in rest]:
            raise TypeError(f"{self.name}: unexpected argument {unknown[0]!r}")
        if missing := [name for name in rest if name in self.required and name not in named]:
            raise TypeError(f"{self.name}: missing argument {missing[0]!r}")
        defaults = zip(rest, self.defaults[len(args) :], strict=True)
        return args + tuple(named.get(name, default) for name, default in defaults)

    def _fake(self, *args: Any) -> Any:
        args = self._complete(args)
        self.checks.run(*args)
        return self.outputs(*args)

    def _run(self, *args: Any) -> Any:
        """The op itself. Short on purpose: at decode a call may cost little more than this."""
        if len(args) != self._arity:
            args = self._complete(args)
        self._check(*args)
        place = args[self._device_arg].device
        device = _DEVICE_TYPES.get(place) or _device_type(place)
        if torch.is_autocast_enabled(device):
            # The contract's dtypes hold inside autocast too: a float32 router stays one.
            with torch.autocast(device, enabled=False):
                return self._run(*args)
        if device == "cuda" and place.index != torch.cuda.current_device():
            # Triton launches on the current device, whatever device its tensors are on.
            with torch.cuda.device(place):
                return self._run(*args)
        choice = _CHOICE.get()
        if choice is None:
            choice = _ENVIRONMENT[0] if _ENVIRONMENT else _environment_choice()
        name = self._chosen_name(choice) if choice else None
        backend = self._explicit(name, args) if name else self._automatically(device, args)
        outputs = self.outputs(*args)
        backend.launch(outputs, *args)
        return outputs

    def _chosen_name(self, choice: Mapping[str, str]) -> str | None:
        """The backend that an explicit choice names for this op, if any."""
        name = choice.get(self.name) or choice.get("*")
        return None if name == "auto" else name

    def _automatically(self, device: str, args: tuple[Any, ...]) -> Backend:
        candidates = self._automatic.get(device)
        if candidates is None:
            loaded = [(name, self.load(name)) for name in self.order(device)]
            candidates = tuple((n, b) for n, b in loaded if not isinstance(b, str))
            self._automatic[device] = candidates
        for name, backend in candidates:
            if self._refusal(name, backend, args) is None:
                return backend
        reasons = explain(self.name, *args)
        raise BackendError(f"{self.name}: no backend can run this call\n{reasons}")

    def _explicit(self, name: str, args: tuple[Any, ...]) -> Backend:
        reason = self.why_not(name, args)
        if reason is not None:
            raise BackendError(
                f"{self.name}: backend '{name}' was chosen explicitly but cannot run: {reason}"
            )
        backend = self.load(name)
        assert not isinstance(backend, str)
        return backend

    def why_not(self, name: str, args: tuple[Any, ...] | None) -> str | None:
        """Why backend `name` cannot run `args` (or, for None, anything at all); None if it can."""
        backend = self.load(name)
        if isinstance(backend, str):
            return backend
        if args is None:
            return None
        device = args[self._device_arg].device
        if name in GPU_BACKENDS and device.type != "cuda" and name not in SIMULATED:
            return (
                f"its kernels run on a GPU, the tensors are on {device}; without one they run in "
                "kimi_ops.testing.runner.emulated()"
                + (" or kimi_ops.testing.triton_interpreter.interpreted()" * (name == "triton"))
            )
        return self._refusal(name, backend, args)

    def _refusal(self, name: str, backend: Backend, args: tuple[Any, ...]) -> str | None:
        """Why a backend that is there does not run a call, or None."""
        if is_batch_invariant() and not getattr(backend, "BATCH_INVARIANT", False):
            return "batch-invariant mode is on, and it does not promise results that keep to it"
        if name in GPU_BACKENDS and (reason := too_old(args[self._device_arg].device)):
            return reason
        return backend.unsupported(*args)

    def order(self, device: str) -> tuple[str, ...]:
        """Backends that the automatic choice considers on this type of device, best first."""
        default = AUTOMATIC_ORDER.get(device, ("reference",))
        return AUTOMATIC_ORDER_OF_OP.get((self.name, device), default)

    def load(self, name: str) -> Backend | str:
        """The backend's module, or the reason why there is none."""
        loaded = self._simulated if name in SIMULATED else self._loaded
        if name not in loaded:
            if name not in BACKENDS:
                return f"no such backend; there are {', '.join(self.known_backends())}"
            loaded[name] = load_backend(self.name, name)
        return loaded[name]

    def known_backends(self) -> tuple[str, ...]:
        """The package's backends and those added by `register_backend`."""
        return BACKENDS + tuple(n for n in self._loaded if n not in BACKENDS)


def define_op(schema: str, *, checks: Mapping[str, str], outputs: Callable[..., Any]) -> Any:
    """Registers one op and returns its callable, `torch.ops.kimi_ops.<op>.default`, which also
    takes arrays of other libraries (`kimi_ops._dlpack`).

    Args:
        schema: in torch's notation; a written argument is marked ``Tensor(a!)``. Arguments are
            positional here; the public function in front of it may make some keyword-only.
        checks: the contract, in the notation of `kimi_ops._check`; the device of its first tensor
            is the device of the op.
        outputs: ``outputs(*args)`` allocates what the op returns, uninitialised. It serves the
            real and the fake implementation alike, so they cannot drift apart.

    Backends need no registration: they are found by the op's name.
    """
    op = Op(schema, checks, outputs)
    _OPS[op.name] = op
    return takes_arrays(op.overload)


def op_names() -> tuple[str, ...]:
    """Names of all ops, in alphabetical order."""
    return tuple(sorted(_OPS))


def get_op(op: str | Callable[..., Any]) -> Op:
    """The `Op` of a name or of a public function; raises ValueError for an unknown one."""
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPS:
        raise ValueError(f"unknown op {name!r}; there are {', '.join(op_names())}")
    return _OPS[name]


def register_backend(op: str, name: str, module: Backend | ModuleType) -> None:
    """Adds a backend from outside this package, chosen only by name.

    Args:
        op: name of the op.
        name: what `use_backend` will call it; the built-in names are refused.
        module: anything with ``unsupported(*args)`` and ``launch(outputs, *args)``.
    """
    if name in BACKENDS or name == "auto":
        raise ValueError(f"backend name {name!r} is taken")
    get_op(op)._loaded[name] = as_backend(module)


def parse_choice(text: str) -> dict[str, str]:
    """Reads ``"mla_decode=triton,*=reference"``; a bare backend name stands for ``*=name``."""
    choice: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, equals, backend = (word.strip() for word in item.rpartition("="))
        choice[op if equals else "*"] = backend
    for op, backend in choice.items():
        known = set(get_op(op).known_backends() if op != "*" else BACKENDS)
        known |= {n for o in _OPS.values() for n in o.known_backends()} if op == "*" else set()
        if backend != "auto" and backend not in known:
            raise ValueError(
                f"unknown backend {backend!r} for {op}; there are {', '.join(sorted(known))}, auto"
            )
    return choice


_CHOICE: ContextVar[Mapping[str, str] | None] = ContextVar("kimi_ops_backend", default=None)
_ENVIRONMENT: list[Mapping[str, str]] = []


def _environment_choice() -> Mapping[str, str]:
    """``KIMI_OPS_BACKEND``, read at the first call of any op."""
    if not _ENVIRONMENT:
        try:
            _ENVIRONMENT.append(parse_choice(os.environ.get("KIMI_OPS_BACKEND", "")))
        except ValueError as error:
            raise ValueError(f"KIMI_OPS_BACKEND: {error}") from None
    return _ENVIRONMENT[0]


def _choice() -> Mapping[str, str]:
    """Explicit choices in force here: op, or ``*``, to backend."""
    choice = _CHOICE.get()
    return _environment_choice() if choice is None else choice


@contextlib.contextmanager
def use_backend(choice: str = "", /, **per_op: str) -> Iterator[None]:
    """Chooses backends by name within a ``with`` block, in this thread or task only.

    ``use_backend("triton")`` is for every op, ``use_backend("mla_decode=triton,*=reference")`` and
    ``use_backend(mla_decode="triton")`` per op; ``"auto"`` goes back to the automatic choice.
    Blocks nest, the inner one wins; what they do not name follows ``KIMI_OPS_BACKEND``. A choice
    that cannot run a call raises `BackendError` there; it never falls back. Under
    ``torch.compile`` put the block around the compiled function, not inside it.

    Raises:
        ValueError: unknown op or backend.
    """
    new = parse_choice(",".join([choice, *(f"{op}={name}" for op, name in per_op.items())]))
    token = _CHOICE.set(new if "*" in new else {**_choice(), **new})
    try:
        yield
    finally:
        _CHOICE.reset(token)


def resolve(op: str | Callable[..., Any], *args: Any, **named: Any) -> str:
    """Name of the backend that would run this call.

    Raises:
        ValueError, TypeError: the arguments break the op's contract.
        BackendError: the explicit choice cannot run it, or no backend can.
    """
    o = get_op(op)
    args = o.bind(args, named)
    o.checks.run(*args)
    if name := o._chosen_name(_choice()):
        o._explicit(name, args)
        return name
    device = args[o._device_arg].device.type
    backend = o._automatically(device, args)
    return next(name for name in o.order(device) if o.load(name) is backend)


@dataclass(frozen=True)
class Explanation:
    """Who would run a call, and why the others would not.

    Attributes:
        op: name of the op.
        device: type of device the question was about.
        chosen: backend that would run, or None.
        reasons: (backend, reason) in the order of the automatic choice and then the rest; the
            reason is None for a backend that can run.
    """

    op: str
    device: str
    chosen: str | None
    reasons: tuple[tuple[str, str | None], ...]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.chosen or 'no backend'}"]
        for name, reason in self.reasons:
            note = "runs" if name == self.chosen else reason or "could run, not chosen"
            lines.append(f"  {name}: {note}")
        return "\n".join(lines)


def explain(
    op: str | Callable[..., Any], *args: Any, device: str | None = None, **named: Any
) -> Explanation:
    """Says which backend would run an op, and why each of the others would not.

    Args:
        op: name or public function.
        args, named: the call's arguments; without them the answer is about any call.
        device: "cpu" or "cuda", only without arguments; default "cpu".
    """
    o = get_op(op)
    call: tuple[Any, ...] | None = None
    if args or named:
        call = o.bind(args, named)
        o.checks.run(*call)
        device = call[o._device_arg].device.type
    device = device or "cpu"
    choice = _choice()
    order = o.order(device)
    names = [*order, *(name for name in o.known_backends() if name not in order)]
    reasons = tuple((name, o.why_not(name, call)) for name in names)
    explicit = o._chosen_name(choice)
    eligible = (explicit,) if explicit else order
    chosen = next((n for n, reason in reasons if reason is None and n in eligible), None)
    return Explanation(o.name, device, chosen, reasons)
