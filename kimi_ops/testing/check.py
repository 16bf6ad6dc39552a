"""The test body that every backend of every op must pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_ops._dispatch import Op, get_op, use_backend
from kimi_ops.testing.latent_fp8 import compare_written, is_written_fp8, with_plain_cache
from kimi_ops.testing.oracle import Comparison, assert_close_to_oracle

DEVICE = "cpu"  # where `check_op` runs unless it is told; the tests' --device sets it
_GUARD = 64  # elements before and after each output and each restrided row that must stay poison
_POISON = -77_777_777
# Ops whose results are products of their inputs: an error is relative to the element itself.
RELATIVE = frozenset({"rms_norm", "add_rms_norm", "silu_mul"})


def poison_of(dtype: torch.dtype) -> float:
    """The value that stands for "never written" and "never to be read"."""
    if dtype == torch.uint8:
        return 255  # the bytes of a NaN in every float dtype
    return torch.nan if dtype.is_floating_point else _POISON


@contextlib.contextmanager
def poisoned_outputs(op: str) -> Iterator[Callable[[], None]]:
    """Fills every output of an op with poison before its kernel runs, and stands guard around it.

    What a kernel leaves unwritten then shows as NaN (-77,777,777 in integers). Gives a function
    that asserts that nothing was written just before or after an output. Not for concurrent use of
    the same op.
    """
    contract = get_op(op)
    allocate = contract.outputs
    blocks: list[tuple[Tensor, int]] = []

    def poisoned(*args: Any) -> Any:
        outputs = allocate(*args)
        guarded = []
        for output in as_tuple(outputs):
            count = output.numel()
            block = output.new_full((count + 2 * _GUARD,), poison_of(output.dtype))
            blocks.append((block, count))
            guarded.append(block[_GUARD : _GUARD + count].view(output.shape))
        if outputs is None:
            return None
        return guarded[0] if isinstance(outputs, Tensor) else tuple(guarded)

    def assert_guards() -> None:
        for number, (block, count) in enumerate(blocks):
            guards = torch.cat((block[:_GUARD], block[_GUARD + count :]))
            poison = poison_of(block.dtype)
            intact = guards.isnan() if block.dtype.is_floating_point else guards == poison
            assert intact.all(), f"{op} wrote outside its output {number % len(blocks)}"

    contract.outputs = poisoned
    try:
        yield assert_guards
    finally:
        contract.outputs = allocate


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """What an op returns, as a tuple of tensors."""
    if outputs is None:
        return ()
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _whole(tensor: Tensor) -> Tensor:
    """All elements of the storage that a tensor is a view of, in one dimension."""
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0)


def copied(args: Sequence[Any], device: str | torch.device, *, exact: bool = False) -> list[Any]:
    """The arguments copied with all of their storage: strides, offset and what lies in the gaps."""
    copies: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            whole = _whole(arg).to(device=device, copy=True)
            if exact and arg.dtype.is_floating_point:
                whole = whole.double()
            copies.append(whole.as_strided(arg.shape, arg.stride(), arg.storage_offset()))
        else:
            copies.append(arg)
    return copies


def _restrided(args: Sequence[Any]) -> list[Any]:
    """Every tensor as a slice of a wider one: rows apart, vectors with a stride, gaps poisoned."""
    wide: list[Any] = []
    for arg in args:
        if not isinstance(arg, Tensor) or arg.dim() == 0:
            wide.append(arg)
        elif arg.dim() == 1:
            block = arg.new_full((len(arg), 2), poison_of(arg.dtype))
            block[:, 0] = arg
            wide.append(block[:, 0])
        else:
            shape = (*arg.shape[:-2], arg.shape[-2] + 1, arg.shape[-1] + _GUARD)
            block = arg.new_full(shape, poison_of(arg.dtype))
            view = block[..., :-1, :-_GUARD]
            view.copy_(arg)
            wide.append(view)
    return wide


def reference_results(op: Op, args: list[Any]) -> tuple[Tensor, ...]:
    """Outputs and written arguments of the reference; the arguments are used up."""
    reference = op.load("reference")
    assert not isinstance(reference, str), reference
    outputs = op.outputs(*args)
    reference.launch(outputs, *args)
    return (*as_tuple(outputs), *_written(op, args))


def _written(op: Op, args: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(args[op.params.index(name)] for name in op.mutates)


def guarded_run(op: Op, args: Sequence[Any], backend: str, device: str) -> tuple[Tensor, ...]:
    """One run on a copy: outputs and written arguments; nothing else may have changed."""
    mine = copied(args, device)
    before = copied(args, device)
    with use_backend(f"{op.name}={backend}"), poisoned_outputs(op.name) as assert_guards:
        outputs = as_tuple(op.overload(*mine))
        assert_guards()
    for name, old, new in zip(op.params, before, mine, strict=True):
        if isinstance(old, Tensor) and name not in op.mutates:
            assert bitwise_equal(old, new), f"{op.name} changed its argument {name}"
        elif isinstance(old, Tensor):
            assert _gaps_equal(old, new), f"{op.name} wrote outside its argument {name}"
    return (*outputs, *_written(op, mine))


def _gaps_equal(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors of one layout agree in the storage between and around their elements."""
    old_whole, new_whole = (_whole(tensor).clone() for tensor in (old, new))
    for copy in (old_whole, new_whole):
        copy.as_strided(old.shape, old.stride(), old.storage_offset()).fill_(0)
    return bitwise_equal(old_whole, new_whole)


