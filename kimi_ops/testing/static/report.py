"""The static report of one kernel on one architecture."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from kimi_ops.testing.devices import Device
from kimi_ops.testing.static.disassembly import read_sass
from kimi_ops.testing.static.instructions import Mix, count
from kimi_ops.testing.static.loops import Loop, find_loops, hottest
from kimi_ops.testing.static.occupancy import Occupancy, occupancy
from kimi_ops.testing.static.toolchain import PtxasLog, ToolError, disassemble


@dataclass(frozen=True)
class AmdRegisters:
    """What only AMD's compiler reports, from the metadata of the assembly.

    Attributes:
        vgprs, agprs: vector registers and accumulation registers per lane.
        sgprs: scalar registers per wave.
        vgpr_spills, sgpr_spills: registers that the compiler had to move away: to memory, but
            also vector ones to accumulation registers and scalar ones to vector registers.
        compiler_occupancy: waves per SIMD by registers, as the compiler states them.
    """

    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    compiler_occupancy: int


@dataclass(frozen=True)
class KernelReport:
    """What the compiler made of one kernel for one architecture.

    Attributes:
        kernel: name, as in the binary.
        case: name of what was compiled; the kernel's own name if nobody gave another.
        language: ``triton`` or ``cuda``.
        arch: as in `kimi_ops.testing.devices`.
        threads_per_block: None where neither the source nor the case says it.
        registers: per thread; AMD: VGPRs and AGPRs together.
        spill_store_bytes, spill_load_bytes: per thread, each instruction counted once.
        stack_bytes: local memory (AMD: scratch) per thread, spills included.
        static_shared_bytes, dynamic_shared_bytes: per block (AMD: LDS).
        shared_limit_bytes: the most that one block can have on the device.
        tensor_memory_columns: of sm_100's tensor memory, as far as the compiler states it.
        occupancy: None without ``threads_per_block``.
        code_bytes: size of the kernel's code, padding and called functions included.
        mix: of all its instructions.
        loops: by address.
        notes: warnings of the assembler and limits of this report.
        amd: only on AMD.
        artifacts: ``ptx``, ``sass``, ``cubin``, ``ttgir``, ``amdgcn``, ... as far as they exist.
    """

    kernel: str
    case: str
    language: str
    arch: str
    threads_per_block: int | None
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    shared_limit_bytes: int
    tensor_memory_columns: int
    occupancy: Occupancy | None
    code_bytes: int
    mix: Mix
    loops: tuple[Loop, ...]
    notes: tuple[str, ...]
    amd: AmdRegisters | None = None
    artifacts: dict[str, str | bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one block, static and dynamic."""
        return self.static_shared_bytes + self.dynamic_shared_bytes

    @property
    def hottest_loop(self) -> Loop | None:
        """The loop that most likely runs most; see `kimi_ops.testing.static.loops.hottest`."""
        return hottest(self.loops)

    def to_json(self) -> dict[str, Any]:
        """Everything but the artifacts, as plain values."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del plain["artifacts"]
        for name in ("occupancy", "mix", "amd"):
            value = plain[name]
            plain[name] = None if value is None else dataclasses.asdict(value)
        plain["loops"] = [dataclasses.asdict(loop) for loop in self.loops]
        hot = self.hottest_loop
        plain["hottest_loop"] = None if hot is None else dataclasses.asdict(hot)
        return plain

    def __str__(self) -> str:
        lines = [
            f"{self.case} ({self.kernel}) for {self.arch}: {self.registers} registers, spills "
            f"{self.spill_store_bytes} B stored and {self.spill_load_bytes} B loaded, stack "
            f"{self.stack_bytes} B",
            f"  shared memory {self.static_shared_bytes} B static + {self.dynamic_shared_bytes} B "
            f"dynamic of {self.shared_limit_bytes} B per block",
        ]
        if self.occupancy:
            o = self.occupancy
            lines.append(
                f"  {o.blocks} blocks of {self.threads_per_block} threads = {o.warps} of "
                f"{o.warps_limit} warps per SM, limited by {o.limited_by}"
            )
        classes = ", ".join(f"{name} {n}" for name, n in self.mix.classes.items())
        lines.append(f"  {self.mix.instructions} instructions in {self.code_bytes} B: {classes}")
        if self.mix.memory:
            lines.append(f"  {', '.join(f'{n} x {name}' for name, n in self.mix.memory.items())}")
        if self.mix.other:
            lines.append(f"  unknown: {', '.join(f'{n} x {o}' for o, n in self.mix.other.items())}")
        if hot := self.hottest_loop:
            classes = ", ".join(f"{name} {n}" for name, n in hot.mix.classes.items())
            lines.append(
                f"  hottest loop at {hot.start:#x}: {hot.mix.instructions} instructions: {classes}"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def block_threads(ptx: str, kernel: str) -> int | None:
    """Threads per block that PTX requires (``.reqntid``) or allows (``.maxntid``), or None."""
    start = re.search(rf"\.entry\s+{re.escape(kernel)}\s*\(", ptx)
    if start is None:
        raise ToolError(f"the PTX has no kernel {kernel}")
    head = ptx[start.end() : ptx.index("{", start.end())]
    directive = re.search(r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
    if directive is None:
        return None
    x, y, z = (int(size or 1) for size in directive.groups())
    return x * y * z


def report_cubin(
    kernel: str,
    *,
    case: str,
    language: str,
    device: Device,
    cubin: bytes,
    ptx: str,
    log: PtxasLog,
    sass: str | None = None,
    threads_per_block: int | None = None,
    dynamic_shared_bytes: int = 0,
    tensor_memory_columns: int = 0,
    notes: tuple[str, ...] = (),
    artifacts: dict[str, str | bytes] | None = None,
) -> KernelReport:
    """The report of one kernel of a cubin.

    Args:
        kernel: its name in the cubin.
        case, language, device: for the report.
        cubin, ptx, log: what the compilers made; the log must be of this very cubin.
        sass: disassembly of the cubin, if it is at hand.
        threads_per_block: of the launch; by default what the PTX states.
        dynamic_shared_bytes: of the launch.
        tensor_memory_columns: that a block allocates.
        notes: more of them, such as warnings of the front end.
        artifacts: more of them.

    Raises:
        ToolError: no such kernel, or the log and the disassembly contradict each other.
    """
    sass = disassemble(cubin) if sass is None else sass
    functions = read_sass(sass, kernel)
    if kernel not in functions or kernel not in log.kernels:
        raise ToolError(
            f"no kernel {kernel}; there are {', '.join(sorted({*functions, *log.kernels}))}"
        )
    function, resources = functions[kernel], log.kernels[kernel]
    mix = count(function.instructions)
    # A function that was not inlined stands in the kernel's section as $kernel$function.
    called = [
        figures
        for name, figures in log.functions.items()
        if any(label.endswith(f"${name}") or label == name for label in function.labels)
    ]
    if mix.classes.get("local", 0) and not resources.stack_bytes:
        raise ToolError(f"{kernel}: ptxas states no local memory, but the SASS uses it")
    threads = threads_per_block or block_threads(ptx, kernel)
    shared = resources.static_shared_bytes + dynamic_shared_bytes
    jumps = len(function.unresolved)
    notes = (*notes, *resources.warnings)
    if jumps:
        notes += (f"{jumps} indirect jumps with unknown targets: loops may be missing",)
    return KernelReport(
        kernel=kernel,
        case=case,
        language=language,
        arch=device.arch,
        threads_per_block=threads,
        registers=resources.registers,
        spill_store_bytes=resources.spill_store_bytes + sum(stores for _, stores, _ in called),
        spill_load_bytes=resources.spill_load_bytes + sum(loads for _, _, loads in called),
        stack_bytes=resources.stack_bytes,
        static_shared_bytes=resources.static_shared_bytes,
        dynamic_shared_bytes=dynamic_shared_bytes,
        shared_limit_bytes=device.shared_per_block_bytes,
        tensor_memory_columns=tensor_memory_columns,
        occupancy=None
        if threads is None
        else occupancy(
            device,
            threads_per_block=threads,
            registers=resources.registers,
            shared_bytes=shared,
            tensor_memory_columns=tensor_memory_columns,
        ),
        code_bytes=function.code_bytes,
        mix=mix,
        loops=find_loops(function.instructions),
        notes=notes,
        artifacts={**(artifacts or {}), "ptx": ptx, "sass": sass, "cubin": cubin},
    )
