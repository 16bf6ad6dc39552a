"""Arrays of other libraries as arguments: whatever has ``__dlpack__`` is taken as a tensor.

The memory is shared, so an argument that an op writes is written in place; what the op returns
comes back as an array of the library that the first such argument is from (CuPy, NumPy, JAX).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack


def takes_arrays(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op that also takes arrays with ``__dlpack__`` where it takes tensors."""

    def call(*args: Any) -> Any:
        try:  # torch refuses a foreign array before anything ran; a look at types would cost 1 us
            return op(*args)
        except RuntimeError:
            foreign = [a for a in args if hasattr(a, "__dlpack__") and not isinstance(a, Tensor)]
            if not foreign:
                raise
        return _with_arrays(op, args, foreign)

    return call


def _with_arrays(op: Callable[..., Any], args: tuple[Any, ...], foreign: list[Any]) -> Any:
    result = op(*(from_dlpack(a) if any(a is f for f in foreign) else a for a in args))
    convert = _converter(foreign[0])
    if isinstance(result, Tensor):
        return convert(result)
    return None if result is None else tuple(map(convert, result))


def _converter(array: Any) -> Callable[[Tensor], Any]:
    """``from_dlpack`` of an array's own library; a library without one gets tensors."""
    if hasattr(array, "__array_namespace__"):
        library = array.__array_namespace__()
    else:
        library = importlib.import_module(type(array).__module__.partition(".")[0])
    converter: Callable[[Tensor], Any] = getattr(library, "from_dlpack", lambda tensor: tensor)
    return converter
