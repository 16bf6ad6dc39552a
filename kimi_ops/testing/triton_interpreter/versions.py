"""Which versions of Triton this interpreter was run with, and what it needs of them."""

from __future__ import annotations

import importlib

import triton

from kimi_ops.testing.triton_interpreter.faults import UnsupportedByInterpreter

TRIED = ("3.4", "3.5", "3.6", "3.7", "3.8", "3.9")

# Internals, which a version may move without notice.
NEEDED = {
    "triton.runtime.interpreter": (
        "InterpreterBuilder",
        "InterpretedFunction",
        "TensorHandle",
        "_get_np_dtype",
    ),
    "triton.runtime.jit": ("JITFunction", "KernelParam", "TensorWrapper", "mangle_type"),
    "triton.runtime.autotuner": ("Autotuner",),
    "triton.language.semantic": ("TritonSemantic",),
    "triton.language": ("str_to_ty",),
    "triton.language.core": ("is_builtin", "tensor_descriptor_base"),
    "triton.language.extra.cuda": ("libdevice",),
    "triton.tools.tensor_descriptor": ("TensorDescriptor",),
    "triton._C.libtriton": ("ir",),
}


def require_known_triton() -> None:
    """Raises `UnsupportedByInterpreter` for a Triton whose internals are not those we know."""
    version = triton.__version__
    if ".".join(version.split(".")[:2]) not in TRIED:
        raise UnsupportedByInterpreter(
            f"Triton {version}: the interpreter was tried with {', '.join(TRIED)} only"
        )
    for module, names in NEEDED.items():
        loaded = importlib.import_module(module)
        if missing := [name for name in names if not hasattr(loaded, name)]:
            raise UnsupportedByInterpreter(f"Triton {version} has no {module}.{missing[0]}")
