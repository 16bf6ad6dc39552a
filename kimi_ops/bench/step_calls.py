"""What one step of the whole model calls, and what each call must do at least.

The model itself says what it calls: it runs on meta tensors, which hold nothing, and every call
that reaches torch's dispatcher is noted with its shapes, the ops of this package and torch's own
alike. Sizes are those of the released config.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_ops._dispatch import get_op
from kimi_ops._target import Target, targeting
from kimi_ops.bench.case import Work
from kimi_ops.model.cache import LatentCache
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.kimi import KimiK25
from kimi_ops.testing.check import as_tuple
from kimi_ops.testing.cost import Rates, rates_of
from kimi_ops.testing.devices import device as limits_of

MOE, DENSE, ENDS, VISION = "MoE layers", "dense layers", "embedding and head", "vision"
_META = torch.device("meta")
# Of torch's calls the ones that launch nothing though they return no view.
_FREE = {"empty", "empty_like", "_unsafe_view", "promote_types"}
# Of a table that is longer than what is taken from it the bytes of the result are read.
_GATHERS = {"embedding", "index"}


@dataclass(frozen=True)
class StepCase:
    """A step.

    Attributes:
        name: of what the decoder does.
        batch: sequences.
        length: tokens of each when the step has run.
        new: of them, those that are new.
        picture: (frames, rows, columns) of patches that go through the vision tower first.
    """

    name: str
    batch: int
    length: int
    new: int
    picture: tuple[int, int, int] | None = None

    @property
    def title(self) -> str:
        """The whole step's name."""
        return self.name + " and a picture" * bool(self.picture)

    @property
    def picture_name(self) -> str:
        """Of what the vision tower does."""
        _, rows, columns = self.picture or (0, 0, 0)
        return f"picture, {rows} x {columns} patches"


STEPS = (
    StepCase("decode, 1 sequence", 1, 4096, 1),
    StepCase("decode, 64 sequences", 64, 4096, 1),
    StepCase("prefill, 2,048 tokens", 1, 2048, 2048, (1, 64, 64)),
)


@dataclass(frozen=True)
class Call:
    """Equal calls of one part of the model.

    Attributes:
        part: `MOE`, `DENSE`, `ENDS` or `VISION`.
        op: name, "torch mm" where it is torch's.
        args: of the first, on "meta", in the order of the schema.
        shapes: of its tensors, by name.
        count: calls of a step.
        work: of one.
    """

    part: str
    op: str
    args: tuple[Any, ...]
    shapes: dict[str, list[int]]
    count: int
    work: Work

    @property
    def ours(self) -> bool:
        """Whether the op is of this package."""
        return not self.op.startswith("torch ")


