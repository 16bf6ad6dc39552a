"""`pytest --device cuda`, as far as it can be tried without a GPU."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from types import SimpleNamespace

import conftest
import pytest
import torch

import kimi_ops
from kimi_ops import _backends
from kimi_ops._dispatch import get_op
from kimi_ops.testing import cases, check

OP = "rms_norm"


def _enter(backend):
    """The fixture as far as the test that it is for."""
    request = SimpleNamespace(param=backend, module=SimpleNamespace(OP=OP), node=None)
    return next(inspect.unwrap(conftest.backend)(request))


def test_a_backend_that_cannot_run_fails_on_a_gpu_and_skips_without(monkeypatch):
    monkeypatch.setitem(_backends._NEEDS, "cuda", ("no_such_module", "pip install it"))
    monkeypatch.setattr(get_op(OP), "_loaded", {})
    said = f"{OP}: backend cuda cannot run here: no_such_module is not installed: pip install it"
    with pytest.raises(pytest.skip.Exception) as skipped:
        _enter("cuda")
    assert str(skipped.value) == said
    monkeypatch.setattr(check, "DEVICE", "cuda")
    monkeypatch.setattr(conftest, "too_old", lambda device: "this GPU is too old")
    with pytest.raises(pytest.fail.Exception) as failed:
        _enter("cuda")
    assert str(failed.value) == said
    with pytest.raises(pytest.fail.Exception, match=r"cannot run here: this GPU is too old"):
        _enter("triton")


@pytest.mark.parametrize(("limit", "full"), [(None, False), (700, False), (700, True)])
def test_the_work_limit_is_for_every_backend(limit, full):
    """Without one, ways have their own and nothing else has."""
    options = {"--full": full, "--work-limit": limit}
    dropped = []
    config = SimpleNamespace(
        getoption=options.get,
        stash={conftest._LEFT_OUT: Counter()},
        hook=SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items)),
    )
    case = max(cases(OP), key=lambda case: case.work)
    items = [
        SimpleNamespace(
            module=SimpleNamespace(OP=OP),
            callspec=SimpleNamespace(params={"backend": backend, "case": one}),
            get_closest_marker=lambda name: None,
            user_properties=[],
        )
        for one in (case, min(cases(OP), key=lambda case: case.work))
        for backend in ("reference", "triton", "cuda[sm_90]")
    ]
    before = list(items)
    conftest.pytest_collection_modifyitems(config, items)
    assert case.work > 1 << 15
    # The largest case, on the way alone or everywhere.
    assert dropped == (before[:3] if limit else before[2:3])
    assert items == [item for item in before if item not in dropped]
    assert sum(config.stash[conftest._LEFT_OUT].values()) == len(dropped)


def _tests_with_a_backend(op):
    """Those of the op's file that make their own tensors, and whether each wants a case."""
    module = importlib.import_module(f"test_{op}")
    for name, function in inspect.getmembers(module, inspect.isfunction):
        wants = set(inspect.signature(function).parameters)
        if "backend" in wants and name.startswith("test_") and name != "test_matches_oracle":
            assert wants <= {"backend", "case"}, name
            yield function, "case" in wants


@pytest.mark.parametrize("op", kimi_ops.op_names())
def test_calls_have_all_their_tensors_on_the_device(op, monkeypatch):
    """Tensors without storage stand for those of a GPU: where one on the CPU meets them, an op
    refuses, and so does torch. A test ends where it first looks at a value."""
    contract, devices = get_op(op), set()
    allocate = contract.outputs

    def outputs(*args):
        devices.update(a.device.type for a in args if isinstance(a, torch.Tensor))
        return allocate(*args)

    monkeypatch.setattr(contract, "outputs", outputs)
    monkeypatch.setattr(check, "DEVICE", "meta")
    for function, of_a_case in _tests_with_a_backend(op):
        devices.clear()
        try:
            with torch.device("meta"):
                function("reference", *([cases(op)[-1]] if of_a_case else []))
        except (RuntimeError, AssertionError) as error:
            looked = re.search(r"meta tensor|Meta|register_meta|^assert", str(error))
            assert looked, f"{function.__name__}: {error}"
        # The codes of int4_linear's test are packed before its call, and packing looks at them.
        assert devices == {"meta"} or (op == "int4_linear" and not devices), function.__name__
