"""Who runs a call: explicit choices, reasons, the environment, cold imports, outside backends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import kimi_ops
from kimi_ops._backends import simulated
from kimi_ops._dispatch import _OPS, parse_choice
from kimi_ops._target import Target, targeting

X, W = torch.ones(2, 4), torch.ones(4)


@pytest.fixture
def registered():
    """Registers backends of `rms_norm` for one test."""
    loaded = _OPS["rms_norm"]._loaded
    before = dict(loaded)

    def register(name, launch, unsupported=lambda *args: None):
        module = SimpleNamespace(launch=launch, unsupported=unsupported)
        kimi_ops.register_backend("rms_norm", name, module)

    yield register
    loaded.clear()
    loaded.update(before)


def _python(code, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("KIMI_OPS_")} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )


def test_every_op_resolves_to_something_on_the_cpu():
    for op in kimi_ops.op_names():
        assert kimi_ops.explain(op).chosen in ("cpu", "reference")


def test_a_backend_from_outside_runs_when_named(registered):
    registered("mine", lambda y, x, weight, eps: y.fill_(7))
    with kimi_ops.use_backend(rms_norm="mine"):
        assert kimi_ops.resolve("rms_norm", X, W, eps=1e-5) == "mine"
        assert kimi_ops.rms_norm(X, W, 1e-5).eq(7).all()
        with kimi_ops.use_backend(rms_norm="auto"):
            assert kimi_ops.resolve("rms_norm", X, W, 1e-5) != "mine"
    assert kimi_ops.rms_norm(X, W, 1e-5).ne(7).all()


def test_explicit_choice_never_falls_back(registered):
    registered("mine", lambda *args: None, unsupported=lambda *args: "only on Sundays")
    with (
        kimi_ops.use_backend("rms_norm=mine"),
        pytest.raises(
            kimi_ops.BackendError,
            match="rms_norm: backend 'mine' was chosen explicitly but cannot run: only on Sundays",
        ),
    ):
        kimi_ops.rms_norm(X, W, 1e-5)


def test_absent_kernel_says_so_and_how_to_get_it():
    code = """
import sys
sys.modules["triton"] = None
sys.modules["cupy"] = None
import torch, kimi_ops
from kimi_ops import _backends
_backends.has_kernel = lambda op, backend: True
for name in ("triton", "cuda"):
    try:
        with kimi_ops.use_backend(rms_norm=name):
            kimi_ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-5)
    except kimi_ops.BackendError as error:
        print(error)
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr
    assert "cannot run: triton is not installed: pip install 'triton>=3.4'" in result.stdout
    assert "cannot run: cupy is not installed: pip install cupy-cuda13x" in result.stdout


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_no_kernel_takes_a_gpu_older_than_ampere(name):
    turing = Target("cuda", 75, 68, 64 << 10)
    with (
        simulated(name),
        targeting(turing),
        kimi_ops.use_backend(rms_norm=name),
        pytest.raises(kimi_ops.BackendError, match=r"capability 8\.0 or later, this one has 7\.5"),
    ):
        kimi_ops.rms_norm(X, W, 1e-5)
    with simulated(name), targeting(turing):
        assert kimi_ops.resolve("rms_norm", X, W, 1e-5) in ("cpu", "reference")


def test_failure_of_a_kernel_is_not_a_reason_to_fall_back(registered, monkeypatch):
    def launch(*args):
        raise ZeroDivisionError("kernel failed")

    broken = SimpleNamespace(launch=launch, unsupported=lambda *args: None)
    op = _OPS["rms_norm"]
    order = (("triton", broken), ("reference", op.load("reference")))
    monkeypatch.setitem(op._automatic, "cpu", order)
    with pytest.raises(ZeroDivisionError, match="kernel failed"):
        kimi_ops.rms_norm(X, W, 1e-5)


def test_automatic_choice_skips_on_a_declared_reason_alone(monkeypatch):
    shy = SimpleNamespace(launch=None, unsupported=lambda *args: "float32 only in winter")
    op = _OPS["rms_norm"]
    order = (("triton", shy), ("reference", op.load("reference")))
    monkeypatch.setitem(op._automatic, "cpu", order)
    assert kimi_ops.rms_norm(X, W, 1e-5).isfinite().all()
    monkeypatch.setitem(op._automatic, "cpu", order[:1])
    with pytest.raises(kimi_ops.BackendError, match="rms_norm: no backend can run this call"):
        kimi_ops.rms_norm(X, W, 1e-5)


