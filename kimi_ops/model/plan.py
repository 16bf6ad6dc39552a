"""How much memory a model needs on each device, from its config alone, before any download.

Weights are exact (they are sums over the tensor shapes), the latent cache is exact, the workspace
is an estimate whose formula is part of the result. Bytes throughout; GB is 10^9 bytes, GiB 2^30.

Tensor parallelism over T devices splits attention heads, MLP widths and the vocabulary. The latent
cache, the latent down-projections, norms, router, vision tower and projector are the same on each
device: there is only one key-value head to split. Expert parallelism over E devices gives each
whole experts; without it, tensor parallelism splits the width of every expert.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kimi_ops.model.cache import CacheFormat, check_format
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.config_quantization import INT4_GROUP, QuantizationConfig
from kimi_ops.model.errors import ConfigError
from kimi_ops.model.parameter_counts import group_of
from kimi_ops.model.weight_map import (
    FusedParameter,
    TensorSpec,
    check_config,
    iter_fused,
    stored_dtype,
)
from kimi_ops.quant import latent_fp8

BF16_BYTES = 2
# Tokens that a prefill step processes at once, and patches of the largest picture of the released
# preprocessor: what the workspace is sized for.
PREFILL_CHUNK = 8192
PICTURE_PATCHES = 16_384
# Kept free for the driver's or operating system's own needs and for fragmentation.
RESERVE_FRACTION = 0.05
UNITS = {"GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40}
WORKSPACE_FORMULA = (
    "max(attention, dense, experts, vision) + logits, with c = min(context, 8192) tokens a step: "
    "attention = c (2 D + Q + C + R + H/T (2 (N + R) + 2 V)) x 2 B; "
    "dense = c (2 D + 3 F_dense/T) x 2 B; "
    "experts = c (2 D + K (3 F_local + D)) x 2 B, every chosen expert local; "
    "vision = 16384 patches (5 Dv + Fv) x 2 B; "
    "logits = local batch x vocabulary x 4 B"
)


@dataclass(frozen=True)
class Devices:
    """`count` equal devices with `memory_bytes` each; `kind` is `gpu` or `cpu`."""

    kind: str
    count: int
    memory_bytes: int


def parse_devices(text: str) -> Devices:
    """Reads `"8x141GB"`, `"80GiB"` (one) or `"cpu:768GB"`. Raises `ConfigError`."""
    units = "|".join(UNITS)
    match = re.fullmatch(
        rf"(?:(?P<count>[0-9]{{1,5}})x|(?P<cpu>cpu):)?(?P<size>[0-9]{{1,6}}(?:\.[0-9]{{1,6}})?)"
        rf"(?P<unit>{units})",
        str(text),
    )
    count = int(match["count"] or 1) if match else 0
    memory = int(float(match["size"]) * UNITS[match["unit"]]) if match else 0
    if match is None or count == 0 or memory == 0:
        raise ConfigError(
            f"devices must look like '8x141GB' or 'cpu:768GB' (units {', '.join(UNITS)}), got "
            f"{text!r}"
        )
    return Devices("cpu" if match["cpu"] else "gpu", count, memory)


def parse_parallel(
    text: str, devices: Devices, config: KimiK25Config, weights: str
) -> tuple[int, int]:
    """Reads `"none"`, `"tp8"`, `"ep8"` or `"tp8ep8"` as (tensor, expert) parallel degrees.

    The larger degree must use all devices and the smaller divide it. Raises `ConfigError` if it
    does not, or if a degree does not divide what it splits.
    """
    match = re.fullmatch(r"none|(?=.)(?:tp(?P<tp>[0-9]{1,5}))?(?:ep(?P<ep>[0-9]{1,5}))?", text)
    if match is None:
        raise ConfigError(f"parallel must be 'none', 'tp8', 'ep8' or 'tp8ep8' alike, got {text!r}")
    tensor, expert = int(match["tp"] or 1), int(match["ep"] or 1)
    if min(tensor, expert) < 1:
        raise ConfigError(f"parallel: a degree must be at least 1, got {text!r}")
    if max(tensor, expert) != devices.count or devices.count % min(tensor, expert):
        raise ConfigError(
            f"parallel {text!r} must use all {devices.count} device(s): the larger degree must "
            "equal their number and the smaller divide it"
        )
    language = config.text_config
    split = {
        "num_attention_heads": (language.num_attention_heads, tensor),
        "intermediate_size": (language.intermediate_size, tensor),
        "moe_intermediate_size x n_shared_experts": (
            language.moe_intermediate_size * language.n_shared_experts,
            tensor,
        ),
        "n_routed_experts": (language.n_routed_experts, expert),
    }
    for key, (size, degree) in split.items():
        if size % degree:
            raise ConfigError(f"parallel {text!r}: {degree} does not divide {key} ({size})")
    unit = INT4_GROUP if weights == "int4" else 1
    if expert == 1 and language.moe_intermediate_size % (unit * tensor):
        raise ConfigError(
            f"parallel {text!r}: moe_intermediate_size ({language.moe_intermediate_size}) does not "
            f"split into {tensor} parts of whole groups of {unit}"
        )
    return tensor, expert


@dataclass(frozen=True)
class Plan:
    """Memory per device: `components` are bytes by name. Devices are alike, so one tells all."""

    devices: Devices
    parallel: str
    weights: str
    context: int
    batch: int
    local_batch: int
    cache_format: str
    cache_bytes_per_token: int
    components: dict[str, int]
    splits: dict[str, str]
    largest_context: int

    @property
    def total_bytes(self) -> int:
        """Bytes needed on each device."""
        return sum(self.components.values())

    @property
    def free_bytes(self) -> int:
        """Bytes left on each device; negative by how much it does not fit."""
        return self.devices.memory_bytes - self.total_bytes

    @property
    def fits(self) -> bool:
        """Whether every device can hold its part."""
        return self.free_bytes >= 0

    def to_dict(self) -> dict[str, Any]:
        """Everything in the plan as JSON types; sizes in bytes."""
        return dataclasses.asdict(self) | {
            "total_bytes": self.total_bytes,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
            "workspace_formula": WORKSPACE_FORMULA,
        }

    def render(self) -> str:
        """The plan as a table for a terminal of 100 columns."""
        table = Table(
            title=(
                f"{self.devices.count} x {self.devices.memory_bytes / 1e9:,.1f} GB "
                f"({self.devices.kind}), {self.parallel}, {self.weights} experts, "
                f"batch {self.batch} x {self.context:,} tokens"
                + f", {self.cache_format} cache"
                * (self.cache_format != "plain")
            )
        )
        table.add_column("per device")
        table.add_column("GB", justify="right")
        table.add_column("how it is placed")
        for name, size in self.components.items():
            table.add_row(name.replace("_", " "), f"{size / 1e9:,.3f}", self.splits[name])
        table.add_section()
        table.add_row("total", f"{self.total_bytes / 1e9:,.3f}", "")
        verdict = ("left free", "it fits") if self.fits else ("missing", "it does not fit")
        table.add_row(verdict[0], f"{abs(self.free_bytes) / 1e9:,.3f}", verdict[1])
        output = io.StringIO()
        console = Console(file=output, width=100, color_system=None)
        console.print(table)
        if self.largest_context:
            console.print(f"Largest context at batch {self.batch}: {self.largest_context:,} tokens")
        else:
            console.print(f"No context fits at batch {self.batch}")
        console.print(f"Workspace: {WORKSPACE_FORMULA}", highlight=False)
        return output.getvalue()


def plan(
    config: KimiK25Config,
    *,
    devices: str,
    context: int,
    batch: int = 1,
    parallel: str | None = None,
    weights: str = "int4",
    cache_format: CacheFormat = "plain",
) -> Plan:
    """Memory per device for `batch` sequences of `context` tokens; all bf16 but int4 experts.

    `parallel` None is `tp<count>` (`none` for one device). Where tensor parallelism does not span
    all devices, the groups share the batch. `weights` `bf16` stores the routed experts unquantised,
    `cache_format` `fp8` the latent cache as `kimi_ops.quant.latent_fp8`.
    Raises `ConfigError` for a request that cannot be placed; not fitting is an answer, not an
    error.
    """
    if weights not in ("int4", "bf16"):
        raise ConfigError(f"weights must be 'int4' or 'bf16', got {weights!r}")
    check_format(cache_format)
    check_config(config)
    limit = config.text_config.max_position_embeddings
    if type(context) is not int or not 1 <= context <= limit:
        raise ConfigError(f"context must be from 1 to {limit} tokens, got {context!r}")
    if type(batch) is not int or not 1 <= batch <= 10**6:
        raise ConfigError(f"batch must be from 1 to 1000000 sequences, got {batch!r}")
    block = QuantizationConfig() if weights == "int4" else None
    config = dataclasses.replace(config, quantization_config=block)
    machine = parse_devices(devices)
    if parallel is None:
        parallel = "none" if machine.count == 1 else f"tp{machine.count}"
    tensor, expert = parse_parallel(parallel, machine, config, weights)
    local_batch = -(-batch // (machine.count // tensor))

    components, splits = _weights(config, tensor, expert)
    per_token = cache_bytes_per_token(config, cache_format)
    components["reserve"] = math.ceil(machine.memory_bytes * RESERVE_FRACTION)
    splits["reserve"] = f"{RESERVE_FRACTION:.0%} of the device, kept free"

    def with_context(tokens: int) -> dict[str, int]:
        return components | {
            "latent_cache": per_token * tokens * local_batch,
            "workspace": _workspace(config, tensor, expert, tokens, local_batch),
        }

    # Memory grows with the context, so the largest that fits is found by bisection.
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if sum(with_context(middle).values()) <= machine.memory_bytes:
            low = middle
        else:
            high = middle - 1
    shared = f", the same on {tensor} devices" if tensor > 1 else ""
    splits["latent_cache"] = f"{local_batch} sequence(s){shared}"
    splits["workspace"] = "estimate"
    return Plan(
        devices=machine,
        parallel=parallel,
        weights=weights,
        context=context,
        batch=batch,
        local_batch=local_batch,
        cache_format=cache_format,
        cache_bytes_per_token=per_token,
        components=with_context(context),
        splits=splits,
        largest_context=low,
    )


def cache_bytes_per_token(config: KimiK25Config, cache_format: CacheFormat = "plain") -> int:
    """Bytes that one token takes in the latent cache over all layers.

    Of K2.5 70,272 in bf16 ("plain"), 40,016 in "fp8".
    """
    check_config(config)
    text = config.text_config
    rank, rope = text.kv_lora_rank, text.qk_rope_head_dim
    fp8 = cache_format == "fp8"
    entry = latent_fp8.entry_bytes(rank, rope) if fp8 else (rank + rope) * BF16_BYTES
    return entry * text.num_hidden_layers


def _weights(
    config: KimiK25Config, tensor: int, expert: int
) -> tuple[dict[str, int], dict[str, str]]:
    sizes: dict[str, int] = {}
    ways: dict[str, set[int]] = {}
    for fused in iter_fused(config):
        group = group_of(fused.name)
        divisor = _divisor(fused, group, tensor, expert)
        rows, *rest = fused.shape
        if group in ("embed_tokens", "lm_head"):
            # The vocabulary is the one dimension that may split unevenly: count the larger share.
            rows, divisor_left = -(-rows // divisor), 1
        else:
            divisor_left = divisor
        dtype = stored_dtype(fused.kind, torch.bfloat16, torch.bfloat16)
        share = TensorSpec((rows, *rest), dtype).nbytes // divisor_left
        sizes[group] = sizes.get(group, 0) + share
        ways.setdefault(group, set()).add(divisor)
    splits = {}
    for group, divisors in ways.items():
        parts = max(divisors)
        text = f"split {parts} ways" if parts > 1 else "whole on each device"
        splits[group] = text + (", latent part whole" if len(divisors) > 1 else "")
    return sizes, splits


def _divisor(fused: FusedParameter, group: str, tensor: int, expert: int) -> int:
    if group == "routed_experts":
        return expert if expert > 1 else tensor
    if group in ("shared_experts", "dense_layers", "embed_tokens", "lm_head"):
        return tensor
    if group == "attention" and fused.name.endswith((".q_b", ".kv_b", ".o")):
        return tensor
    return 1


def _workspace(config: KimiK25Config, tensor: int, expert: int, context: int, batch: int) -> int:
    """Bytes of activations alive at once; `WORKSPACE_FORMULA` in code."""
    text, vision = config.text_config, config.vision_config
    tokens = min(context, PREFILL_CHUNK)
    latent = text.q_lora_rank + text.kv_lora_rank + text.qk_rope_head_dim
    heads = text.num_attention_heads // tensor
    attention = 2 * text.hidden_size + latent + heads * 2 * (text.qk_head_dim + text.v_head_dim)
    inner = text.moe_intermediate_size // (1 if expert > 1 else tensor)
    experts = 2 * text.hidden_size + text.num_experts_per_tok * (3 * inner + text.hidden_size)
    dense = 2 * text.hidden_size + 3 * text.intermediate_size // tensor
    patches = PICTURE_PATCHES * (5 * vision.vt_hidden_size + vision.vt_intermediate_size)
    values = max(tokens * attention, tokens * dense, tokens * experts, patches)
    return values * BF16_BYTES + batch * text.vocab_size * 4
