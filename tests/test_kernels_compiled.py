"""Every Triton kernel, compiled ahead of time: no spills, within shared memory, the instructions
that its limit asks for. An ordinary run takes one case of each kernel for two architectures;
``--full`` takes every case for every architecture that it is for."""

from __future__ import annotations

import functools

import pytest

from kimi_ops._backends import has_kernel
from kimi_ops._dispatch import op_names
from kimi_ops.testing.devices import ARCHES
from kimi_ops.testing.static import (
    KernelReport,
    StaticCase,
    assert_no_spills,
    assert_shared_memory_fits,
    compile_case,
    triton_cases_of,
)
from kimi_ops.testing.static.gates import occurrences

# What multiplies matrices on tensor cores, under each generation's name for it.
_TENSOR = {"sm_90a": ("HGMMA", "HMMA"), "sm_100a": ("UTCHMMA", "HMMA"), "gfx942": ("v_mfma",)}
_MULTIPLIES = {
    "int4_linear",
    "mla_absorb_query",
    "mla_decode",
    "mla_decode_value",
    "mla_prefill",
    "mla_project_value",
    "moe_experts_int4",
    "vision_attention",
}
# Ops whose bound is memory: their loads of rows are 16 bytes wide.
_STREAMS = {
    "add_rms_norm",
    "merge_attention",
    "mla_latent_write",
    "patch_merge",
    "rms_norm",
    "silu_mul",
    "vision_pos_embed",
    "vision_rope",
}


def _cases(op: str, arch: str, full: bool) -> list[StaticCase]:
    """The op's cases for an architecture; in an ordinary run the first one of each kernel."""
    cases = [c for c in triton_cases_of(op) if arch in c.arches]
    return cases if full else list({id(c.kernel): c for c in reversed(cases)}.values())


@functools.cache
def _reports(op: str, arch: str, full: bool) -> list[KernelReport]:
    return [compile_case(case, arch) for case in _cases(op, arch, full)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    ops = [op for op in op_names() if has_kernel(op, "triton")]
    arches = ARCHES if full else ("sm_80", "sm_90a")
    metafunc.parametrize("reports", [(op, arch, full) for op in ops for arch in arches], ids=_name)


def _name(param: tuple[str, str, bool]) -> str:
    return f"{param[0]}-{param[1]}"


def test_fits_the_machine(reports):
    for report in _reports(*reports):
        assert_shared_memory_fits(report)
        if report.arch != "gfx942":
            assert_no_spills(report)


def test_has_the_instructions_that_its_limit_asks_for(reports):
    op, arch, _ = reports
    mixes = [report.mix for report in _reports(*reports)]
    if op in _MULTIPLIES:
        names = _TENSOR.get(arch, ("HMMA",))
        assert any(occurrences(mix, name) for mix in mixes for name in names), (op, arch, names)
    if op in _STREAMS and arch != "gfx942":
        assert any(occurrences(mix, "LDG.128") for mix in mixes), f"{op}: no 16-byte load on {arch}"