def routing(tokens: int, experts: int = 384, choices: int = 8) -> Tensor:
    """``[T, K]`` int32 distinct experts, even and random: the same for the same sizes."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, experts, generator=generator).topk(choices).indices.int()


def _size(value: Any) -> float:
    """Bytes of a tensor, or of a list of them; those of an expanded one once."""
    if isinstance(value, Tensor):
        held = (n for n, stride in zip(value.shape, value.stride(), strict=True) if stride)
        return float(math.prod(held) * value.element_size())
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0.0


def traffic(op: str, args: Sequence[Any]) -> dict[str, float]:
    """Bytes that a call of an op moves, by parameter, both ways for one that it changes; what it
    returns is "".

    Cached tokens are those that fill the page table; experts those that `routing` chooses.
    """
    contract = get_op(op)
    given = dict(zip(contract.params, args, strict=True))
    moved = {name: _size(value) for name, value in given.items() if isinstance(value, Tensor)}
    meta = [a.to(_META) if isinstance(a, Tensor) else a for a in args]
    moved[""] = sum(map(_size, as_tuple(contract.outputs(*meta))))
    if op == "mla_latent_write":
        pages, slots = given["kv_cache"], len(given["slot_mapping"])
        moved["kv_cache"] = float(slots * pages.shape[2] * pages.element_size())
    elif op in ("mla_decode", "mla_decode_value"):
        pages, tokens = given["kv_cache"], given["page_table"].numel() * given["kv_cache"].shape[1]
        moved["kv_cache"] = float(tokens * pages.shape[2] * pages.element_size())
    elif op == "moe_experts_int4":
        experts = len(given["down_packed"])
        chosen = len(routing(len(given["x"]), experts, given["ids"].shape[1]).unique())
        for name in ("gate_up_packed", "gate_up_scale", "down_packed", "down_scale"):
            moved[name] *= chosen / experts
    elif op == "vision_rope":
        moved["qkv"] *= 2 * 2 / 3  # q and k, not v
    return moved


def _flops(op: str, args: Sequence[Any]) -> float:
    """Operations of matrix products; 0 where there are none."""
    given = dict(zip(get_op(op).params, args, strict=True))
    products = 0.0  # multiply-adds
    if op in ("mla_absorb_query", "mla_project_value"):
        products = len(args[0]) * args[1].numel()
    elif op in ("mla_decode", "mla_decode_value"):
        batch, new, heads, width = given["q_latent"].shape
        keys = given["page_table"].shape[1] * given["kv_cache"].shape[1]
        project = given["w_uv"].numel() if op == "mla_decode_value" else 0
        products = batch * new * (heads * keys * (width + given["kv_lora_rank"]) + project)
    elif op in ("mla_prefill", "vision_attention"):
        queries, heads, width = given["q"].shape
        seen = (queries + 1) / 2 if given.get("causal") else len(given["k"])
        products = queries * seen * heads * (width + given["v"].shape[2])
    elif op in ("moe_route", "moe_route_sort"):
        products = len(given["x"]) * given["gate_weight"].numel()
    elif op == "moe_experts_int4":
        weights = 8 * (given["gate_up_packed"][0].numel() + given["down_packed"][0].numel())
        dense = given["shared_gate_up"], given["shared_down"]
        shared = sum(w.numel() for w in dense if w is not None)
        products = len(given["x"]) * (given["ids"].shape[1] * weights + shared)
    elif op == "int4_linear":
        products = len(given["x"]) * 8 * given["packed"].numel()
    return 2.0 * products


def work_of(op: str, args: Sequence[Any]) -> Work:
    """What a call of an op of this package must do at least; arguments may be on "meta"."""
    moved = traffic(op, args)
    written = moved.pop("")
    if op == "mla_latent_write":
        written += moved.pop("kv_cache")
    elif op == "vision_rope":
        written = moved["qkv"] = moved["qkv"] / 2
    return Work(sum(moved.values()), written, _flops(op, args))


def _torch_work(name: str, args: Sequence[Any], outputs: Any) -> Work:
    """The same of one of torch's."""
    written = _size(outputs)
    read = written if name in _GATHERS else sum(map(_size, args)) * (name != "ones_like")
    flops = 0.0
    if name in ("mm", "addmm"):
        left, right = [a for a in args if isinstance(a, Tensor)][-2:]
        flops = 2.0 * len(left) * right.numel()
    return Work(read, written, flops)


def floor_us(work: Work, rates: Rates) -> float:
    """Microseconds of a GPU's bandwidth, or of its tensor cores where they have a known rate."""
    peak = max((f.value for k, f in rates.tensor.items() if k.endswith("bf16.f32")), default=0.0)
    products = work.flops / (2 * peak * rates.sms.value * rates.clock.value) if peak else 0.0
    return 1e6 * max(work.bytes / rates.dram.value, products)


def floor_notes(devices: Iterable[str]) -> list[str]:
    """What floors on these GPUs leave out."""
    bare = [name for name in dict.fromkeys(devices) if not rates_of(name).tensor]
    return [f"{name}: floors are of bytes alone, no rate of products is known" for name in bare]


def gpu_of(rates: Rates) -> Target:
    """The GPU as kernels are told of it.

    Raises:
        ValueError: an architecture that is none of NVIDIA's.
    """
    limits = limits_of(rates.arch)
    if limits.capability is None:
        raise ValueError(f"{rates.name}: {rates.arch} is not NVIDIA's")
    sms = int(rates.sms.value)
    return Target("cuda", limits.capability, sms, limits.shared_per_block_bytes)


