"""A kernel with its arguments, as machines see it: memory laid out, parameters encoded."""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kimi_ops.testing.ptx.errors import LaunchError
from kimi_ops.testing.ptx.global_memory import GlobalMemory
from kimi_ops.testing.ptx.syntax import Variable
from kimi_ops.testing.ptx.tensor_maps import TensorMap
from kimi_ops.testing.ptx.text import Text

Argument = torch.Tensor | int | float | bytes | TensorMap


@dataclass(frozen=True)
class Checks:
    """Which of the optional checks are on. Bounds, alignment and convergence always are.

    Attributes:
        registers: reads of registers never written.
        shared_initialised: reads of shared memory never written.
        shared_races: unordered accesses of shared memory.
        global_races: unordered accesses of global memory by several CTAs.
    """

    registers: bool = True
    shared_initialised: bool = True
    shared_races: bool = True
    global_races: bool = True


class Launch:
    """A kernel with its arguments, as machines see it.

    Attributes:
        text: what follows from the text alone; of it program, flow, entries, uses.
        fusion: which instructions run as one, or None for each on its own.
        rows: names of the registers, in the order of the register files.
        grid, block: three sizes.
        memory: global buffers.
        addresses: variable -> address in its own space.
        params: entry parameters -> bytes.
        watched: registers that some path may read before it writes them.
        granule: bytes per race stamp in shared memory.
        shared_bytes, dynamic_bytes, local_bytes: per CTA, of them dynamic, per thread.
        has_mbarriers: whether the program has any.
        random: None, or the generator of the schedule.
        step_limit: blocks a batch may run.
    """

    def __init__(
        self,
        text: Text,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_bytes: int,
        checks: Checks,
        seed: int | None,
        step_limit: int,
        *,
        fuse: bool,
    ) -> None:
        self.text, self.program, self.flow = text, text.program, text.flow
        self.entries, self.uses = text.entries, text.uses
        self.fusion = text.fusion if fuse else None
        program = self.program
        self.rows = text.fusion.rows if fuse else list(program.registers)
        self.grid, self.block = grid, block
        self.checks, self.dynamic_bytes, self.step_limit = checks, dynamic_bytes, step_limit
        self.random = None if seed is None else np.random.default_rng(seed)
        self.memory = GlobalMemory(program.name)
        self.memory.check_races = checks.global_races
        self.addresses: dict[str, int] = {}
        self.params: dict[str, bytes] = {}
        self.shared_bytes = self._place("shared")
        dynamic = [v for v in program.variables.values() if v.space == "shared" and not v.size]
        start = -(-self.shared_bytes // 16) * 16 if dynamic else self.shared_bytes
        for variable in dynamic:
            self.addresses[variable.name] = -(-start // variable.align) * variable.align
        self.shared_bytes = max([*(self.addresses[v.name] for v in dynamic), start]) + dynamic_bytes
        self.local_bytes = self._place("local", "param")
        self._place_globals()
        self.has_mbarriers = any(i.parts[0] == "mbarrier" for i in program.code)
        self.granule = text.granules["shared"]
        self.memory.granule = text.granules["global"]
        self.watched = text.watched if checks.registers else set()

    def _place(self, *spaces: str) -> int:
        end = 0
        for variable in self.program.variables.values():
            if variable.space in spaces and variable.size:
                end = -(-end // variable.align) * variable.align
                self.addresses[variable.name] = end
                end += variable.size
        return end

    def _place_globals(self) -> None:
        variables = [v for v in self.program.variables.values() if v.space in ("global", "const")]
        images = {v.name: np.zeros(max(v.size, 1), np.uint8) for v in variables}
        for v in variables:
            self.addresses[v.name] = self.memory.add_bytes(v.name, images[v.name])
        for v in variables:
            if v.data is not None:
                images[v.name][: len(v.data)] = np.frombuffer(v.data, np.uint8)
            for offset, name in v.pointers:
                address = np.array([self.addresses[name]], np.uint64).view(np.uint8)
                images[v.name][offset : offset + 8] = address

    def bind_params(self, args: Sequence[Argument], uninitialised: Sequence[torch.Tensor]) -> None:
        """Lays out the arguments as the parameter space has them.

        Raises:
            LaunchError: wrong number, or a value that does not fit its parameter.
        """
        params = self.program.params
        if len(args) != len(params):
            raise LaunchError(f"{self.program.name} takes {len(params)} arguments, got {len(args)}")
        fresh = {id(t) for t in uninitialised}
        if unknown := fresh - {id(a) for a in args}:
            raise LaunchError(f"{len(unknown)} uninitialised tensors are no arguments")
        for position, (param, value) in enumerate(zip(params, args, strict=True)):
            data = self.params[param.name] = self._encoded(param, value, position, fresh)
            if param.size > 8:
                # Structs may be used by address: tensor maps are.
                image = np.frombuffer(data, np.uint8).copy()
                self.addresses[param.name] = self.memory.add_bytes(f"parameter {position}", image)

    def _encoded(self, param: Variable, value: Argument, position: int, fresh: set[int]) -> bytes:
        what = f"argument {position} of {self.program.name}"
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu" or param.size != 8:
                raise LaunchError(f"{what}: a tensor must be on the CPU, its parameter a pointer")
            address = self.memory.add_tensor(
                f"argument {position}", value, initialised=id(value) not in fresh
            )
            return address.to_bytes(8, "little")
        if isinstance(value, TensorMap):
            address = self.memory.add_tensor(f"argument {position}", value.tensor, initialised=True)
            value = value.layout(address).encode()
        if isinstance(value, bytes):
            if len(value) != param.size:
                raise LaunchError(f"{what} has {param.size} bytes, got {len(value)}")
            return value
        scalar = param.type
        if not isinstance(value, float):
            try:
                value = operator.index(value)
            except TypeError:
                raise LaunchError(f"{what}: a {type(value).__name__}") from None
        elif scalar.kind in "us":
            raise LaunchError(f"{what}: a float for a parameter of type .{scalar.name}")
        if scalar.kind == "f" or isinstance(value, float):
            if param.size not in (4, 8):
                raise LaunchError(f"{what}: a float for a parameter of {param.size} bytes")
            return struct.pack("<f" if param.size == 4 else "<d", value)
        if not -(1 << (8 * param.size - 1)) <= value < 1 << (8 * param.size):
            raise LaunchError(f"{what}: {value} does not fit {param.size} bytes")
        return (int(value) & ((1 << 8 * param.size) - 1)).to_bytes(param.size, "little")
