"""The CPU library beside what its user would otherwise run: `python bench/cpu_peers.py`.

Each row times an op of this package and torch's own way on the same inputs, in turn, and prints the
median of the ratios with the two medians: neighbours on the machine slow both, so the ratio says
more than the times. Inputs of Kimi K2.5's own sizes, rotated so that what a round reads is not in a
cache from the round before. The share of the ceiling is of the read bandwidth (a sum over 1 GiB) or
of the copy bandwidth that the same rounds measured.

Every pair is compared before it is timed; results further apart than bfloat16 explains are an
error.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

import kimi_ops
from kimi_ops import _native

D, F, C, R, HEADS = 7168, 2048, 512, 64, 64
BF16 = torch.bfloat16
Run = Callable[[int], Tensor]  # of a round


@dataclass(frozen=True)
class Pair:
    """One row: what is compared, and the bytes that our side must read, or read and write."""

    name: str
    ours: Run
    peer: Run
    peer_name: str
    read_bytes: float = 0
    moved_bytes: float = 0


def experts(number: int) -> Iterator[Pair]:
    """A MoE layer with `number` experts resident, 8 chosen."""
    shape = (number, 2 * F, D // 8)
    gate_up = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
    down = torch.randint(-(2**31), 2**31 - 1, (number, D, F // 8), dtype=torch.int32)
    gate_up_scale = (torch.rand(number, 2 * F, D // 32) * 0.01 + 0.001).to(BF16)
    down_scale = (torch.rand(number, D, F // 32) * 0.01 + 0.001).to(BF16)

    def repacked(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        octets = packed.view(torch.uint8)
        codes = torch.stack((octets & 15, octets >> 4), -1).flatten(-2).int()
        zeros = torch.zeros_like(scale)  # torch subtracts 8 itself
        return (
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
            torch.stack((scale, zeros), -1).transpose(0, 1).contiguous(),
        )

    torch_gate_up = [repacked(gate_up[e], gate_up_scale[e]) for e in range(number)]
    torch_down = [repacked(down[e], down_scale[e]) for e in range(number)]
    expert_bytes = 3 * D * F * (0.5 + 2 / 32)

    def product(x: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight[0], 32, weight[1])

    def pair(tokens: int) -> Pair:
        calls = []
        for _ in range(8):
            ids = torch.stack([torch.randperm(number)[:8] for _ in range(tokens)]).int()
            calls.append((torch.randn(tokens, D).to(BF16), torch.rand(tokens, 8), ids))
        chosen = statistics.mean(len(ids.unique()) for *_, ids in calls)

        def ours(i: int) -> Tensor:
            x, w, ids = calls[i % 8]
            return kimi_ops.moe_experts_int4(x, gate_up, gate_up_scale, down, down_scale, w, ids)

        def peer(i: int) -> Tensor:
            x, w, ids = calls[i % 8]
            y = torch.zeros(x.shape)
            for e in ids.unique().tolist():
                token, place = (ids == e).nonzero(as_tuple=True)
                h = product(x[token], torch_gate_up[e])
                out = product(silu(h[:, :F]) * h[:, F:], torch_down[e])
                y.index_add_(0, token, w[token, place, None] * out)
            return y.to(BF16)

        name = f"moe_experts_int4, {number} experts, {tokens} tokens"
        return Pair(name, ours, peer, "int4pack per expert", read_bytes=chosen * expert_bytes)

    yield from map(pair, (1, 8, 16, 64))


def decode() -> Iterator[Pair]:
    """Decode attention of one sequence, 64 heads; torch's three products in bfloat16."""

    def pair(cached: int) -> Pair:
        cache = torch.randn(4, cached // 64, 64, C + R).to(BF16)
        table = torch.arange(cached // 64, dtype=torch.int32)[None]
        lengths, q = torch.tensor([cached], dtype=torch.int32), torch.randn(1, 1, HEADS, C + R)
        q, scale = q.to(BF16), 192**-0.5

        def ours(i: int) -> Tensor:
            return kimi_ops.mla_decode(q, cache[i % 4], table, lengths, scale)[0]

        def peer(i: int) -> Tensor:
            kv = cache[i % 4].view(-1, C + R)
            weights = ((q[0, 0] @ kv.T).float() * scale).softmax(-1).to(BF16)
            return (weights @ kv[:, :C])[None, None]

        return Pair(f"mla_decode, 64 heads, {cached:,} cached", ours, peer, "three bf16 ops")

    yield from map(pair, (4096, 32768))


def router() -> Iterator[Pair]:
    """The router of 384 experts, and its selection alone."""
    gate, bias = torch.randn(384, D).mul(0.02).to(BF16), torch.randn(384) * 0.1
    wide = gate.float()

    def select(logits: Tensor) -> Tensor:
        score = logits.sigmoid()
        ids = (score + bias).topk(8, dim=-1).indices
        weights = score.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.827

    def pairs(tokens: int) -> Iterator[Pair]:
        x = [torch.randn(tokens, D).to(BF16) for _ in range(4)]
        logits = [v.float() @ wide.T for v in x]
        yield Pair(
            f"moe_route, {tokens} tokens",
            lambda i: kimi_ops.moe_route(x[i % 4], gate, bias, 8, scale=2.827)[0],
            lambda i: select(x[i % 4].float() @ wide.T),
            "float32 gate, topk, gathers",
        )
        yield Pair(
            f"moe_select, {tokens} tokens",
            lambda i: kimi_ops.moe_select(logits[i % 4], bias, 8, scale=2.827)[0],
            lambda i: select(logits[i % 4]),
            "topk, gathers",
        )

    yield from pairs(1)
    yield from pairs(1024)


def attention() -> Iterator[Pair]:
    """Un-absorbed attention of text and of a picture; torch's SDPA in bfloat16."""
    tokens = 4096
    q, k, v = torch.randn(3, tokens, 16, 72).to(BF16).unbind()
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    turned = [x.transpose(0, 1)[None] for x in (q, k, v)]
    yield Pair(
        "vision_attention, 4,096 patches",
        lambda i: kimi_ops.vision_attention(q, k, v, cu, tokens, 72**-0.5),
        lambda i: scaled_dot_product_attention(*turned)[0].transpose(0, 1),
        "SDPA",
    )
    length = 2048
    q2, k2 = torch.randn(2, length, HEADS, 192).to(BF16).unbind()
    v2 = torch.randn(length, HEADS, 128).to(BF16)
    cu2 = torch.tensor([0, length], dtype=torch.int32)
    padded = torch.nn.functional.pad(v2, (0, 64)).transpose(0, 1)[None]

    def sdpa(i: int) -> Tensor:
        heads = [x.transpose(0, 1)[None] for x in (q2, k2)]
        out = scaled_dot_product_attention(*heads, padded, is_causal=True)
        return out[0, ..., :128].transpose(0, 1)

    yield Pair(
        "mla_prefill, 2,048 tokens, 64 heads",
        lambda i: kimi_ops.mla_prefill(q2, k2, v2, cu2, cu2, length, length, 192**-0.5)[0],
        sdpa,
        "SDPA, v padded to 192",
    )


def streams() -> Iterator[Pair]:
    """Ops that move memory, at sizes beyond the caches, against torch's chains of ops."""
    rows = 16384
    x = [torch.randn(rows, D).to(BF16) for _ in range(3)]
    weight = torch.rand(D).to(BF16)

    def norm(v: Tensor) -> Tensor:
        wide = v.float()
        return weight * (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(BF16)

    size = rows * D * 2
    yield Pair(
        "rms_norm, 16,384 x 7,168",
        lambda i: kimi_ops.rms_norm(x[i % 3], weight, 1e-5),
        lambda i: norm(x[i % 3]),
        "eager chain",
        moved_bytes=2 * size,
    )
    gate_up = [torch.randn(rows, 2 * F).to(BF16) for _ in range(3)]
    yield Pair(
        "silu_mul, 16,384 x 2,048",
        lambda i: kimi_ops.silu_mul(gate_up[i % 3]),
        lambda i: silu(gate_up[i % 3][:, :F]) * gate_up[i % 3][:, F:],
        "eager chain",
        moved_bytes=3 * rows * F * 2,
    )
    side, width = 128, 1152
    patches = [torch.randn(side * side, width).to(BF16) for _ in range(3)]
    grid = torch.tensor([[1, side, side]])
    w, b = torch.rand(width).to(BF16), torch.rand(width).to(BF16)

    def merged(v: Tensor) -> Tensor:
        v = layer_norm(v, (width,), w, b, 1e-5).view(side // 2, 2, side // 2, 2, width)
        v = v.transpose(1, 2).reshape(-1, width)
        return layer_norm(v, (width,), w, b, 1e-5).view(-1, 4 * width)

    yield Pair(
        "patch_merge, 128 x 128 patches",
        lambda i: kimi_ops.patch_merge(patches[i % 3], grid, side * side // 4, w, b, w, b, 1e-5),
        lambda i: merged(patches[i % 3]),
        "eager chain",
        moved_bytes=2 * side * side * width * 2,
    )


GROUPS = {"experts": lambda: experts(40), "decode": decode, "router": router,
          "attention": attention, "streams": streams}  # fmt: skip


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(pair: Pair, rounds: int, big: Tensor) -> str:
    """A row of the table; raises AssertionError where the two sides disagree."""
    ours, peer = pair.ours(0).float(), pair.peer(0).float()
    apart = float((ours - peer).norm() / peer.norm())
    assert apart < 2e-2, f"{pair.name}: results are {apart:.2g} apart"
    times: dict[str, list[float]] = {"ours": [], "peer": [], "read": [], "copy": []}
    half = len(big) // 2
    for i in range(rounds):
        times["ours"].append(seconds(lambda i=i: pair.ours(i)))
        times["peer"].append(seconds(lambda i=i: pair.peer(i)))
        if pair.read_bytes:
            times["read"].append(seconds(big.sum))
        if pair.moved_bytes:
            times["copy"].append(seconds(lambda: big[:half].copy_(big[half:])))
    median = {name: statistics.median(values) for name, values in times.items() if values}
    ratio = statistics.median(p / o for p, o in zip(times["peer"], times["ours"], strict=True))
    size = big.numel() * big.element_size()
    share = math.nan
    if pair.read_bytes:
        share = (pair.read_bytes / median["ours"]) / (size / median["read"])
    if pair.moved_bytes:
        share = (pair.moved_bytes / median["ours"]) / (size / median["copy"])
    of = "" if math.isnan(share) else f"{share:.0%}"
    cells = (pair.name, f"{median['ours'] * 1e3:.3f}", f"{median['peer'] * 1e3:.3f}",
             f"{ratio:.2f}x", of, f"{apart:.1e}", pair.peer_name)  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints one table per number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    torch.manual_seed(0)
    big = torch.ones(1 << 27, dtype=torch.int64)
    print(f"instruction set {_native.cpu_isa()}, torch {torch.__version__}")
    with torch.inference_mode():
        for group in options.groups:
            for pair in GROUPS[group]():
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    print(f"| {threads} {measure(pair, options.rounds, big)}", flush=True)


if __name__ == "__main__":
    main()
