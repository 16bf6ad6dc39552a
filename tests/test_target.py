"""Which GPU a call is for: properties of a device, AMD's too, and the current device."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kimi_ops
from kimi_ops import _dispatch, _target


@pytest.fixture
def device_of(monkeypatch):
    """Makes torch describe its device with these properties."""

    def describe(hip=None, capability=(9, 0), **properties):
        found = SimpleNamespace(multi_processor_count=104, **properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        _target._of_device.cache_clear()
        return torch.device("cuda", 0)

    yield describe
    _target._of_device.cache_clear()


@pytest.mark.parametrize(
    ("name", "number"), [("gfx942:sramecc+:xnack-", 942), ("gfx90a:sramecc+", 90), ("", 0)]
)
def test_a_gpu_of_amd_is_described_by_what_torch_has_there(device_of, name, number):
    device = device_of(hip="7.0", gcnArchName=name)
    assert _target.target(device) == _target.Target("hip", number, 104, 64 << 10)
    assert _target.too_old(device) is None


def test_an_old_gpu_of_nvidia_is_refused(device_of):
    device = device_of(capability=(7, 5), shared_memory_per_block_optin=64 << 10)
    assert "this one has 7.5" in _target.too_old(device)
    device = device_of(capability=(8, 0), shared_memory_per_block_optin=163 << 10)
    assert _target.too_old(device) is None
    assert _target.target(device) == _target.Target("cuda", 80, 104, 163 << 10)


def test_a_launch_has_its_tensors_device_as_the_current_one(monkeypatch):
    current, launched = [0], []

    @contextlib.contextmanager
    def device(place):
        before, current[0] = current[0], place.index
        yield
        current[0] = before

    class Recorder:
        @staticmethod
        def unsupported(*args):
            return None

        @staticmethod
        def launch(outputs, x, *rest):
            launched.append((x.device.index, current[0]))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(_dispatch, "too_old", lambda device: None)
    op = _dispatch.get_op("rms_norm")
    monkeypatch.setitem(op._loaded, "recorder", Recorder)
    for index in (0, 1):
        with FakeTensorMode(), torch.no_grad(), kimi_ops.use_backend("recorder"):
            x = torch.empty(2, 64, device=f"cuda:{index}")
            op._run(x, torch.empty(64, device=x.device), 1e-6)
    assert launched == [(0, 0), (1, 1)]
    assert current == [0]
