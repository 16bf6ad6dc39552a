"""llama.cpp's product of Q4_0 weights on a CPU, ``ggml_mul_mat_id``, from llama-cpp-python's ggml.

That package has no op for it, so its shared libraries are called. The nibbles and scales of the
checkpoint fit Q4_0, but for scales below float16's 6e-5; ggml repacks them once as llama.cpp does
at load, here those of the experts that the calls choose. ggml keeps activations in float32 and
rounds them to int8 for its products. Its threads are its own, as many as torch has in ``prepare``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from kimi_ops.bench.case import Args, size_of
from kimi_ops.bench.peers import Declined, Prepare, Prepared
from kimi_ops.bench.peers._experts import (
    check_copy,
    chosen_experts,
    made_once,
    renumbered,
    shared_expert,
)
from kimi_ops.bench.peers._ggml import F32, I32, Ggml

NAME = "llama.cpp"
WRITTEN_AGAINST = "llama-cpp-python 0.3.36"
DEVICES = ("cpu",)
APART = 5e-2  # int8 activations


def _folder() -> Path | None:
    spec = find_spec("llama_cpp")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) / "lib" if places else None


def missing(device: str) -> str | None:
    """Whether its libraries are here."""
    folder = _folder()
    if folder is None:
        return "llama-cpp-python is not installed: pip install llama-cpp-python==0.3.36"
    if not (folder / "libggml-cpu.so").is_file():
        return f"llama-cpp-python has no libggml-cpu.so in {folder}: it was built without"
    return None


def _library() -> Ggml:
    folder = _folder()
    if folder is None:
        raise Declined("llama-cpp-python is not installed")
    return Ggml(folder)


def _moe_experts_int4(calls: Sequence[Args]) -> Prepared:
    _, gate_up, gate_up_scale, down, down_scale = calls[0][:5]
    chosen = chosen_experts(calls)
    check_copy(
        f"ggml's copies of {len(chosen)} experts",
        len(chosen),
        1.125 * size_of(gate_up[0], gate_up[0], down[0]),
    )
    every = renumbered(calls, chosen, elsewhere=-1)
    if any(bool((ids < 0).any()) for ids in every):
        raise Declined("ggml takes no ids of experts that are elsewhere")
    if len(chosen) < 2:
        raise Declined("ggml repacks no single expert for a product by ids")
    ggml = _library()
    first = ggml.weights([(gate_up[e], gate_up_scale[e]) for e in chosen])
    second = ggml.weights([(down[e], down_scale[e]) for e in chosen])
    width = down.shape[1]

    def graph(tokens: int, top_k: int) -> Callable[..., Tensor]:
        def build(context: int) -> tuple[int, ...]:
            x = ggml("new_tensor_3d", context, F32, width, 1, tokens)
            ids = ggml("new_tensor_2d", context, I32, top_k, tokens)
            weights = ggml("new_tensor_3d", context, F32, 1, top_k, tokens)
            h = ggml("swiglu", context, ggml("mul_mat_id", context, first, x, ids))
            y = ggml("mul", context, ggml("mul_mat_id", context, second, h, ids), weights)
            row = 4 * width
            parts = [
                ggml("view_2d", context, y, width, tokens, row * top_k, row * k)
                for k in range(top_k)
            ]
            total = parts[0]
            for part in parts[1:]:
                total = ggml("add", context, total, part)
            return total, x, ids, weights

        return ggml.graph(build, tokens, width)

    graphs = {call[6].shape: graph(*call[6].shape) for call in calls}
    inputs = [
        (call[0].float(), ids.int(), call[5].float())
        for call, ids in zip(calls, every, strict=True)
    ]

    def run(i: int) -> Tensor:
        y = graphs[calls[i][6].shape](*inputs[i])
        shared = shared_expert(calls[i])
        return y if shared is None else y + shared

    return run


def _int4_linear(calls: Sequence[Args]) -> Prepared:
    ggml = _library()
    weights = made_once(calls, 1, lambda call: ggml.weights([(call[1], call[2])]))
    inputs = [call[0].flatten(0, -2).float() for call in calls]

    def graph(call: Args, weight: int) -> Callable[..., Tensor]:
        def build(context: int) -> tuple[int, ...]:
            rows = call[0].numel() // call[0].shape[-1]
            x = ggml("new_tensor_2d", context, F32, call[0].shape[-1], rows)
            return ggml("mul_mat", context, weight, x), x

        return ggml.graph(build, *call[0].shape[:-1], len(call[1]))

    graphs = [graph(call, weight) for call, weight in zip(calls, weights, strict=True)]
    return lambda i: graphs[i](inputs[i])


OPS: dict[str, Prepare] = {"moe_experts_int4": _moe_experts_int4, "int4_linear": _int4_linear}
