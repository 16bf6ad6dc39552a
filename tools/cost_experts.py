"""Counts and modelled times of the CUDA C++ `moe_experts_int4` at Kimi K2.5's widths, as a table.

    python tools/cost_experts.py [--device H100] [--case T=512 ...]

Executed as PTX in the emulator: of the experts that have so many tokens a few, and a few of their
tiles of rows, which stand for all; an eighth of the width for one token whole. Bytes read are those
of the whole launch: weights, each once, and what else the sample has read, once for each expert.
Nothing is timed: the times are those of `kimi_ops.testing.cost`, without `prepare`, `sum` and the
shared expert. Experts with more and with fewer tokens are modelled one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kimi_ops._target import targeting
from kimi_ops.cuda import _int4, moe_experts_int4
from kimi_ops.cuda._launcher import SOURCES, use_launcher
from kimi_ops.testing.cost import cost
from kimi_ops.testing.cost.devices import rates_of
from kimi_ops.testing.cost.machine_code import machine_code
from kimi_ops.testing.cuda_runner import EmulatedLauncher
from kimi_ops.testing.ptx import Report
from kimi_ops.testing.ptx.trace import L2
from kimi_ops.testing.ptx.written import Written
from kimi_ops.testing.runner import target_of
from kimi_ops.testing.static.cuda_source import report_cuda
from kimi_ops.testing.static.report import KernelReport

D, F, EXPERTS, CHOICES, GROUP = 7168, 2048, 384, 8, 32
_BYTES_A_WEIGHT = 0.5 + 2 / GROUP


@dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        name: in the table.
        counts: (experts, tokens that each of them has).
        expected: (token, choice) pairs over all experts, from which the form follows.
        tiles: of rows that are executed; 0 for all.
        width: F of a rank.
    """

    name: str
    counts: tuple[tuple[int, int], ...]
    expected: float
    tiles: int = 1
    width: int = F

    @property
    def experts(self) -> int:
        """That are chosen."""
        return sum(experts for experts, _ in self.counts)


