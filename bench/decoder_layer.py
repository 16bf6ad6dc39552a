"""One full-size decoder layer of Kimi K2.5 on a CPU: `python bench/decoder_layer.py DIR`.

DIR gets a checkpoint of layer 1 in the released format with random weights (16 GB), and that
layer's experts once more in one file to be mapped (10 GB). Then, each in a process of its own:

- ``layer``: time of a decode step of the layer with 4,096 cached tokens, before (``reference``)
  and after (the CPU kernels), in turn; and where it goes, by op, torch's own included;
- ``mapped``: the MoE layer alone with experts in a mapped file that was dropped from the page
  cache: tokens per second cold and warm, and the memory that is resident.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kimi_ops
from kimi_ops.model import KimiK25
from kimi_ops.model.cache import LatentCache

LAYER, CACHED = 1, 4096
ARRAYS = ("gate_up_packed", "gate_up_scale", "down_packed", "down_scale")


def made(folder: Path) -> Path:
    """The checkpoint, written if it is not there."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        command = ["kimi-ops", "make-checkpoint", str(checkpoint), "--size", "kimi-k2.5"]
        subprocess.run([*command, "--layers", f"{LAYER}-{LAYER}"], check=True)
    return checkpoint


def loaded(folder: Path) -> KimiK25:
    """The model with that layer alone."""
    return KimiK25.from_pretrained(made(folder), layers=range(LAYER, LAYER + 1))


def rss() -> dict[str, float]:
    """Resident memory in GB: of the process's own, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines if line.startswith("Rss"))
    return {name: int(value.split()[0]) * 1024 / 1e9 for name, value in found.items()}


def print_row(*cells: object) -> None:
    """Of a table in Markdown."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def layer(folder: Path) -> None:
    """Decode steps of the layer."""
    model = loaded(folder)
    config, decoder = model.config, model.language.layers[str(LAYER)]
    print_row("tokens", "threads", "reference, ms", "cpu, ms", "ratio")
    print_row(*["---"] * 5)
    parts = {}
    for batch in (1, 8):
        cache = LatentCache(
            config,
            num_pages=batch * (CACHED // 64 + 2),
            layers=range(LAYER, LAYER + 1),
        )
        owners = [cache.add_sequence() for _ in range(batch)]
        cache.extend(owners, [CACHED] * batch)
        cache.pages[LAYER].normal_()
        step = cache.extend(owners, [1] * batch)
        inputs = [
            torch.randn(2, batch, config.text_config.hidden_size).bfloat16() for _ in range(8)
        ]

        def run(i: int, cache=cache, step=step, inputs=inputs) -> Tensor:
            x, residual = inputs[i % 8]
            return decoder(x, residual, step, cache.pages[LAYER], model.language.inv_freq)[0]

        for threads in (2, 1):
            torch.set_num_threads(threads)
            times = defaultdict(list)
            for i in range(9):
                for backend in ("reference", "cpu"):
                    with kimi_ops.use_backend(backend):
                        start = time.perf_counter()
                        run(i)
                        times[backend].append(1e3 * (time.perf_counter() - start))
            before, after = (statistics.median(times[name]) for name in ("reference", "cpu"))
            ratio = statistics.median(
                a / b for a, b in zip(times["reference"], times["cpu"], strict=True)
            )
            print_row(batch, threads, f"{before:.1f}", f"{after:.2f}", f"{ratio:.1f}x")
        torch.set_num_threads(2)
        with profile(activities=[ProfilerActivity.CPU]) as profiler, kimi_ops.use_backend("cpu"):
            for i in range(8):
                run(i)
        parts[batch] = {
            event.key: event.self_cpu_time_total / 8e3 for event in profiler.key_averages()
        }
    print()
    print_row("where the time goes, 2 threads, profiled", *(f"{b} tokens, ms" for b in parts))
    print_row(*["---"] * (1 + len(parts)))
    names = sorted(parts[1], key=lambda name: -parts[1][name])
    for name in [n for n in names if max(p.get(n, 0.0) for p in parts.values()) > 0.02]:
        print_row(f"`{name}`", *(f"{part.get(name, 0.0):.3f}" for part in parts.values()))


def mapped(folder: Path) -> None:
    """The MoE layer with experts in a mapped file."""
    path = folder / "experts.safetensors"
    if not path.is_file():
        moe = loaded(folder).language.layers[str(LAYER)].moe
        save_file({name: getattr(moe, name).data for name in (*ARRAYS, "gate", "bias")}, path)
        # In a process of its own: this one has read the weights already.
        os.execv(sys.executable, [sys.executable, *sys.argv])
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = rss()
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in (*ARRAYS, "gate", "bias")}
    size = sum(weights[name].nbytes for name in ARRAYS)
    print(f"{size / 1e9:.2f} GB of experts mapped; resident before any token: {before}, {rss()}\n")
    print_row("", "tokens a call", "calls", "tokens/s", "RssAnon, GB", "RssFile, GB")
    print_row(*["---"] * 6)
    generator = torch.Generator().manual_seed(0)

    def call(tokens: int) -> float:
        x = torch.randn(tokens, 7168, generator=generator).bfloat16()
        start = time.perf_counter()
        chosen, ids = kimi_ops.moe_route(x, weights["gate"], weights["bias"], 8, scale=2.827)
        kimi_ops.moe_experts_int4(x, *(weights[name] for name in ARRAYS), chosen, ids)
        return time.perf_counter() - start

    def row(what: str, tokens: int, calls: int) -> None:
        total = sum(call(tokens) for _ in range(calls))
        now = rss()
        cells = (f"{now['RssAnon']:.2f}", f"{now['RssFile']:.2f}")
        print_row(what, tokens, calls, f"{tokens * calls / total:.1f}", *cells)

    row("cold: each call reads experts from the disk", 1, 16)
    row("the rest of the experts read", 64, 12)
    row("warm", 1, 64)
    row("warm", 8, 24)
    row("warm", 64, 6)


def main() -> None:
    """Runs one part, or both in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--part", choices=("layer", "mapped"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.part is None:
        for part in ("layer", "mapped"):
            subprocess.run(
                [sys.executable, __file__, str(options.folder), "--part", part], check=True
            )
        return
    with torch.inference_mode():
        {"layer": layer, "mapped": mapped}[options.part](options.folder)


if __name__ == "__main__":
    main()
