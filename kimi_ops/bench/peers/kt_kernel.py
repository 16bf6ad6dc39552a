"""kt-kernel of KTransformers, method RAWINT4: the layout of the checkpoint, int4 in groups of 32.

It is driven through its extension module and not through `KTMoEWrapper`, which reads safetensors
files and copies every call into pinned buffers. It copies the weights once, here those of the
experts that the calls choose, and never frees them: each case has it in a process of its own, which
costs a call some 20 us. Its threads are its own, as many as torch has in ``prepare``, and spin for
30 ms after a call. Activations are int8 in its kernels.

0.7.2 pins torch 2.9.1, but links none: `pip install --no-deps` keeps another.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from kimi_ops.bench.case import Args, size_of
from kimi_ops.bench.peers import Declined, Prepare, Prepared
from kimi_ops.bench.peers._experts import check_copy, chosen_experts, renumbered, shared_expert

NAME = "kt-kernel"
WRITTEN_AGAINST = "kt-kernel 0.7.2"
DEVICES = ("cpu",)
APART = 5e-2  # int8 activations
REST_S = 0.05  # its threads spin for 30 ms after a call
_GROUP = 32


def missing(device: str) -> str | None:
    """Whether it is installed."""
    if find_spec("kt_kernel") is None:
        return "kt-kernel is not installed: pip install --no-deps kt-kernel==0.7.2"
    return None


def _serve(
    ends: tuple[Connection, Connection],
    call: Args,
    chosen: list[int],
    longest: int,
    threads: int,
    calls: list[Any],
) -> None:
    """Loads a layer, then runs the calls whose numbers come; of ids, weights, x, y and tokens."""
    there, pipe = ends
    there.close()  # so that the end of the other process is seen
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # it prints
    kt_kernel: Any = import_module("kt_kernel")
    pool = kt_kernel.kt_kernel_ext.WorkerPoolConfig()
    pool.subpool_count = 1
    pool.subpool_numa_map = [0]
    pool.subpool_thread_count = [threads]
    workers = kt_kernel.kt_kernel_ext.CPUInfer(pool)

    _, gate_up, gate_up_scale, down, down_scale, _, ids = call[:7]
    _, hidden, words = down.shape
    # Its buffers follow one another without padding. They keep the alignment that its kernels want
    # only where experts and tokens are in eights.
    experts = chosen + chosen[:1] * (-len(chosen) % 8)
    on_gpu = torch.zeros(len(experts), dtype=torch.bool)
    sizes = (len(experts), ids.shape[1], hidden, 8 * words)
    config = kt_kernel.kt_kernel_ext.moe.MOEConfig(*sizes, on_gpu.data_ptr())
    config.pool = workers.backend_
    config.max_len = longest + -longest % 8
    config.quant_config.bits = 4
    config.quant_config.group_size = _GROUP
    config.quant_config.zero_point = False
    for name, packed, rows in (
        ("gate", (gate_up, gate_up_scale), slice(None, 8 * words)),
        ("up", (gate_up, gate_up_scale), slice(8 * words, None)),
        ("down", (down, down_scale), slice(None)),
    ):
        for kind, tensor in zip(("projs", "scales"), packed, strict=True):
            setattr(config, f"{name}_{kind}", [[tensor[e, rows].data_ptr() for e in experts]])
    layer = import_module("kt_kernel.utils.amx")._select_rawint4_backend(_GROUP)(config)
    in_order = torch.arange(len(experts))
    workers.submit(layer.load_weights_task(in_order.data_ptr()))
    workers.sync()

    pipe.send_bytes(b"loaded")
    with contextlib.suppress(EOFError):
        while True:
            number = int.from_bytes(pipe.recv_bytes(), "little")
            *pointers, tokens = (t.data_ptr() for t in calls[number])
            workers.submit(layer.forward_task(tokens, ids.shape[1], *pointers, False))
            workers.sync()
            pipe.send_bytes(b"done")


class _Process:
    """A forked process, which shares the tensors that are here: `_serve` with those arguments."""

    def __init__(self, *args: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, there = context.Pipe()
        ends = self._pipe, there
        self._process = context.Process(target=_serve, args=(ends, *args), daemon=True)
        self._process.start()
        there.close()
        self._answer()

    def __call__(self, number: int) -> None:
        self._pipe.send_bytes(number.to_bytes(4, "little"))
        self._answer()

    def __del__(self) -> None:
        self._process.kill()
        self._process.join()

    def _answer(self) -> None:
        try:
            self._pipe.recv_bytes()
        except EOFError:
            self._process.join()
            raise Declined(f"kt-kernel ended with code {self._process.exitcode}") from None


def _moe_experts_int4(calls: Sequence[Args]) -> Prepared:
    x, gate_up, gate_up_scale, down = calls[0][:4]
    if x.dtype != torch.bfloat16 or gate_up_scale.dtype != torch.bfloat16:
        raise Declined("kt-kernel's RAWINT4 takes bfloat16 activations and scales only")
    chosen = chosen_experts(calls)
    if x.shape[1] % 64 or down.shape[2] % 8:
        raise Declined("kt-kernel wants widths in 64s")
    check_copy(
        f"kt-kernel's copy of {len(chosen)} experts",
        len(chosen),
        1.125 * size_of(gate_up[0], down[0]),
    )
    ids = renumbered(calls, chosen, elsewhere=-1)
    # Anonymous shared memory, which a forked process sees.
    results = [
        torch.frombuffer(mmap.mmap(-1, max(size_of(call[0]), 1)), dtype=torch.bfloat16)
        for call in calls
    ]
    inputs = [
        (where, call[5].float(), call[0], y, torch.tensor([len(where)], dtype=torch.int32))
        for where, call, y in zip(ids, calls, results, strict=True)
    ]
    longest = max(len(call[0]) for call in calls)
    process = _Process(calls[0], chosen, longest, torch.get_num_threads(), inputs)

    def run(i: int) -> Tensor:
        process(i)
        y = results[i].view(calls[i][0].shape)
        shared = shared_expert(calls[i])
        return y if shared is None else y + shared

    return run


OPS: dict[str, Prepare] = {"moe_experts_int4": _moe_experts_int4}