def test_choice_is_of_one_thread():
    seen = []
    with kimi_ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_explicit()))
        thread.start()
        thread.join()
        assert _explicit() == {"*": "reference"}
    assert seen == [None]


def _explicit():
    from kimi_ops._dispatch import _CHOICE

    return _CHOICE.get()


def test_choices_nest():
    with kimi_ops.use_backend("mla_decode=triton,*=reference"):
        with kimi_ops.use_backend(rms_norm="cuda"):
            assert dict(_explicit()) == {
                "mla_decode": "triton",
                "*": "reference",
                "rms_norm": "cuda",
            }
        with kimi_ops.use_backend("auto"):
            assert dict(_explicit()) == {"*": "auto"}
            assert kimi_ops.rms_norm(X, W, 1e-5).isfinite().all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "unknown backend 'nonsense'"),
        ("mla_decod=triton", "unknown op 'mla_decod'; there are add_rms_norm, int4_lin"),
        ("mla_decode=tritn", "unknown backend 'tritn' for mla_decode"),
        ("mla_decode=", "unknown backend ''"),
    ],
)
def test_misspelt_choice(text, message):
    with pytest.raises(ValueError, match=message):
        parse_choice(text)
    code = "import torch, kimi_ops; kimi_ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-5)"
    result = _python(code, KIMI_OPS_BACKEND=text)
    assert result.returncode != 0
    assert f"KIMI_OPS_BACKEND: {message}" in result.stderr


def test_environment_chooses():
    code = """
import torch, kimi_ops
args = torch.ones(1, 4), torch.ones(4), 1e-5
print(kimi_ops.resolve("rms_norm", *args))
try:
    kimi_ops.silu_mul(torch.ones(2))
except kimi_ops.BackendError as error:
    print(error)
with kimi_ops.use_backend(silu_mul="auto"):
    print(kimi_ops.silu_mul(torch.ones(2)).shape)
"""
    environment = "silu_mul=cuda, *=reference"
    result = _python(code, KIMI_OPS_BACKEND=environment)
    assert result.returncode == 0, result.stderr
    first, second, third = result.stdout.splitlines()
    assert first == "reference"
    assert second.startswith("silu_mul: backend 'cuda' was chosen explicitly but cannot run: ")
    assert third == "torch.Size([1])"


