"""Calls of Kimi K2.5's size, each launch executed in part: a sample of its grid, as PTX.

The calls are those of the model in `kimi_ops.bench.step_calls`, and beside them the same sizes for
ops that a step does not call. A call is laid out in full, with all its arguments; of each grid only
some CTAs run in the emulator:

- at random places, one in each of as many equal parts of the grid;
- of packed attention the tiles in the middle, which are as long as the average one, of one head;
- of products with experts' weights those that have tokens (the others end after one load), and
  beside them some of the shared expert's, which add to the work and do not wait for them;
- of small grids whose CTAs wait for each other, or write what the next launch is steered by, all.

What an earlier launch of the same call took is in L2 for the next; everything else comes from DRAM,
once. Routing is even and random (`kimi_ops.bench.step_calls.routing`). Values are random, but
weights in int4 and their scales are 0: nothing counted depends on them.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from kimi_ops._dispatch import get_op
from kimi_ops._target import targeting
from kimi_ops.bench.step_calls import STEPS, VISION, Call, calls_of, gpu_of, routing, traffic
from kimi_ops.cuda import _int4
from kimi_ops.cuda._launcher import SOURCES, Launcher, current_launcher, use_launcher
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.rope import yarn_inv_freq
from kimi_ops.testing.check import as_tuple
from kimi_ops.testing.cost import CostError, Rates
from kimi_ops.testing.ptx import Checks, Kernel, Report
from kimi_ops.testing.ptx.launch import Launch
from kimi_ops.testing.ptx.machine import Machine
from kimi_ops.testing.ptx.types import WARP, Array
from kimi_ops.testing.runner import emulated
from kimi_ops.testing.static.cuda_source import report_cuda
from kimi_ops.testing.static.report import KernelReport
from kimi_ops.testing.static.triton_kernel import triton_module

_UNCHECKED = Checks(False, False, False, False)  # tests check the kernels; counts are the same
_STEP_LIMIT = 50_000_000
_BATCH_THREADS = 8192
# Kernel -> CTAs that are executed; of others `_CTAS`.
_SAMPLES = {"mla_decode_split": 4, "_gate_up_": 12, "_down_": 12}
_CTAS = 8
_IDLE = 1 / 30  # of the longest CTA's instructions: what ends after one load has fewer
_ALIGNMENT = 256  # bytes, of an allocation on a GPU
_STD = {"bias": 0.1, "gate_weight": 7168**-0.5}  # so that the router meets no ties
_WHOLE = 64  # tokens up to which the router's selection is in the launch of its product


@dataclass(frozen=True)
class Case:
    """A call to be modelled.

    Attributes:
        op, name: of the op; of the step that makes such a call, or of its picture.
        args: on "meta", in the order of the schema.
        full: left out of an ordinary run.
    """

    op: str
    name: str
    args: tuple[Any, ...]
    full: bool

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the tensors among the arguments, by name."""
        named = zip(get_op(self.op).params, self.args, strict=True)
        return {name: list(value.shape) for name, value in named if isinstance(value, Tensor)}