def launches_of(call: Call, rates: Rates) -> int:
    """Launches of one call: one of torch's, or those of the op's Triton kernels, laid out."""
    if not call.ours:
        return 1
    trials = importlib.import_module("kimi_ops.tune.trials")  # needs Triton
    outputs = get_op(call.op).outputs(*call.args)
    with targeting(gpu_of(rates)), trials.noting(execute=False) as noted:
        trials.launch(call.op, call.args, outputs)
    return len(noted)


class _Noting(TorchDispatchMode):
    """Notes calls that launch something on "meta": (part, name, schema, all arguments, results)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = ENDS
        self.noted: list[tuple[str, str, Any, tuple[Any, ...], Any]] = []

    def within(self, module: torch.nn.Module, part: str) -> None:
        """From now on what the module does is of this part."""
        module.register_forward_pre_hook(lambda *_: setattr(self, "part", part))
        module.register_forward_hook(lambda *_: setattr(self, "part", ENDS))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        schema = func._schema
        given = [*args, *((kwargs or {}).get(a.name, a.default_value) for a in
                          schema.arguments[len(args):])]  # fmt: skip
        made = outputs if isinstance(outputs, list | tuple) else (outputs, *given)
        tensor = next((t for t in made if isinstance(t, Tensor)), None)  # a result, if any
        view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        space, name = func.name().partition(".")[0].split("::")
        if view or name in _FREE or tensor is None or tensor.device.type != "meta":
            return outputs
        label = name if space == "kimi_ops" else f"torch {name.strip('_')}"
        self.noted.append((self.part, label, schema, tuple(given), outputs))
        return outputs


def _on_meta(value: Any) -> Any:
    """A step's data without content."""
    if isinstance(value, Tensor):
        return value.to(_META)
    if isinstance(value, tuple):
        return tuple(map(_on_meta, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _on_meta(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _run(case: StepCase, noting: _Noting) -> None:
    """Runs the model through a step on "meta"."""
    config = KimiK25Config.full_size()
    model = KimiK25(config, device="meta")
    language, layers = model.language, config.text_config.num_hidden_layers
    language.inv_freq = language.inv_freq.to(_META)
    for name, layer in language.layers.items():
        noting.within(layer, MOE if config.text_config.is_moe_layer(int(name)) else DENSE)
    pages = -(-case.length // 64)
    cache = LatentCache(
        config, num_pages=case.batch * pages, max_sequences=case.batch, layers=range(1)
    )
    sequences = [cache.add_sequence() for _ in range(case.batch)]
    if case.length > case.new:
        cache.extend(sequences, [case.length - case.new] * case.batch)
    step = _on_meta(cache.extend(sequences, [case.new] * case.batch))
    held = SimpleNamespace(pages=dict.fromkeys(range(layers), _on_meta(cache.pages[0])))
    with torch.no_grad(), noting:
        if case.picture:
            noting.part = VISION
            patch = config.vision_config.patch_size
            pixels = torch.empty(math.prod(case.picture), 3, patch, patch, device=_META)
            features = model.encode_media(pixels.bfloat16(), torch.tensor([case.picture]))
            noting.part = ENDS
        x = language.embed(torch.empty(case.batch * case.new, dtype=torch.int64, device=_META))
        if case.picture:
            x[torch.empty(len(features), dtype=torch.int64, device=_META)] = features
        hidden = language(x, step, cast(LatentCache, held))
        language.logits(hidden[: case.batch])


@functools.cache
def calls_of(case: StepCase) -> tuple[Call, ...]:
    """Everything that a step launches, in order of the first time."""
    noting = _Noting()
    _run(case, noting)
    calls: dict[str, Call] = {}
    for part, op, schema, args, outputs in noting.noted:
        shapes = {
            a.name: list(v.shape)
            for a, v in zip(schema.arguments, args, strict=True)
            if isinstance(v, Tensor)
        }
        made = [list(t.shape) for t in as_tuple(outputs)]
        key = f"{part} {op} {shapes} {made}"
        if old := calls.get(key):
            calls[key] = dataclasses.replace(old, count=old.count + 1)
            continue
        theirs = op.startswith("torch ")
        work = _torch_work(op[6:], args, outputs) if theirs else work_of(op, args)
        calls[key] = Call(part, op, args, shapes, 1, work)
    return tuple(calls.values())
