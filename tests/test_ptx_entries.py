"""Of a module with many kernels the emulator reads one: the others cost nothing, and may be PTX
that it does not know."""

from __future__ import annotations

import pytest
import torch

from kimi_ops.testing.ptx import Kernel, LaunchError
from kimi_ops.testing.ptx.entries import only_entry
from kimi_ops.testing.ptx.errors import PtxSyntaxError

MODULE = r"""
.version 9.0
.target sm_80 // not a .entry of anything {
.address_size 64
.file 1 "a}b.cu"
.visible .entry before(.param .u64 p)
{
  { // a scope, and in a comment }
    .unheard_of "text with a brace }";
  }
  ret;
}
.func (.param .b32 out) two() { mov.b32 %r1, 2; }
.visible .entry wanted(
  .param .u64 p
) {
  .reg .b64 %rd<3>;
  .reg .b32 %r<2>;
  ld.param.u64 %rd1, [p];
  mov.u32 %r1, 7;
  st.global.u32 [%rd1], %r1;
  ret;
}
.entry wanted_too(.param .u64 p) { ret; }
.extern .entry elsewhere(.param .u64 p);
.entry last() { .unheard_of; }
"""
FUNCTION = ".func (.param .b32 out) two() { mov.b32 %r1, 2; }\n"


def test_the_other_kernels_are_left_out_and_lines_stay():
    left = only_entry(MODULE, "wanted")
    assert ".unheard_of" not in left
    assert "wanted_too" not in left
    assert "elsewhere" not in left
    assert FUNCTION in left
    lines, all_lines = left.split("\n"), MODULE.split("\n")
    assert len(lines) == len(all_lines)
    at = next(n for n, line in enumerate(all_lines) if "st.global" in line)
    assert lines[at] == all_lines[at]


def test_the_wanted_one_runs():
    out = torch.zeros(1, dtype=torch.int32)
    Kernel(MODULE.replace(FUNCTION, ""), "wanted").launch((1,), (1,), [out])
    assert out.item() == 7


def test_what_is_not_there_is_said_with_what_is():
    known = MODULE.replace('.unheard_of "text with a brace }";', "").replace(".unheard_of;", "ret;")
    with pytest.raises(LaunchError, match="no kernel 'absent'; the module has before, wanted"):
        Kernel(known.replace(FUNCTION, ""), "absent")


def test_a_wanted_kernel_is_read_to_its_end():
    module = MODULE.replace(FUNCTION, "")
    line = next(n for n, text in enumerate(module.split("\n"), 1) if "last" in text)
    with pytest.raises(PtxSyntaxError, match=f"line {line}: .*unheard_of"):
        Kernel(module, "last")