def test_cold_import_needs_torch_alone():
    code = """
import sys
for name in ("triton", "cupy", "numba", "transformers", "rich", "safetensors"):
    sys.modules[name] = None
import torch
before = set(sys.modules)
import kimi_ops
args = torch.ones(1, 4), torch.ones(4), 1e-5
kimi_ops.rms_norm(*args)
assert "kimi_ops.kernels" not in sys.modules
new = sorted({n.split(".")[0] for n in set(sys.modules) - before})
print(new)
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr
    third_party = set(eval(result.stdout)) - set(sys.stdlib_module_names)
    assert third_party == {"kimi_ops"}


def test_explain_names_every_backend(registered):
    registered("mine", lambda *args: None, unsupported=lambda *args: "asleep")
    explanation = kimi_ops.explain(kimi_ops.rms_norm, X, W, 1e-5)
    assert {name for name, _ in explanation.reasons} >= {
        "reference",
        "cpu",
        "triton",
        "cuda",
        "mine",
    }
    assert dict(explanation.reasons)["mine"] == "asleep"
    assert f"rms_norm on cpu: {explanation.chosen}" in str(explanation)
    assert "mine: asleep" in str(explanation)


def test_explain_checks_the_call():
    with pytest.raises(ValueError, match="rms_norm: weight must be"):
        kimi_ops.explain("rms_norm", X, torch.ones(5), 1e-5)
    with pytest.raises(TypeError, match="rms_norm: unexpected argument 'epsilon'"):
        kimi_ops.explain("rms_norm", X, W, epsilon=1e-5)
    with pytest.raises(TypeError, match="rms_norm: missing argument 'weight'"):
        kimi_ops.explain("rms_norm", X)


def test_a_name_asked_about_is_not_thereby_known():
    assert "no such backend" in _OPS["silu_mul"].why_not("foo", None)
    with pytest.raises(ValueError, match="unknown backend 'foo'"):
        parse_choice("silu_mul=foo")


def test_resolve_and_explain_agree_on_an_alias(registered):
    reference = _OPS["rms_norm"].load("reference")
    kimi_ops.register_backend("rms_norm", "alias", reference)
    with kimi_ops.use_backend(rms_norm="alias"):
        assert kimi_ops.resolve("rms_norm", X, W, 1e-5) == "alias"
        assert kimi_ops.explain("rms_norm", X, W, 1e-5).chosen == "alias"


def test_what_is_not_a_backend_is_refused():
    with pytest.raises(TypeError, match="is not a backend: it lacks unsupported and launch"):
        kimi_ops.register_backend("rms_norm", "mine", SimpleNamespace())
    with pytest.raises(ValueError, match="backend name 'triton' is taken"):
        kimi_ops.register_backend("rms_norm", "triton", SimpleNamespace())


def _loss(x):
    return kimi_ops.moe_select(x, torch.zeros(4), 2)[0].sum()


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda x: _loss(x.requires_grad_()).backward(),
        lambda x: torch.compile(_loss, backend="aot_eager")(x.requires_grad_()).backward(),
        lambda x: torch.func.grad(_loss)(x),
    ],
    ids=["eager", "compiled", "functional"],
)
def test_gradient_through_an_op_without_backward_is_an_error(differentiate):
    torch._dynamo.reset()
    message = "moe_select: logits requires grad, but the op has no backward"
    with pytest.raises(RuntimeError, match=message):
        differentiate(torch.ones(2, 4))


def test_weights_with_grad_are_fine_where_no_gradient_is_wanted():
    weight = torch.nn.Parameter(torch.ones(4))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not kimi_ops.rms_norm(X, weight, 1e-5).requires_grad


def test_autocast_does_not_change_an_op():
    x, gate = torch.randn(64, 512), torch.randn(48, 512) / 20
    expected = kimi_ops.moe_route(x, gate, torch.zeros(48), 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = kimi_ops.moe_route(x, gate, torch.zeros(48), 6)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_library_of_another_platform_is_a_reason(tmp_path, monkeypatch):
    from kimi_ops import _native

    for content in (b"", b"not a library"):
        (tmp_path / "broken.so").write_bytes(content)
        monkeypatch.setattr(_native, "LIBRARY", tmp_path / "broken.so")
        _native.missing.cache_clear()
        _native._open.cache_clear()
        try:
            assert "the CPU library cannot be loaded" in _native.missing()
        finally:
            monkeypatch.undo()
            _native.missing.cache_clear()
            _native._open.cache_clear()


def test_library_of_the_environment_replaces_the_packages_own(tmp_path, monkeypatch):
    from kimi_ops import _native

    (tmp_path / "mine.so").write_bytes(b"not a library")
    _native.missing.cache_clear()
    _native._open.cache_clear()
    try:
        monkeypatch.setenv("KIMI_OPS_CPU_LIBRARY", str(tmp_path / "mine.so"))
        assert "mine.so" in _native.missing()
        monkeypatch.setenv("KIMI_OPS_CPU_LIBRARY", str(tmp_path / "no.so"))
        _native.missing.cache_clear()
        with pytest.raises(ValueError, match=r"KIMI_OPS_CPU_LIBRARY: there is no file .*no\.so"):
            _native.missing()
    finally:
        _native.missing.cache_clear()
        _native._open.cache_clear()


def test_batch_invariant_mode_refuses_who_does_not_promise_it():
    x, weight = torch.randn(2, 8), torch.ones(8)
    with kimi_ops.batch_invariant(), kimi_ops.use_backend(rms_norm="reference"):
        with pytest.raises(kimi_ops.BackendError, match="batch-invariant mode is on"):
            kimi_ops.rms_norm(x, weight, 1e-5)
        with kimi_ops.batch_invariant(False):
            kimi_ops.rms_norm(x, weight, 1e-5)


def test_batch_invariant_mode_takes_who_promises_it(registered):
    registered("promising", launch=lambda outputs, *args: outputs.zero_())
    _OPS["rms_norm"]._loaded["promising"].BATCH_INVARIANT = True
    x, weight = torch.randn(2, 8), torch.ones(8)
    with kimi_ops.batch_invariant(), kimi_ops.use_backend(rms_norm="promising"):
        assert kimi_ops.rms_norm(x, weight, 1e-5).eq(0).all()


def test_batch_invariant_variable_is_0_or_1(monkeypatch):
    from kimi_ops import _batch_invariant

    monkeypatch.setattr(_batch_invariant, "_ENVIRONMENT", [])
    monkeypatch.setenv("KIMI_OPS_BATCH_INVARIANT", "yes")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
        _batch_invariant.is_batch_invariant()
    monkeypatch.setenv("KIMI_OPS_BATCH_INVARIANT", "1")
    assert _batch_invariant.is_batch_invariant()
