"""Mutations of the CUDA C++ kernels, and what is said of each.

A mutation changes one text of `csrc/cuda/`, in a copy of that folder. NVRTC compiles the copy, and
the emulator executes it in the body of the tests (`check_op`), on one small call. The table:

    python tests/cuda_mutations.py docs/results/mutations.md
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kimi_ops._batch_invariant import batch_invariant
from kimi_ops.cuda import _launcher
from kimi_ops.testing import cases, check_op
from kimi_ops.testing.checkout import commit_of
from kimi_ops.testing.inputs import int4, mla, moe, vision
from kimi_ops.testing.ptx import (
    Deadlock,
    Misaligned,
    MissingFence,
    MissingWait,
    OutOfBounds,
    PtxError,
    Race,
    Uninitialised,
)
from kimi_ops.testing.ways import WAYS, with_way

# What may be said beside an error of the emulator: the budget, and all else that `check_op` holds.
WRONG = AssertionError
SOURCES = _launcher.SOURCES
WAY_OF = {way.arch: way for way in WAYS if way.backend == "cuda"}


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        what: in words.
        op, call: the op that shows it, and one of its cases or of `_CALLS`.
        file: in `csrc/cuda/`.
        old, new: what is replaced by what.
        said: kind of error that must come; None: nothing is said, and the page tells why.
        why: of a mutation of which nothing is said.
        times: how often ``old`` is there, all of which are replaced.
        arch: of the emulated GPU, 80 or 90.
        invariant: in batch-invariant mode, where a sequence has few splits.
        slow: not in an ordinary test run.
        host: a constant of the launcher's and another value for it, which brings a large call's
            path to a small one.
    """

    what: str
    op: str
    call: str
    file: str
    old: str
    new: str
    said: type[Exception] | None
    why: str = ""
    times: int = 1
    arch: int = 80
    invariant: bool = False
    slow: bool = False
    host: tuple[str, object] | None = None


