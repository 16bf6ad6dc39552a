"""``torch.compile`` of the chains that people leave to it, compiled for the sizes of each case.

The chains are those of `torch_eager`, but for rotations, which inductor fuses where they are
written out and leaves alone where they are complex.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_ops.bench.case import Args
from kimi_ops.bench.peers import Prepare, Prepared, torch_eager
from kimi_ops.bench.peers._experts import made_once, silu_mul

NAME = "torch.compile"
WRITTEN_AGAINST = "torch 2.13.0"
DEVICES = ("cpu", "cuda")
# Its code runs on the system's OpenMP, not on torch's. Threads of that spin on after a call: the
# next contestant has a core less and waits up to 8 ms.
REST_S = 0.02
_SIZES = 4096  # that one chain may be compiled for in a process; torch's own limit is 8


def missing(device: str) -> str | None:
    """Inductor writes C++ for a CPU and Triton for a GPU."""
    if device.startswith("cuda"):
        has_triton = find_spec("triton") is not None
        return None if has_triton else "triton is not installed: pip install triton"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs the C++ compiler {compiler}: install it, or set CXX to another"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "torch.compile needs Python's headers: install python3-dev"
    return None


def _compiled(
    chain: Callable[..., Any],
    arguments: Callable[[Sequence[Args]], Sequence[Args]] = lambda calls: calls,
) -> Prepare:
    """``prepare`` of a chain; ``arguments(calls)`` are what it takes in each call."""

    def prepare(calls: Sequence[Args]) -> Prepared:
        every = arguments(calls)
        function = torch.compile(chain, dynamic=False, fullgraph=True)
        trial = [a.clone() if isinstance(a, Tensor) else a for a in every[0]]
        config: Any = torch._dynamo.config
        with config.patch(recompile_limit=_SIZES, accumulated_recompile_limit=_SIZES):
            function(*trial)
        return lambda i: function(*every[i])

    return prepare


def _turn(x: Tensor, by: Tensor) -> Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = by.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def _absorb(q: Tensor, w_uk: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    nope, rope = q.split((w_uk.shape[1], 2 * table.shape[1]), dim=2)
    absorbed = torch.bmm(nope.transpose(0, 1), w_uk).transpose(0, 1)
    return torch.cat((absorbed, _turn(rope, table[positions][:, None])), dim=2)


def _absorb_arguments(calls: Sequence[Args]) -> list[Args]:
    table = torch.view_as_real(torch_eager.turns((call[2] for call in calls), calls[0][3]))
    weights = made_once(calls, 1, lambda call: call[1].contiguous())
    return [(call[0], weight, call[2], table) for call, weight in zip(calls, weights, strict=True)]


def _vision_rope(qkv: Tensor, turns: Tensor) -> Tensor:
    qkv[:, :2] = _turn(qkv[:, :2], turns)
    return qkv


def _vision_rope_arguments(calls: Sequence[Args]) -> list[Args]:
    found: list[Args] = []
    for qkv, grid in calls:
        angle = torch_eager.picture_angles(grid.tolist(), qkv.shape[3], qkv.device)
        found.append((qkv, torch.stack((angle.cos(), angle.sin()), dim=-1)[:, None, None]))
    return found


def _patch_merge_arguments(calls: Sequence[Args]) -> list[Args]:
    return [(call[0], call[1].tolist(), *call[3:]) for call in calls]


def _route_arguments(calls: Sequence[Args]) -> list[Args]:
    gates = made_once(calls, 1, lambda call: call[1].float())
    return [(call[0], gate, *call[2:]) for call, gate in zip(calls, gates, strict=True)]


OPS: dict[str, Prepare] = {
    "rms_norm": _compiled(torch_eager.rms_norm),
    "add_rms_norm": _compiled(torch_eager.add_rms_norm),
    "silu_mul": _compiled(silu_mul),
    "merge_attention": _compiled(torch_eager.merge_attention),
    "mla_absorb_query": _compiled(_absorb, _absorb_arguments),
    "moe_select": _compiled(torch_eager.select),
    "moe_route": _compiled(torch_eager.route, _route_arguments),
    "vision_rope": _compiled(_vision_rope, _vision_rope_arguments),
    "patch_merge": _compiled(torch_eager.patch_merge, _patch_merge_arguments),
}
