"""ggml's shared libraries through ctypes: weights in Q4_0, graphs of its ops, a CPU backend."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_ops.bench.case import size_of
from kimi_ops.bench.peers import Declined

F32, Q4_0, I32 = 0, 2, 26  # enum ggml_type
_TENSORS = 256  # that a context has room for
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda *_: None)  # held, since ggml keeps the pointer


class _Parameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("bare", ctypes.c_bool))


class Ggml:
    """ggml's functions, and what they have allocated. Every number and pointer is 64 bits wide."""

    def __init__(self, folder: Path) -> None:
        self._owned: list[tuple[str, int]] = []
        names = ("libggml-base.so", "libggml-cpu.so")
        self._libraries = [ctypes.CDLL(f"{folder / name}", ctypes.RTLD_GLOBAL) for name in names]
        self("log_set", _SILENT, None)
        self.backend = self._own("backend_free", self("backend_cpu_init"))
        self("backend_cpu_set_n_threads", self.backend, torch.get_num_threads())
        registry = self("backend_cpu_reg")
        device = self("backend_reg_dev_get", registry, 0)
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self("backend_reg_get_proc_address", registry, name)
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_int64), ctypes.c_int64)(address)(device)
        self._repacked = kinds[0]  # the buffer type of weights in the CPU's own layout

    def __call__(self, name: str, *args: Any) -> int:
        symbol = f"ggml_{name}"
        function = next(lib for lib in self._libraries if hasattr(lib, symbol))[symbol]
        function.restype = ctypes.c_int64
        wide = (ctypes.c_int64(arg) if isinstance(arg, int) else arg for arg in args)
        return int(function(*wide))

    def __del__(self) -> None:
        for free, pointer in reversed(self._owned):
            self(free, pointer)

    def _own(self, free: str, pointer: int) -> int:
        self._owned.append((free, pointer))
        return pointer

    def context(self) -> int:
        """For descriptions of tensors, without their values."""
        size = _TENSORS * self("tensor_overhead") + self("graph_overhead")
        return self._own("free", self("init", _Parameters(size, None, True)))

    def write(self, tensor: int, value: Tensor) -> None:
        """The values of a tensor."""
        self("backend_tensor_set", tensor, value.data_ptr(), 0, size_of(value))

    def weights(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
        """Of each expert ``packed [N, K/8]`` and ``scale [N, K/32]``; in the CPU's own layout."""
        rows, groups = pairs[0][1].shape
        if rows % 8:
            raise Declined(f"ggml repacks rows in eights, this weight has {rows}")
        # A block of Q4_0 is a scale, and 16 bytes of columns j (low half) and j + 16 (high).
        blocks = torch.empty((len(pairs), rows, groups, 18), dtype=torch.uint8)
        for block, (packed, scale) in zip(blocks, pairs, strict=True):
            octets = packed.contiguous().view(torch.uint8).view(rows, groups, 16)
            codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
            block[..., :2] = scale.half()[..., None].view(torch.uint8)
            block[..., 2:] = codes[..., :16] | codes[..., 16:] << 4
        context = self.context()
        tensor = self("new_tensor_3d", context, Q4_0, groups * 32, rows, len(pairs))
        buffer = self("backend_alloc_ctx_tensors_from_buft", context, self._repacked)
        self._own("backend_buffer_free", buffer)
        self.write(tensor, blocks)
        return tensor

    def graph(self, build: Callable[[int], tuple[int, ...]], *shape: int) -> Callable[..., Tensor]:
        """``build(context)`` gives the result, which has this shape, and the inputs."""
        context = self.context()
        result, *inputs = build(context)
        graph = self("new_graph", context)
        self("build_forward_expand", graph, result)
        allocator = self("gallocr_new", self("backend_cpu_buffer_type"))
        self("gallocr_alloc_graph", self._own("gallocr_free", allocator), graph)

        def run(*values: Tensor) -> Tensor:
            for tensor, value in zip(inputs, values, strict=True):
                self.write(tensor, value)
            self("backend_graph_compute", self.backend, graph)
            y = torch.empty(shape)
            self("backend_tensor_get", result, y.data_ptr(), 0, size_of(y))
            return y

        return run
