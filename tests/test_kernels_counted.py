"""What the memory-bound Triton kernels move, counted on their PTX, against the floor: every byte of
the arguments read once and every byte of the results written once, in whole sectors, one launch.

The ops with more to count have such tests in their own files."""

from __future__ import annotations

import importlib

import pytest
import torch

from kimi_ops._dispatch import get_op
from kimi_ops.testing.check import as_tuple
from kimi_ops.testing.runner import emulated

BF16 = torch.bfloat16


def _rows(*shape):
    return torch.randn(shape).to(BF16)


CALLS = {
    "rms_norm": lambda: (_rows(24, 7168), _rows(7168), 1e-5),
    "add_rms_norm": lambda: (_rows(24, 7168), _rows(24, 7168), _rows(7168), 1e-5),
    "silu_mul": lambda: (_rows(40, 4096),),
    "vision_pos_embed": lambda: (_rows(96, 1152), _rows(8, 8, 1152), torch.tensor([[1, 8, 12]])),
    "vision_rope": lambda: (_rows(96, 3, 16, 72), torch.tensor([[1, 4, 6], [2, 6, 6]])),
}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("op", CALLS)
def test_moves_each_byte_once_in_one_launch(op, arch):
    contract, args = get_op(op), CALLS[op]()
    outputs = contract.outputs(*args)
    with emulated(arch=arch, uninitialised=as_tuple(outputs)) as emulation:
        importlib.import_module(f"kimi_ops.kernels.{op}").launch(outputs, *args)
    ((_, report),) = emulation.launches

    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    read = sum(t.numel() * t.element_size() for t in tensors)
    written = sum(t.numel() * t.element_size() for t in as_tuple(outputs))
    if op == "vision_rope":  # in place, v untouched
        part = args[0].numel() * 2 // 3
        read, written = read - part, 2 * part
    assert written == report.total.global_store_bytes == report.unique_written_bytes
    # The last sector of a table may hold other bytes too.
    assert read <= report.unique_read_bytes <= 1.05 * read + 32
    assert report.total.global_sectors <= 1.1 * report.total.global_sectors_ideal