def _cut(args: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """The same with fewer rows than its grid announces."""
    return (args[0][:rows].clone(), *args[1:])


_CALLS: dict[tuple[str, str], Callable[[torch.Generator], tuple[Any, ...]]] = {
    ("moe_route", "65 tokens"): lambda g: moe.moe_route(g, 65, 320, 48, 4),
    ("moe_route", "3 tokens"): lambda g: moe.moe_route(g, 3, 320, 48, 4),
    ("moe_route", "many steps"): lambda g: moe.moe_route(g, 65, 8 * 4 * 64, 24, 4),
    ("patch_merge", "announced"): lambda g: _cut(vision.patch_merge(g, ((2, 4, 4),), d=40), 29),
    ("vision_rope", "announced"): lambda g: _cut(vision.vision_rope(g, ((2, 4, 4),), 2, 8), 29),
    ("mla_decode", "wide rows"): lambda g: mla.mla_decode(g, (300, 3), 20),
    ("int4_linear", "40 rows"): lambda g: int4.int4_linear(g, (40, 512), 72),
    ("mla_decode", "two chunks"): lambda g: mla.mla_decode(g, (600,), 2, 1, 64, (256, 16)),
    ("mla_decode", "100 tokens"): lambda g: mla.mla_decode(g, (100, 7), 20, 1, 16, (32, 16)),
    ("mla_decode", "600 tokens"): lambda g: mla.mla_decode(g, (600,), 3, 1, 64, (32, 16)),
    ("mla_decode_value", "600 tokens"): lambda g: mla.mla_decode_value(
        g, (600, 9), 3, 24, new=1, page=64, widths=(32, 16)
    ),
}

MUTATIONS = [
    # Row norms.
    Mutation(
        "a block's partial sums are read without a barrier",
        "rms_norm", "bf16-2x7168", "reduce.cuh",
        "  __syncthreads();\n  Sum sum = 0;", "  Sum sum = 0;", Race,
    ),
    Mutation(
        "the last step of a warp's sum is left out",
        "rms_norm", "bf16-3x127", "reduce.cuh",
        "for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {\n    value +=",
        "for (int lanes = WARP / 2; lanes > 1; lanes /= 2) {\n    value +=", WRONG,
    ),
    Mutation(
        "rows past the last one are not left out",
        "rms_norm", "bf16-3x127", "rms_norm.cu",
        "  if (row >= rows) return;", "", OutOfBounds,
    ),
    Mutation(
        "a row is read one vector too far",
        "rms_norm", "bf16-2x3x512", "rows.cuh",
        "      if (d < columns) held[i] = load_vec", "      if (d <= columns) held[i] = load_vec",
        OutOfBounds, slow=True,
    ),
    Mutation(
        "a thread's vectors begin one element late",
        "rms_norm", "bf16-2x3x512", "rows.cuh",
        "first(thread * N)", "first(thread * N + 1)", Misaligned,
    ),
    Mutation(
        "results go to the next row",
        "rms_norm", "bf16-2x3x512", "rms_norm.cu",
        "y_gmem + row * columns;", "y_gmem + (row + 1) * columns;", OutOfBounds, slow=True,
    ),
    Mutation(
        "the sum is not divided by the number of columns",
        "add_rms_norm", "bf16-3x127", "rows.cuh",
        "sqrtf(squares / columns + eps)", "sqrtf(squares + eps)", WRONG,
    ),
    # The sort.
    Mutation(
        "the warps' counts are read without a barrier",
        "moe_sort", "skewed", "moe_sort.cu", "  __syncthreads();\n", "", Race,
    ),
    Mutation(
        "a hit's own lane counts as one below it",
        "moe_sort", "skewed", "moe_sort.cu",
        "__popc(lanes & ((1u << lane) - 1))", "__popc(lanes & ((2u << lane) - 1))", OutOfBounds,
    ),
    Mutation(
        "a warp's own hits count as before it",
        "moe_sort", "skewed", "moe_sort.cu",
        "if (other < warp) mine_before", "if (other <= warp) mine_before", Race,
    ),
    Mutation(
        "pairs past the end are read",
        "moe_sort", "one", "moe_sort.cu",
        "if (pair < end) expert[j]", "expert[j]", OutOfBounds,
    ),
    # The router, up to 64 tokens: a product and a selection in one launch.
    Mutation(
        "a block arrives before its warps have stored their logits",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "__shared__ bool last_smem;\n  __syncthreads();", "__shared__ bool last_smem;", Race,
    ),
    Mutation(
        "arrivals publish nothing (relaxed for acq_rel)",
        "moe_route", "3 tokens", "ptx.cuh",
        "atom.global.add.acq_rel.gpu.s32", "atom.global.add.relaxed.gpu.s32", Race,
    ),
    Mutation(
        "the last but one block selects",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "== blocks - 1;", "== blocks - 2;", Race,
    ),
    Mutation(
        "no block finds itself last",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "== blocks - 1;", "== blocks;", Uninitialised, slow=True,
    ),
    Mutation(
        "whether a block is last is read without a barrier",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "    if (last_smem) *counter_gmem = 0;\n  }\n  __syncthreads();",
        "    if (last_smem) *counter_gmem = 0;\n  }", Uninitialised,
    ),
    Mutation(
        "the warps' sums are read without a barrier",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "  __syncthreads();\n#pragma unroll\n  for (int i = threadIdx.x;",
        "#pragma unroll\n  for (int i = threadIdx.x;", Race, slow=True,
    ),
    Mutation(
        "rows past the last token are read",
        "moe_route", "3 tokens", "moe_route_few.cuh",
        "min(token + r + 8 * n, tokens - 1)", "token + r + 8 * n", OutOfBounds, slow=True,
    ),
    # The router of many tokens: three stages of asynchronous copies.
    Mutation(
        "the product waits for one copy too few",
        "moe_route", "65 tokens", "moe_route_many.cuh",
        "copy_async_wait<STAGES - 2>", "copy_async_wait<STAGES - 1>", MissingWait,
    ),
    Mutation(
        "a stage is read without a barrier after the wait",
        "moe_route", "65 tokens", "moe_route_many.cuh",
        "    __syncthreads();  // stage i", "    // stage i", Race,
    ),
    Mutation(
        "a stage's copies are not committed",
        "moe_route", "65 tokens", "moe_route_many.cuh",
        "    }\n    copy_async_commit();\n  }\n", "    }\n  }\n", MissingWait,
    ),
    Mutation(
        "the next copy goes into the stage that is read",
        "moe_route", "many steps", "moe_route_many.cuh",
        "smem + (i + STAGES - 1) % STAGES * STAGE", "smem + i % STAGES * STAGE", MissingWait,
    ),
    Mutation(
        "rows past the last token are copied",
        "moe_route", "65 tokens", "moe_route_many.cuh",
        "index < (of_gate ? experts : tokens) && d", "d", OutOfBounds, slow=True,
    ),
    # The selection.
    Mutation(
        "keys end in the expert, not in its complement",
        "moe_select", "ties", "select.cuh",
        "+ (ID_MASK - expert_of(i));", "+ expert_of(i);", OutOfBounds,
    ),
    Mutation(
        "experts of dropped groups stay",
        "moe_select", "bf16-groups", "select.cuh",
        "pair_smem[e * per_expert >> 20] != KEPT", "false", WRONG, slow=True,
    ),
    Mutation(
        "a group's lanes do not wait for each other (no __syncwarp)",
        "moe_select", "bf16-groups", "select.cuh", "  __syncwarp();\n", "", None,
        why="races between lanes of one warp are not found", times=2,
    ),
    # The vision encoder's.
    Mutation(
        "a corner's sums are overwritten before all have read them",
        "patch_merge", "bf16-width-2040", "patch_merge.cu",
        "  __syncthreads();  // what the call before left there has been read\n", "", Race,
    ),
    Mutation(
        "a corner's sums are read without a barrier",
        "patch_merge", "bf16-width-2040", "patch_merge.cu",
        "  __syncthreads();\n  float sum = 0.0f;", "  float sum = 0.0f;", Race,
    ),
    Mutation(
        "patches that the grid announces past the end are read",
        "patch_merge", "announced", "patch_merge.cu",
        "patch >= 0 && patch < length;", "patch >= 0;", OutOfBounds,
    ),
    Mutation(
        "the frames of a clip are not told apart",
        "patch_merge", "bf16-small", "patch_merge.cu",
        "++frame, patch += at.h * at.w", "++frame", WRONG,
    ),
    Mutation(
        "patches past the last one are turned",
        "vision_rope", "announced", "vision_rope.cu",
        "  if (patch >= length) return;", "", OutOfBounds,
    ),
    Mutation(
        "row and column change places",
        "vision_rope", "bf16-head-4", "vision_rope.cu",
        "pair % 2 == 0 ? column : row", "pair % 2 == 0 ? row : column", WRONG,
    ),
    Mutation(
        "sines are read without __syncwarp",
        "vision_rope", "bf16-head-4", "vision_rope.cu", "  __syncwarp();\n", "", None,
        why="races between lanes of one warp are not found",
    ),
    # The latent write: three warps of four meet at a barrier of their own.
    Mutation(
        "the barrier waits for a warp that never comes",
        "mla_latent_write", "fp8-tiny", "mla_latent_write.cu",
        "named_barrier_sync(1, Q_WARPS * WARP)", "named_barrier_sync(1, (Q_WARPS + 1) * WARP)",
        Deadlock,
    ),
    Mutation(
        "partial sums are read without the barrier",
        "mla_latent_write", "fp8-tiny", "mla_latent_write.cu",
        "    named_barrier_sync(1, Q_WARPS * WARP);\n", "", Race,
    ),
    Mutation(
        "slots outside the cache are written",
        "mla_latent_write", "fp8-tiny", "mla_latent_write.cu",
        "  if (!inside) return;\n", "", OutOfBounds, slow=True,
    ),
    # MLA decode: tiles of 32 tokens, two of them in turn.
    Mutation(
        "a tile is read before its copies have landed",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "    copy_async_wait<0>();\n    __syncthreads();  // the tokens are there",
        "    __syncthreads();  // the tokens are there", MissingWait, invariant=True,
    ),
    Mutation(
        "a tile is read, and the other refilled, without a barrier",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "    __syncthreads();  // the tokens are there, and nobody needs",
        "    // the tokens are there, and nobody needs", Race, invariant=True, slow=True,
    ),
    Mutation(
        "the tiles change places (wrong parity)",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "(block - blocks.first) % 2 != 0", "(block - blocks.first) % 2 == 0", WRONG,
        invariant=True, slow=True,
    ),
    Mutation(
        "warps that share scores do not meet",
        "mla_decode", "100 tokens", "mla_decode_products.cuh",
        "if (at.warp / S::K_GROUPS == adders) named_barrier_sync(1 + adders, S::K_GROUPS * WARP);",
        "", Race, invariant=True, slow=True,
    ),
    Mutation(
        "maxima are read without a barrier",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "    __syncthreads();\n#pragma unroll\n    for (int half = 0; half < 2; ++half) {\n"
        "      const int row", "#pragma unroll\n    for (int half = 0; half < 2; ++half) {\n"
        "      const int row", Race, invariant=True, slow=True,
    ),
    Mutation(
        "p is read without a barrier",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "    __syncthreads();\n    float fade[ROWS / 8];", "    float fade[ROWS / 8];", Race,
        invariant=True, slow=True,
    ),
    Mutation(
        "page ids are not looked up for the next but one tile",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "      tokens.look_up(cache, block + 2, end);\n", "", WRONG, invariant=True, slow=True,
    ),
    Mutation(
        "the sums do not fade when the maximum grows",
        "mla_decode", "100 tokens", "mla_decode_split.cuh",
        "acc[m][n][e] *= fade[2 * m + e / 2]", "acc[m][n][e] *= 1.0f", WRONG, invariant=True,
        slow=True,
    ),
    Mutation(
        "a row sees one token more than it may",
        "mla_decode", "bf16-small", "mla_decode_split.cuh",
        "token < limit[half] ?", "token <= limit[half] ?", WRONG, slow=True,
    ),
    Mutation(
        "absurd page ids are followed",
        "mla_decode", "bf16-lost-page", "mla_decode_tile.cuh",
        "const bool present = page[i] >= 0 && page[i] < cache.num_pages;",
        "const bool present = true;", OutOfBounds, slow=True,
    ),
    Mutation(
        "rows of matrices start in the middle of 16 bytes",
        "mla_decode", "bf16-small", "mla_decode_products.cuh",
        "lane / 8 % 2 * 16;", "lane / 8 % 2 * 8;", Misaligned, slow=True,
    ),
    Mutation(
        "the joined sums are overwritten before they are read",
        "mla_decode", "two chunks", "mla_decode_combine.cuh",
        "      __syncthreads();  // the sums of the chunk before have been read\n", "", Race,
        host=("kimi_ops.cuda.mla_decode.ROWS_A_MULTIPROCESSOR", 0), slow=True,
    ),
    Mutation(
        "the joined sums are read without a barrier",
        "mla_decode", "600 tokens", "mla_decode_combine.cuh",
        "      sum_smem[warp][lane] = sum;\n      __syncthreads();",
        "      sum_smem[warp][lane] = sum;", Race, slow=True,
    ),
    Mutation(
        "the weight is read before its copies have landed",
        "mla_decode_value", "600 tokens", "mla_decode_value.cu",
        "  copy_async_wait<0>();\n  __syncthreads();", "  __syncthreads();", MissingWait, slow=True,
    ),
    Mutation(
        "joined rows are read without a barrier",
        "mla_decode_value", "600 tokens", "mla_decode_value.cu",
        "  copy_async_wait<0>();\n  __syncthreads();", "  copy_async_wait<0>();", Race, slow=True,
    ),
    # Its path of wgmma for sm_90: two warpgroups that score tiles in turn, two that add values.
    Mutation(
        "wgmma reads tokens that cp.async wrote, without a proxy fence",
        "mla_decode", "wide rows", "mla_decode_sm90.cuh",
        "    fence_proxy_async();  // cp.async wrote", "    // cp.async wrote", MissingFence,
        arch=90, invariant=True, slow=True,
    ),
    Mutation(
        "scorers do not wait for their copies",
        "mla_decode", "wide rows", "mla_decode_sm90.cuh",
        "    copy_async_wait<0>();\n    fence_proxy", "    fence_proxy", MissingWait,
        arch=90, invariant=True, slow=True,
    ),
    Mutation(
        "adders wait for the other phase of p (wrong parity)",
        "mla_decode", "wide rows", "mla_decode_sm90.cuh",
        "mbarrier_wait(&shared.scored[scorer], t / SCORERS % 2)",
        "mbarrier_wait(&shared.scored[scorer], (t / SCORERS + 1) % 2)", Uninitialised,
        arch=90, invariant=True, slow=True,
    ),
    Mutation(
        "scorers wait for the other phase of a free tile (wrong parity)",
        "mla_decode", "wide rows", "mla_decode_sm90.cuh",
        "mbarrier_wait(&shared.free[scorer], t / SCORERS % 2)",
        "mbarrier_wait(&shared.free[scorer], (t / SCORERS + 1) % 2)", Deadlock,
        arch=90, invariant=True, slow=True,
    ),
    Mutation(
        "adders do not say that a tile is free",
        "mla_decode", "wide rows", "mla_decode_sm90.cuh",
        "if (threadIdx.x % WARP == 0) mbarrier_arrive(&shared.free[scorer]);", "", Deadlock,
        arch=90, invariant=True, slow=True,
    ),
    Mutation(
        "a tile is free when one of two adders is done with it",
        "mla_decode", "wide rows", "mla_decode_sm90.cuh",
        "mbarrier_init(&shared.free[scorer], ADDERS * GROUP_WARPS);",
        "mbarrier_init(&shared.free[scorer], GROUP_WARPS);", Deadlock,
        arch=90, invariant=True, slow=True,
    ),
    Mutation(
        "scores are used before wgmma is done",
        "mla_decode", "wide rows", "mla_decode_sm90_tile.cuh",
        "  wgmma_wait(score);\n", "", MissingWait, arch=90, invariant=True, slow=True,
    ),
    # The experts, and the same products of a linear layer.
    Mutation(
        "a step of int4 codes is read before its copies have landed",
        "int4_linear", "40 rows", "int4_many.cuh",
        "copy_async_wait<STAGES - 2>", "copy_async_wait<STAGES - 1>", MissingWait,
        invariant=True, slow=True,
    ),
    Mutation(
        "a step of int4 codes is read without a barrier",
        "int4_linear", "40 rows", "int4_many.cuh",
        "    __syncthreads();  // this step is there", "    // this step is there", Race,
        invariant=True, slow=True,
    ),
    Mutation(
        "an expert's counts are read without a barrier",
        "moe_experts_int4", "bf16-scale-fp16", "moe_experts_int4_blocks.cuh",
        "  __syncthreads();\n  int start = 0", "  int start = 0", Race, slow=True,
    ),
    Mutation(
        "an expert's slots begin one place late",
        "moe_experts_int4", "bf16-scale-fp16", "moe_experts_int4_blocks.cuh",
        "  at += start;\n", "  at += start + 1;\n", Race, slow=True,
    ),
]  # fmt: skip


def mutated(mutation: Mutation, folder: Path) -> Path:
    """A copy of the sources with the change, in a folder."""
    copy = folder / "cuda"
    shutil.copytree(SOURCES, copy)
    path = copy / mutation.file
    text = path.read_text()
    found = text.count(mutation.old)
    assert found == mutation.times, f"{mutation.file}: {mutation.old!r} is there {found} times"
    path.write_text(text.replace(mutation.old, mutation.new))
    # The calls are in bfloat16: instances of other dtypes would only take time to compile.
    source = copy / f"{mutation.op}.cu"
    source.write_text(re.sub(r"^[A-Z]+\((fp16|float),.*\n", "", source.read_text(), flags=re.M))
    return copy


def arguments(mutation: Mutation) -> tuple[Any, ...]:
    """Of the call that shows it."""
    if build := _CALLS.get((mutation.op, mutation.call)):
        return build(torch.Generator().manual_seed(7))
    (case,) = (c for c in cases(mutation.op, full=True) if c.name == mutation.call)
    return case.args()


def what_is_said(mutation: Mutation) -> Exception | None:
    """What the emulator, or the body of the tests, says of the mutated kernel; None: nothing."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(_launcher, "SOURCES", mutated(mutation, Path(folder))),
        with_way(mutation.op, WAY_OF[mutation.arch]) as backend,
        batch_invariant() if mutation.invariant else contextlib.nullcontext(),
        mock.patch(*mutation.host) if mutation.host else contextlib.nullcontext(),
    ):
        try:
            check_op(mutation.op, arguments(mutation), backend)
        except (PtxError, AssertionError) as error:
            return error
    return None


def told(error: Exception | None) -> str:
    """What is said, on one line: kind, message, place."""
    if error is None:
        return "nothing"
    kind = "outside the budget" if type(error) is AssertionError else type(error).__name__
    text = re.sub(r",? (at )?PTX line \d+", "", " ".join(str(error).split()))
    return f"**{kind}**: {text}"


def row(mutation: Mutation, said: str) -> str:
    """A row of the page."""
    call = f"`{mutation.op}`, {mutation.call}" + ", sm_90" * (mutation.arch == 90)
    cells = (mutation.what, mutation.file, call, said)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def page() -> str:
    """The page: all mutations, executed anew."""
    rows = []
    for mutation in MUTATIONS:
        error = what_is_said(mutation)
        wanted = mutation.said
        if not (error is None if wanted is None else isinstance(error, wanted)):
            raise SystemExit(f"{mutation.what}: {told(error)}")
        rows.append(row(mutation, told(error) + f" ({mutation.why})" * bool(mutation.why)))
        print(rows[-1], flush=True)
    silent = sum(mutation.said is None for mutation in MUTATIONS)
    made_with = commit_of("csrc/cuda")
    return "\n".join(
        [
            "# Mutations of the CUDA C++ kernels",
            "",
            f"{len(MUTATIONS)} changes to `csrc/cuda/`, one at a time, each compiled by NVRTC and "
            "executed in the emulator (sm_80, or sm_90 where a row says so) in the body of the "
            "tests on one small call. Of "
            f"{len(MUTATIONS) - silent} something is said; of {silent} nothing, and why is in the "
            "row. `tests/test_cuda_mutations.py` holds the kind of what is said: the quick ones in "
            "every run, all with `--full`. Made with "
            f"`python tests/cuda_mutations.py docs/results/mutations.md`, {made_with}.",
            "",
            "| change | file | shown by | what is said |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
