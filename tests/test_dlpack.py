"""Arrays of other libraries as arguments of the ops, by DLPack."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kimi_ops


def test_numpy_in_numpy_out():
    x, weight = np.random.randn(3, 64).astype(np.float32), np.ones(64, dtype=np.float32)
    y = kimi_ops.rms_norm(x, weight, 1e-5)
    assert type(y) is np.ndarray
    expected = kimi_ops.rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-5)
    np.testing.assert_array_equal(y, expected.numpy())


def test_several_results_and_a_mix_with_tensors():
    x = np.random.randn(3, 64).astype(np.float16)
    result = kimi_ops.add_rms_norm(torch.ones(3, 64, dtype=torch.float16), x, np.ones_like(x[0]), 0)
    assert [type(r) for r in result] == [np.ndarray, np.ndarray]
    np.testing.assert_array_equal(result[1], x + np.float16(1))


def test_an_argument_that_is_written_is_written_in_place():
    grid = np.array([[1, 2, 2]], dtype=np.int32)
    qkv = np.random.randn(4, 3, 2, 72).astype(np.float32)
    expected = torch.from_numpy(qkv.copy())
    kimi_ops.vision_rope(expected, torch.from_numpy(grid))
    kimi_ops.vision_rope(qkv, grid)
    np.testing.assert_array_equal(qkv, expected.numpy())


class Array:
    """An array of a library with neither a namespace nor a from_dlpack of its own."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


def test_a_library_that_cannot_take_it_back_gets_a_tensor():
    y = kimi_ops.silu_mul(Array(torch.ones(2, 8)))
    assert type(y) is torch.Tensor


def test_what_is_no_array_is_torchs_error():
    with pytest.raises(RuntimeError, match=r"rms_norm\(\) Expected a value of type 'Tensor'"):
        kimi_ops.rms_norm([1.0], torch.ones(1), 1e-5)
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor'"):
        kimi_ops.rms_norm("x", torch.ones(1), 1e-5)


def test_the_contract_speaks_of_arrays_too():
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[D\]"):
        kimi_ops.rms_norm(np.ones((2, 4), np.float32), np.ones(5, np.float32), 1e-5)


def test_subclasses_of_tensor_stay():
    y = kimi_ops.silu_mul(torch.nn.Buffer(torch.ones(2, 8)))
    assert isinstance(y, torch.Tensor)
