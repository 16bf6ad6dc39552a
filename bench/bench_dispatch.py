"""What one call of an op costs beyond its implementation: `pytest bench/bench_dispatch.py`.

Per op, on tensors so small that nothing but overhead is left, two rows:

- ``launch``: the backend's own function, outputs allocated, nothing checked;
- ``call``: the public function: torch's dispatcher, checks, choice of the backend, the launch.

The difference of the two medians is the price of the dispatcher; the aim is under 3 us. The
backend is an empty one, so that its own noise does not hide the difference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kimi_ops
from kimi_ops._dispatch import get_op

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from op_calls import op_args


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=kimi_ops.op_names())
def empty(request, monkeypatch):
    """The op with a backend that does nothing, as the automatic choice."""
    op = get_op(request.param)
    nothing = SimpleNamespace(unsupported=lambda *args: None, launch=lambda *args: None)
    monkeypatch.setitem(op._automatic, "cpu", (nothing,))
    return op, nothing, op_args(op.name, 4)


def test_launch(benchmark, empty):
    op, backend, args = empty
    benchmark.group = op.name

    def implementation():
        outputs = op.outputs(*args)
        backend.launch(outputs, *args)
        return outputs

    benchmark(implementation)


def test_call(benchmark, empty):
    op, _, args = empty
    benchmark.group = op.name
    function = getattr(kimi_ops, op.name)
    count = function.__code__.co_argcount
    named = dict(zip(op.params[count:], args[count:], strict=True))
    benchmark(lambda: function(*args[:count], **named))