# Even routing. 64 tokens: what 512 draws of 384 experts give those that are drawn at all; 512
# tokens: the mean.
CASES = (
    Case("T=1", ((8, 1),), 8 / 384, tiles=4),
    Case("T=1, F=256", ((8, 1),), 8 / 384, 0, F // 8),
    Case("T=8", ((56, 1), (4, 2)), 64 / 384, tiles=2),
    Case("T=64", ((122, 1), (89, 2), (42, 3), (15, 4), (4, 5), (1, 6)), 512 / 384),
    Case("T=512", ((384, 11),), 4096 / 384),
)
_SAMPLE = 8  # experts, at most, of those with one number of tokens


class _Only:
    """Launches `prepare` and one product, and keeps the product's report."""

    def __init__(self, stage: str, arch: int) -> None:
        self._wanted = ("prepare", stage)
        self.reports: dict[str, Report] = {}
        self._inner = EmulatedLauncher(arch, None, None, Written(), self.reports.__setitem__)

    def launch(self, source: Path, name: str, *args: Any, **named: Any) -> None:
        if any(f"_int4_{stage}_" in name for stage in self._wanted):
            self._inner.launch(source, name, *args, **named)


def _arguments(local: int, tokens: int, d: int, f: int) -> tuple[Any, ...]:
    """Of a call whose experts are the last ones of all, random."""
    ids = torch.arange(local, dtype=torch.int32).repeat_interleave(tokens)
    slots = -(-len(ids) // CHOICES) * CHOICES
    ids = torch.cat([ids + EXPERTS - local, torch.zeros(slots - len(ids), dtype=torch.int32)])
    ids = ids[torch.randperm(slots)].view(-1, CHOICES)

    def weights(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(-(2**31), 2**31, (local, rows, k // 8), dtype=torch.int32)
        return codes, torch.full((local, rows, k // GROUP), 0.01, dtype=torch.bfloat16)

    x = torch.randn(len(ids), d).bfloat16()
    spread = torch.rand(len(ids), CHOICES)
    experts_range = [EXPERTS - local, EXPERTS]
    return (x, *weights(2 * f, d), *weights(d, f), spread, ids, None, None, experts_range)


def _executed(
    case: Case, stage: str, arch: int, tokens: int, local: int
) -> tuple[str, Report, int]:
    """Name and report of a product with so many experts of so many tokens, and all tiles of rows of
    which the case's were executed."""
    scale = torch.empty(1, 2, dtype=torch.bfloat16)
    with targeting(target_of(arch)):
        form = _int4.form_of(scale, scale, case.expected)
        rows = _int4.rows_of_block(form) // (2 if stage == "gate_up" else 1)
        whole = (case.width if stage == "gate_up" else D) // rows
        some = rows * (case.tiles or whole)
        groups = (D if stage == "gate_up" else case.width) // GROUP
        split = _int4.split_of(scale, groups, case.experts * whole)
        d, f = (D, some) if stage == "gate_up" else (some, case.width)
        args = _arguments(local, tokens, d, f)
        only = _Only(stage, arch)
        with (
            use_launcher(only),
            mock.patch.object(_int4, "form_of", return_value=form),
            mock.patch.object(_int4, "split_of", return_value=split),
        ):
            moe_experts_int4.launch(torch.empty(len(args[0]), d, dtype=torch.bfloat16), *args)
    (name,) = (name for name in only.reports if f"_{stage}_" in name)
    return name, _as_of_the_whole(only.reports[name]), whole


def _as_of_the_whole(report: Report) -> Report:
    """A sample's report without what is of the sample alone: blocks that have no tokens, of which
    it has another share; and loads of x, h and tables from DRAM by the block that touches them
    first, which come from L2, as the launch before has written them."""
    assert report.trace is not None
    busy = report.cta_instructions > report.cta_instructions.max() / 8
    report.cta_instructions, report.ctas = report.cta_instructions[busy], int(busy.sum())
    cold = {
        n
        for n, ins in enumerate(report.trace.code)
        if "no_allocate" in ins.opcode or "16" in ins.opcode or "cp.async" in ins.opcode
    }
    report.trace.events = [
        dataclasses.replace(
            event, levels=tuple((n, at if n in cold else min(at, L2)) for n, at in event.levels)
        )
        for event in report.trace.events
    ]
    return report


def rows_of(case: Case, device: str, kernels: dict[str, KernelReport], arch: int) -> Iterator[str]:
    """Rows of the table: both products, and their sum."""
    low = up = 0.0
    for stage in ("gate_up", "down"):
        all_weights = case.width * D * (2 if stage == "gate_up" else 1)  # of an expert
        beside_weights = machine = ptx = 0.0
        sums: Counter[str] = Counter()
        groups: dict[str, str] = {}
        ideal = Counter[str]()
        for experts, tokens in case.counts:
            local = min(experts, _SAMPLE)
            name, report, whole = _executed(case, stage, arch, tokens, local)
            tiles = case.tiles or whole
            part = tiles / whole * local / experts  # of these experts' blocks
            floor = all_weights * experts * _BYTES_A_WEIGHT
            blocks = whole * experts
            assert report.ctas == round(blocks * part)
            found = cost(report, kernels[name], device, ctas=blocks, dram_bytes=floor)
            for resource in found.resources.values():
                sums[resource.name] += resource.us
                groups[resource.name] = resource.group
            beside_weights += (report.unique_read_bytes - floor * part) * experts / local
            machine += machine_code(report, kernels[name]).issued / part
            total = report.total
            ptx += total.warp_instructions / part
            ideal["sectors"] += round(total.global_sectors / part)
            ideal["ideal sectors"] += round(total.global_sectors_ideal / part)
            ideal["wavefronts"] += round(total.shared_wavefronts / part)
            ideal["ideal wavefronts"] += round(total.shared_wavefronts_ideal / part)
        largest: Counter[str] = Counter()
        for resource_name, us in sums.items():
            if group := groups[resource_name]:
                largest[group] = max(largest[group], us)
        two = [us for _, us in largest.most_common(2)]
        low, up = low + two[0], up + sum(two)
        weights = all_weights * case.experts
        yield (
            f"| {case.name} | {stage} | {1 + beside_weights / (weights * _BYTES_A_WEIGHT):.3f} | "
            f"{ideal['sectors'] / ideal['ideal sectors']:.3f} | "
            f"{ideal['wavefronts'] / max(ideal['ideal wavefronts'], 1):.3f} | "
            f"{32 * ptx / weights:.2f} | {32 * machine / weights:.2f} | "
            f"{two[0]:,.1f} .. {sum(two):,.1f} | "
            f"{', '.join(f'{r} {us:,.1f}' for r, us in largest.most_common(4))} |"
        )
    yield f"| {case.name} | both | | | | | | {low:,.1f} .. {up:,.1f} | |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="H100", help="whose rates")
    parser.add_argument("--case", nargs="+", help="names of cases; all by default")
    chosen = parser.parse_args(argv)
    torch.manual_seed(0)
    arch = rates_of(chosen.device).arch
    kernels = report_cuda(SOURCES / "moe_experts_int4.cu", arch)
    number = int(arch.removeprefix("sm_").rstrip("a"))
    print(
        "| call | product | read over weights | sectors over ideal | wavefronts over ideal |"
        " PTX / weight | machine / weight | modelled us | beside |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if not chosen.case or case.name in chosen.case:
            for row in rows_of(case, chosen.device, kernels, number):
                print(row, flush=True)


if __name__ == "__main__":
    main()
