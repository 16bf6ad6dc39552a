"""The calls that tiles are tuned for: Kimi K2.5's shapes, and hostile cases that every tile must
pass.

A `TuneCase` is one call in two sizes. The full one is what an engine calls: it is timed on a GPU,
and says which entry of the table the case is about. Its sample is what the emulator executes
instead: as many steps along every loop where that can be had, but fewer programs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_ops.testing.inputs.mla import inv_freq

EPS = 1e-5


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of a case: normal deviates on a device, nothing at all on "meta"."""

    device: torch.device

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A tensor of normal deviates."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        generator = torch.Generator(self.device).manual_seed(0)
        values = torch.randn(shape, generator=generator, device=self.device)
        return (values * std).to(dtype)

    def ints(self, *values: int) -> Tensor:
        """An int32 vector."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)


Build = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class TuneCase:
    """One call to tune for.

    Attributes:
        op: its name.
        build: ``build(maker, *sizes)`` gives its arguments in the order of the schema.
        full, sample: sizes, see above; no sample where only all of a grid would be like it.
        checks: names of hostile cases (`kimi_ops.testing.cases`) that a tile must pass.
    """

    op: str
    build: Build
    full: tuple[int, ...]
    sample: tuple[int, ...] | None
    checks: tuple[str, ...]

    @property
    def name(self) -> str:
        """The sizes with their names: ``tokens=64,columns=7168``."""
        names = list(inspect.signature(self.build).parameters)[1:]
        return ",".join(f"{n}={size}" for n, size in zip(names, self.full, strict=True))

    def args(self, sizes: Sequence[int], device: torch.device) -> tuple[Any, ...]:
        """The arguments of the call in ``full`` or ``sample`` size."""
        return self.build(Maker(device), *sizes)


def _rms_norm(new: Maker, tokens: int, columns: int) -> tuple[Any, ...]:
    return new.normal(tokens, columns), new.normal(columns), EPS


def _add_rms_norm(new: Maker, tokens: int, columns: int) -> tuple[Any, ...]:
    return new.normal(tokens, columns), *_rms_norm(new, tokens, columns)


def _silu_mul(new: Maker, tokens: int, width: int) -> tuple[Any, ...]:
    return (new.normal(tokens, 2 * width),)


def _patch_merge(new: Maker, frames: int, height: int, width: int) -> tuple[Any, ...]:
    norms = (new.normal(1152) for _ in range(4))
    x = new.normal(frames * height * width, 1152)
    return x, new.ints(frames, height, width)[None], height * width // 4, *norms, EPS


def _mla_prefill(new: Maker, queries: int, keys: int, heads: int) -> tuple[Any, ...]:
    q, k = new.normal(queries, heads, 192), new.normal(keys, heads, 192)
    v = new.normal(keys, heads, 128)
    ends = new.ints(0, queries), new.ints(0, keys)
    return q, k, v, *ends, queries, keys, 192**-0.5, True


def _vision_attention(new: Maker, queries: int, heads: int) -> tuple[Any, ...]:
    q, k, v = new.normal(queries, 3, heads, 72).unbind(1)
    return q, k, v, new.ints(0, queries), queries, 72**-0.5


def _mla_absorb_query(new: Maker, tokens: int, heads: int) -> tuple[Any, ...]:
    w_uk = new.normal(heads, 256, 512, std=128**-0.5)[:, :128]
    positions = new.ints(*range(tokens))
    return new.normal(tokens, heads, 192), w_uk, positions, inv_freq(64).to(new.device)


def _moe_route(new: Maker, tokens: int) -> tuple[Any, ...]:
    gate = new.normal(384, 7168, std=7168**-0.5)
    bias = new.normal(384, dtype=torch.float32, std=0.1)
    return new.normal(tokens, 7168), gate, bias, 8, 1, 1, 2.827, True


def _cases(
    op: str, build: Build, checks: str, *sizes: tuple[tuple[int, ...], tuple[int, ...] | None]
) -> list[TuneCase]:
    return [TuneCase(op, build, full, sample, tuple(checks.split())) for full, sample in sizes]


_NORM = "bf16-hostile bf16-2x7168 bf16-3x127"
CASES: tuple[TuneCase, ...] = (
    *_cases("rms_norm", _rms_norm, _NORM, *(((t, 7168), (t, 7168)) for t in (1, 64)),
            ((4096, 7168), (132, 7168))),
    *_cases("add_rms_norm", _add_rms_norm, _NORM, *(((t, 7168), (t, 7168)) for t in (1, 64)),
            ((4096, 7168), (132, 7168))),
    # The shared expert, and the dense first layer.
    *_cases("silu_mul", _silu_mul, _NORM.replace("2x7168", "5x1025"), ((1, 2048), (1, 2048)),
            ((4096, 2048), (132, 2048)), ((1, 18432), (1, 18432)), ((4096, 18432), (16, 18432))),
    # One picture, and a clip's four frames.
    *_cases("patch_merge", _patch_merge, "bf16-mixed bf16-padding", ((1, 64, 64), (1, 24, 22)),
            ((4, 46, 36), (4, 24, 22))),
    # A prompt, and a chunk of a long one; one CTA of the sample is as long as the average one.
    *_cases("mla_prefill", _mla_prefill, "bf16-300 bf16-longer-keys",
            ((4096, 4096, 64), (128, 2048, 1)), ((2048, 32768, 64), (128, 4096, 1))),
    *_cases("vision_attention", _vision_attention, "bf16-300 bf16-mixed", ((4096, 16), (1024, 1)),
            ((1656, 16), (832, 1))),
    *_cases("mla_absorb_query", _mla_absorb_query, "bf16-130x2 bf16-17x3 bf16-1x64",
            *(((t, 64), (min(t, 256), 8)) for t in (1, 8, 64, 512, 4096))),
    *_cases("moe_route", _moe_route, "bf16-kimi-17 ties nan-rows",
            *(((t,), (t,)) for t in (8, 16, 32, 64))),
    *_cases("moe_route", _moe_route, "bf16-kimi-256", ((512,), (128,)), ((4096,), None)),
)  # fmt: skip
