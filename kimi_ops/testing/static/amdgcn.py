"""Reports on AMD kernels from the assembly text that Triton's AMD compiler writes.

The figures are those of the metadata at its end (LLVM "User Guide for AMDGPU Backend", section
"Code Object V5 Metadata") and of the comments that LLVM writes next to spills.
"""

from __future__ import annotations

import re

from kimi_ops.testing.devices import Device
from kimi_ops.testing.static.instructions import Access, Instruction, count
from kimi_ops.testing.static.loops import find_loops
from kimi_ops.testing.static.occupancy import occupancy
from kimi_ops.testing.static.report import AmdRegisters, KernelReport
from kimi_ops.testing.static.toolchain import ToolError

# First match wins; names from the CDNA3 Instruction Set Architecture guide.
_CLASSES = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"v_s?mfmac?_", "tensor"),
        (r"v_(readlane|writelane|permlane|mov_b32_dpp)|ds_(b?permute|swizzle)", "shuffle"),
        (r"v_accvgpr_|v_mov|v_cndmask|v_readfirstlane|v_swap|s_mov|s_cmov|s_cselect", "move"),
        (r"v_cvt_|s_cvt_", "convert"),
        (r"v_pk_mov", "move"),
        (r"v_(exp|log|rcp|rsq|sqrt|sin|cos|div_scale|div_fmas|div_fixup)_", "special"),
        (r"v_[a-z0-9_]*_f64", "fp64"),
        (r"v_[a-z0-9_]*_(bf16|f16)", "fp16"),
        (r"v_[a-z0-9_]*_f32|v_dot2", "fp32"),
        (r"v_[a-z0-9_]*_[iub](8|16|24|32|64|128)|v_(perm|bfi|bfe|alignb|dot[48])", "integer"),
        (r"v_nop|s_nop", "nop"),
        (r"s_(wait|barrier|sendmsg|dcache|icache|gl1|setprio|sched)|buffer_(wb|inv|gl)", "barrier"),
        (
            r"s_(branch|cbranch|endpgm|trap|call|setpc|swappc|getpc|sleep|sethalt|set_gpr)",
            "control",
        ),
        (r"s_(buffer_|scratch_)?(load|store)_", "constant"),
        (r"s_(getreg|setreg|memtime|memrealtime)", "move"),
        (r"s_[a-z0-9_]*_[iub](16|32|64)", "integer"),
        (r"(global|flat|buffer|ds)_(atomic|add|sub|min|max|and|or|xor|cmpst|inc|dec)", "atomic"),
        (r"global_load_lds_", "async copy"),
        (r"(global|buffer)_(load|store)", "global"),
        (r"scratch_(load|store)", "local"),
        (r"flat_(load|store)", "generic"),
        (r"ds_(read|write|load|store)", "shared"),
    )
)
_BITS = (
    (r"_dwordx4|_b128", 128),
    (r"_dwordx3|_b96", 96),
    (r"_dwordx2|_b64", 64),
    (r"_(u|s|i)?(byte|b8|u8|i8)", 8),
    (r"_(u|s|i)?(short|b16|u16|i16)", 16),
)
_SPACES = {"global": "global", "local": "local", "generic": "generic", "shared": "shared"}
_INSTRUCTION = re.compile(r"\s+([a-z][a-z0-9]*_[a-z0-9_]+)\b(.*)$")
_LABEL = re.compile(r"(\.L[\w$.]+):")
# LLVM prints its own count of the bytes; instructions here are numbered as if all had four.
_STEP = 4


def _access(opcode: str, kind: str) -> Access | None:
    what = "store" if re.search("store|write", opcode) else "load"
    bits = next((n for pattern, n in _BITS if re.search(pattern, opcode)), 32)
    if kind == "async copy":
        return Access("global", "async load", bits)
    if kind not in _SPACES:
        return None
    # ds_read2_b64 moves two elements.
    return Access(_SPACES[kind], what, bits * (2 if re.search(r"(read|write)2", opcode) else 1))


