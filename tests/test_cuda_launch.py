"""What launchers of CUDA C++ decide on the host, without a GPU or an emulator."""

from types import SimpleNamespace

import pytest
import torch

from kimi_ops import _nvrtc
from kimi_ops._target import Target, targeting
from kimi_ops.cuda import add_rms_norm, mla_latent_write, rms_norm


def test_a_kernel_may_have_all_shared_memory_beside_its_own(monkeypatch):
    function = SimpleNamespace(shared_size_bytes=22_017)
    module = SimpleNamespace(get_function=lambda name: function)
    monkeypatch.setattr(_nvrtc, "_module", lambda source, device: module)
    _nvrtc._kernel.cache_clear()
    with targeting(Target("cuda", 90, 132, 227 << 10)):
        assert _nvrtc._kernel("moe_route.cu", "moe_route_few_kernel_bf16_2", 0) is function
    _nvrtc._kernel.cache_clear()
    assert function.max_dynamic_shared_size_bytes == (227 << 10) - 22_017


def _rms_norm(rows):
    rms_norm.launch(torch.empty_like(rows), rows, torch.ones(rows.shape[1]), 1e-6)


def _add_rms_norm(rows):
    y, h = torch.empty_like(rows), torch.empty_like(rows)
    add_rms_norm.launch((y, h), rows, rows.contiguous(), torch.ones(rows.shape[1]), 1e-6)


def _mla_latent_write(rows):
    n, width = rows.shape
    positions, freq = torch.arange(n), torch.ones(16)
    q, c = width - 32 - 64, 64
    cache = torch.zeros(4, 16, c + 32)
    mla_latent_write.launch(
        rows.new_empty(n, q), rows, torch.ones(q), torch.ones(c), positions, freq, positions, cache,
        1e-6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (rms_norm, _rms_norm),
        (add_rms_norm, _add_rms_norm),
        (mla_latent_write, _mla_latent_write),
    ],
)
@pytest.mark.parametrize("extra", [0, 1])
def test_how_a_row_is_summed_does_not_follow_from_where_it_lies(monkeypatch, module, call, extra):
    """Rows that start at odd addresses, of which the first alone starts at an even one."""
    names = []
    monkeypatch.setattr(module, "launch_kernel", lambda op, name, **named: names.append(name))
    rows = torch.randn(3, 256 + extra)[:, :256]
    for some in (rows, rows[:1], rows.contiguous()):
        call(some)
    assert len(set(names)) == 1
    assert "_vec" in names[0]