def check_op(
    op: str, args: Sequence[Any], backend: str, *, device: str | None = None, repeats: int = 2
) -> list[Comparison]:
    """The test body that every backend of every op must pass, on one set of arguments.

    Runs the op with its outputs poisoned and guarded, and compares outputs and written arguments
    with the oracle; checks that no other argument changed and that repeated runs are bitwise equal;
    then once more with every tensor strided, unless the backend declares that it cannot run that.

    What the body makes itself is on the CPU or on ``device`` by name: a default device that the
    caller has set (`torch.device` as a context) must not hide an op that forgets to name its own.

    Args:
        op: name of the op.
        args: all its arguments in the order of the schema, on any device.
        backend: name for `use_backend`.
        device: where to run; `DEVICE` by default.
        repeats: number of runs.

    Returns:
        The worst element of each result.

    Raises:
        AssertionError: what was wrong, with the element.
    """
    # Where there is none, no block: torch would ask it at every call.
    plain = torch.get_default_device() == torch.device("cpu")
    with contextlib.nullcontext() if plain else torch.device("cpu"):
        return _check_op(get_op(op), args, backend, device or DEVICE, repeats)


def _check_op(
    contract: Op, args: Sequence[Any], backend: str, device: str, repeats: int
) -> list[Comparison]:
    op = contract.name
    fp8 = is_written_fp8(contract, args)
    plain = with_plain_cache(contract, args) if fp8 else args
    oracle = reference_results(contract, copied(plain, device, exact=True))
    baseline = reference_results(contract, copied(plain, device))
    count = len(oracle) - len(contract.mutates)
    names = [f"output {i}" for i in range(count)] + list(contract.mutates)

    def compare(results: tuple[Tensor, ...], note: str = "") -> list[Comparison]:
        worst = []
        for name, *found in zip(names, results, baseline, oracle, strict=True):
            title, tensors = f"{op} {name}{note}", [tensor.cpu() for tensor in found]
            if fp8 and name in contract.mutates:
                worst += compare_written(title, contract, copied(args, "cpu"), *tensors)
            else:
                worst.append(assert_close_to_oracle(title, *tensors, relative=op in RELATIVE))
        return worst

    first, *others = (guarded_run(contract, args, backend, device) for _ in range(repeats))
    for again in others:
        for name, one, other in zip(names, first, again, strict=True):
            assert bitwise_equal(one, other), f"{op}: {name} differs between runs"
    worst = compare(first)
    wide = _restrided(args)
    if contract.why_not(backend, tuple(copied(wide, device))) is None:
        compare(guarded_run(contract, wide, backend, device), " of strided arguments")
    return worst


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Equality of bit patterns: NaNs of one pattern are equal, 0 and -0 are not."""
    if a.dtype.is_floating_point:
        kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.contiguous().view(kind), b.contiguous().view(kind)
    return torch.equal(a, b)