def _instructions(body: str) -> tuple[Instruction, ...]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in body.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines) * _STEP
        elif match := _INSTRUCTION.match(line.partition(";")[0]):
            lines.append((match[1], match[2]))
    found = []
    for n, (opcode, operands) in enumerate(lines):
        kind = next((kind for pattern, kind in _CLASSES if pattern.match(opcode)), "other")
        if opcode.startswith("buffer_load") and operands.split()[-1] == "lds":
            kind = "async copy"
        targets: tuple[int, ...] = ()
        if opcode.startswith(("s_branch", "s_cbranch")):
            name = operands.split()[0]
            if name not in labels:
                raise ToolError(f"jump to an unknown label {name!r}: {opcode}{operands}")
            targets = (labels[name],)
        falls_through = opcode not in ("s_branch", "s_endpgm", "s_setpc_b64")
        found.append(
            Instruction(n * _STEP, opcode, kind, _access(opcode, kind), targets, falls_through)
        )
    return tuple(found)


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text, re.M)
    if found is None:
        raise ToolError(f"the AMD assembly states no {pattern!r}")
    return int(found[1])


def report_amdgcn(
    kernel: str,
    *,
    case: str,
    device: Device,
    assembly: str,
    threads_per_block: int,
    dynamic_shared_bytes: int,
    artifacts: dict[str, str | bytes] | None = None,
) -> KernelReport:
    """The report of the one kernel of an assembly text.

    Args:
        kernel: its name.
        case, device: for the report.
        assembly: text for LLVM's assembler, metadata included.
        threads_per_block: of the launch.
        dynamic_shared_bytes: LDS that the launch asks for on top of the static.
        artifacts: for the report, besides the assembly.

    Raises:
        ToolError: a figure is not in the metadata.
    """
    start = re.search(rf"^{re.escape(kernel)}:", assembly, re.M)
    end = re.search(rf"^\s*\.size\s+{re.escape(kernel)},", assembly, re.M)
    if start is None or end is None:
        raise ToolError(f"the AMD assembly has no kernel {kernel}")
    # The code ends where the descriptor of the kernel, in a section of its own, begins.
    body = assembly[start.end() : end.start()].partition("\n\t.section")[0]
    instructions = _instructions(body)
    registers = AmdRegisters(
        vgprs=_number(assembly, r"^; NumVgprs: (\d+)"),
        agprs=_number(assembly, r"\.agpr_count:\s+(\d+)"),
        sgprs=_number(assembly, r"\.sgpr_count:\s+(\d+)"),
        vgpr_spills=_number(assembly, r"\.vgpr_spill_count:\s+(\d+)"),
        sgpr_spills=_number(assembly, r"\.sgpr_spill_count:\s+(\d+)"),
        compiler_occupancy=_number(assembly, r"^; Occupancy: (\d+)"),
    )
    # With accumulation registers in use the vector ones before them are padded: LLVM's total.
    total = _number(assembly, r"^\s+\.vgpr_count:\s+(\d+)")
    static_shared = _number(assembly, r"\.group_segment_fixed_size:\s+(\d+)")
    return KernelReport(
        kernel=kernel,
        case=case,
        language="triton",
        arch=device.arch,
        threads_per_block=threads_per_block,
        registers=total,
        spill_store_bytes=sum(map(int, re.findall(r"(\d+)-byte Folded Spill", body))),
        spill_load_bytes=sum(map(int, re.findall(r"(\d+)-byte Folded Reload", body))),
        stack_bytes=_number(assembly, r"\.private_segment_fixed_size:\s+(\d+)"),
        static_shared_bytes=static_shared,
        dynamic_shared_bytes=dynamic_shared_bytes,
        shared_limit_bytes=device.shared_per_block_bytes,
        tensor_memory_columns=0,
        occupancy=occupancy(
            device,
            threads_per_block=threads_per_block,
            registers=total,
            shared_bytes=static_shared + dynamic_shared_bytes,
        ),
        code_bytes=_number(assembly, r"^; codeLenInByte = (\d+)"),
        mix=count(instructions),
        loops=find_loops(instructions),
        notes=(),
        amd=registers,
        artifacts={**(artifacts or {}), "amdgcn": assembly},
    )