def _beside(calls: Mapping[str, Call]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls of ops that the model does not call in a step, in the sizes of those that it does."""
    if call := calls.get("mla_decode_value"):
        q, *cache, w_uv, scale, rank = call.args
        yield "mla_decode", (q, *cache, scale, rank)
        yield "mla_project_value", (q.new_empty(q.shape[0] * q.shape[1], q.shape[2], rank), w_uv)
    if call := calls.get("mla_prefill"):
        part = get_op("mla_prefill").outputs(*call.args)
        yield "merge_attention", (*part, *(torch.empty_like(x) for x in part))
    if call := calls.get("moe_route"):
        x, gate, *rest = call.args
        logits = x.new_empty(len(x), len(gate), dtype=torch.float32)
        yield "moe_select", (logits, *rest)
        yield "moe_sort", (x.new_empty(len(x), rest[1], dtype=torch.int32), len(gate), None)
        yield "moe_route_sort", (*call.args, None)
    if call := calls.get("moe_experts_int4"):
        x, packed, scale, *_ = call.args
        yield "int4_linear", (x, packed[0], scale[0])


def cases_of(op: str, *, full: bool = False) -> list[Case]:
    """The cases of an op, the ordinary one first; without ``full`` only that one.

    Raises:
        ValueError: an unknown op.
    """
    get_op(op)
    found: dict[str, Case] = {}
    for step in STEPS:
        calls = {call.op: call for call in calls_of(step) if call.ours}
        vision = [name for name, call in calls.items() if call.part == VISION]
        for name, args in [(c.op, c.args) for c in calls.values()] + list(_beside(calls)):
            if name == op:
                text = step.picture_name if name in vision else step.name
                case = Case(op, text, args, full=bool(found))
                found.setdefault(str(case.shapes), case)
    return [case for case in found.values() if full or not case.full]


def _content(name: str, like: Tensor, case: Case) -> Tensor | None:
    """What an integer argument or one of angles holds; None of any other."""
    given = dict(zip(get_op(case.op).params, case.args, strict=True))
    if name == "inv_freq":
        return yarn_inv_freq(KimiK25Config.full_size().text_config)
    if name in ("positions", "slot_mapping", "page_table"):
        return torch.arange(like.numel()).view(like.shape)
    if name == "seq_lens":
        return torch.full(like.shape, given["page_table"].shape[1] * given["kv_cache"].shape[1])
    if name == "ids":
        experts = given["num_experts"] if "num_experts" in given else len(given["down_packed"])
        return routing(like.shape[0], experts, like.shape[1])
    if name.startswith("cu_seqlens"):
        return torch.tensor([0, len(given["k" if name.endswith("_k") else "q"])])
    if name == "grid_thws":
        side = math.isqrt(len(given["qkv" if "qkv" in given else "x"]))
        return torch.tensor([[1, side, side]])
    return None


def arguments_of(case: Case) -> tuple[Any, ...]:
    """The arguments of a case on the CPU: views as the model has them, memory that costs nothing
    until something touches it, random values but for weights in int4 and their scales."""
    storages: dict[int, Tensor] = {}
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    made: list[Any] = []
    for name, arg in zip(get_op(case.op).params, case.args, strict=True):
        if not isinstance(arg, Tensor):
            made.append(arg)
            continue
        key, size = arg.untyped_storage()._cdata, arg.untyped_storage().nbytes()
        flat = storages.get(key)
        if flat is None:
            raw = np.zeros(size + _ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % _ALIGNMENT
            flat = torch.from_numpy(raw[start : start + size]).view(arg.dtype)
            if arg.is_floating_point() and not name.endswith("scale"):
                values = (pool * _STD.get(name, 1.0)).roll(4099 * len(storages))
                for start in range(0, len(flat), len(values)):
                    part = flat[start : start + len(values)]
                    part.copy_(values[: len(part)])
            storages[key] = flat
        tensor = flat.as_strided(arg.shape, arg.stride(), arg.storage_offset())
        if (content := _content(name, arg, case)) is not None:
            tensor.copy_(content)
        made.append(tensor)
    return tuple(made)


@dataclass
class Launched:
    """A launch that was executed in part.

    Attributes:
        compiled: gives its static report for an architecture.
        arguments: by name, or of CUDA C++ in order.
        parts: for each kind of CTAs the report of those executed, and how many there are in all.
        dram_bytes: of the whole grid.
    """

    compiled: Callable[[str], KernelReport]
    arguments: Mapping[str, Any] | Sequence[Any]
    parts: list[tuple[Report, int]] = field(default_factory=list)
    dram_bytes: float = 0


@functools.cache
def _cuda_reports(source: str, arch: str) -> dict[str, KernelReport]:
    return report_cuda(SOURCES / source, arch)


def _expert_ctas(
    launched: Launched, name: str, grid: Sequence[int], ids: Tensor
) -> tuple[Array, Array, int]:
    """Numbers of a product's CTAs for the shared expert and for the chosen ones, and how many of
    the latter have tokens; `kernels/moe_experts_int4.py` and `kimi_ops/cuda/moe_experts_int4.py`
    lay the grid out."""
    numbers, given = np.arange(math.prod(grid)), launched.arguments
    if isinstance(given, Mapping):
        tokens, blocks = given["TOKENS"], given["blocks"]
        shared = numbers < given["shared_programs"]
    elif "_many_" in name:
        shared_tiles, shared_blocks, _, blocks = given[13:17]
        tokens, shared = _int4._MANY, numbers < shared_tiles * shared_blocks
    else:
        shared_blocks, _, blocks = given[14:17]
        tokens, shared = _int4._MOST, numbers % grid[0] < shared_blocks
    tiles = int((~shared).sum()) // blocks
    used = (-(-torch.bincount(ids.flatten().long()) // tokens)).sum()
    return numbers[shared], numbers[~shared], tiles * int(used)


def _some(numbers: Array, wanted: int) -> Array:
    """Of some CTAs one at a random place in each of so many equal parts, in order."""
    if len(numbers) <= wanted:
        return numbers
    edges = np.linspace(0, len(numbers), wanted + 1).astype(np.int64)
    return numbers[np.random.default_rng(0).integers(edges[:-1], edges[1:])]


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*map(int, sizes), 1, 1)[:3]
    return x, y, z


@dataclass
class _Sampler:
    """Executes some CTAs of each launch of a call.

    Attributes:
        ids: of experts, where the call has any.
        experts: whose weights the call has.
        whole: whether every CTA of every grid runs.
        due: storage -> bytes of it that DRAM has yet to move.
        warm: storages that are in L2.
        launched: so far, the last one not yet executed when `launch` is called.
    """

    ids: Tensor | None
    experts: int
    whole: bool
    due: dict[int, float]
    warm: set[int] = field(default_factory=set)
    launched: list[Launched] = field(default_factory=list)

    def _places(self, name: str, grid: Sequence[int]) -> list[tuple[Array, int]]:
        """Of each kind of CTAs the numbers of those that are executed, and how many there are
        that have something to do."""
        count = math.prod(grid)
        if "packed_attention" in name:  # half of the grid's columns are for rows of no sequence
            tiles = grid[0] // 2
            middle = sorted({(tiles - 1) // 2, tiles // 2})
            return [(np.array(middle), tiles * math.prod(grid[1:]))]
        wanted = next((n for part, n in _SAMPLES.items() if part in name), _CTAS)
        if self.ids is not None and ("_gate_up_" in name or "_down_" in name):
            shared, chosen, used = _expert_ctas(self.launched[-1], name, grid, self.ids)
            some = _some(chosen, -(-wanted * len(chosen) // used))
            return [(some, used), (_some(shared, wanted // 4), len(shared))]
        if "experts_int4_prepare" in name:  # a program for each expert, then those of the tokens
            numbers = np.arange(count)
            lists, tokens = numbers[: self.experts], numbers[self.experts :]
            return [(lists, len(lists)), (_some(tokens, wanted), len(tokens))]
        return [(_some(np.arange(count), count if self.whole else wanted), count)]

    def launch(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        dynamic_shared_bytes: int = 0,
        cooperative: bool = False,
        **checks: Any,
    ) -> Report:
        """In the place of `Kernel.launch`, whose checks are left to the tests of the kernels."""
        sizes = _three(grid), _three(block)
        storages = {n: a.untyped_storage().data_ptr() for n, a in enumerate(args)
                    if isinstance(a, Tensor)}  # fmt: skip
        launched = self.launched[-1]
        for numbers, count in self._places(kernel.name, sizes[0]):
            if not count:
                continue
            launch = Launch(
                kernel.text, *sizes, dynamic_shared_bytes, _UNCHECKED, None, _STEP_LIMIT, fuse=True
            )
            launch.bind_params(args, ())
            for buffer in launch.memory.buffers:
                kind, _, position = buffer.name.partition(" ")
                if kind == "argument" and storages[int(position)] in self.warm:
                    buffer.touched[:] = True
            report = _executed(kernel, launch, numbers)
            if "_gate_up_" in kernel.name or "_down_" in kernel.name:
                _leave_out_idle(report)
            launched.parts.append((report, count))
        launched.dram_bytes = sum(self.due.pop(key, 0.0) for key in storages.values())
        self.warm.update(storages.values())
        return launched.parts[0][0]


def _leave_out_idle(report: Report) -> None:
    """Counts only CTAs that had something to do; what the others did is next to nothing."""
    issued = report.cta_instructions
    report.cta_instructions = issued[issued > issued.max() * _IDLE]
    report.ctas = len(report.cta_instructions)


def _executed(kernel: Kernel, launch: Launch, numbers: Array) -> Report:
    """The report of some CTAs."""
    threads = math.prod(launch.block)
    batch = max(1, min(len(numbers), _BATCH_THREADS // (-(-threads // WARP) * WARP)))
    machine = Machine(launch, batch)
    with np.errstate(all="ignore"):
        for start in range(0, len(numbers), batch):
            machine.run(numbers[start : start + batch])
    report = kernel._report(launch, machine, len(numbers), threads)
    report.cta_instructions = report.cta_instructions[numbers]
    return report


@dataclass
class _Noting:
    """Notes launches of CUDA C++ before another launcher carries them out."""

    sampler: _Sampler
    inner: Launcher

    def launch(
        self, source: Any, name: str, grid: Any, block: Any, args: Any, **named: Any
    ) -> None:
        """As `Launcher.launch`."""

        def compiled(arch: str) -> KernelReport:
            return _cuda_reports(source.name, arch)[name]

        self.sampler.launched.append(Launched(compiled, list(args)))
        self.inner.launch(source, name, grid, block, args, **named)


def executed(case: Case, args: tuple[Any, ...], backend: str, rates: Rates) -> list[Launched]:
    """The launches of a call for a GPU, each executed in part.

    Raises:
        CostError: the backend does not take the call.
        PtxError: something that the emulator does not execute.
    """
    trials = importlib.import_module("kimi_ops.tune.trials")
    contract, gpu = get_op(case.op), gpu_of(rates)
    named = dict(zip(contract.params, args, strict=True))
    outputs = contract.outputs(*args)
    due: dict[int, float] = {}
    for name, size in traffic(case.op, args).items():
        tensors = [named[name]] if name else list(as_tuple(outputs))
        for tensor in tensors:
            key = tensor.untyped_storage().data_ptr()
            due[key] = due.get(key, 0.0) + size / len(tensors)
    routes = case.op in ("moe_route", "moe_route_sort")
    experts = len(named["down_packed"]) if "down_packed" in named else 0
    whole = routes and len(named["x"]) <= _WHOLE
    sampler = _Sampler(named.get("ids"), experts, whole, due)
    module = importlib.import_module(f"kimi_ops.{'kernels' if backend == 'triton' else backend}."
                                     f"{case.op}")  # fmt: skip
    with targeting(gpu), emulated(arch=gpu.capability, checks=_UNCHECKED):
        if reason := module.unsupported(*args):
            raise CostError(reason)
        carry_out = triton_module().runtime.jit.JITFunction.run

        def run(kernel: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            with trials.noting(execute=False) as noted:
                kernel.run(*given, grid=grid, warmup=warmup, **options)
            compiled = functools.cache(functools.partial(trials.compiled, noted[0]))
            sampler.launched.append(Launched(compiled, noted[0].arguments))
            return carry_out(kernel, *given, grid=grid, warmup=warmup, **options)

        with (
            mock.patch.object(triton_module().runtime.jit.JITFunction, "run", run),
            mock.patch.object(Kernel, "launch", lambda *a, **k: sampler.launch(*a, **k)),
            use_launcher(_Noting(sampler, current_launcher())),
        ):
            module.launch(outputs, *args)
    return sampler.launched
