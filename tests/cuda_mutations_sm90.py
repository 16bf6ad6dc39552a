"""Mutations of MLA decode on wgmma (sm_90): two warpgroups score tiles in turn, two add values."""

from __future__ import annotations

from cuda_mutations_base import WRONG, Mutation

from kimi_ops.testing.ptx import Deadlock, MissingFence, MissingWait, Race, Uninitialised

_ROLES, _TILE = "mla_decode_sm90.cuh", "mla_decode_sm90_tile.cuh"


def _mutation(
    what: str, file: str, old: str, new: str, said: type[Exception] | None, why: str = ""
) -> Mutation:
    """Of a call with a sequence of five tiles in one split, the last of them half full."""
    named = {"arch": 90, "invariant": True, "slow": True}
    return Mutation(what, "mla_decode", "wide rows", file, old, new, said, why, **named)


MUTATIONS = [
    # Copies, and the proxies of shared memory.
    _mutation(
        "wgmma reads tokens that cp.async wrote, without a proxy fence", _ROLES,
        "    fence_proxy_async();  // cp.async wrote", "    // cp.async wrote", MissingFence,
    ),
    _mutation(
        "wgmma reads q that cp.async wrote, without a proxy fence", _ROLES,
        "  fence_proxy_async();\n  named_barrier_sync(QUERIES", "  named_barrier_sync(QUERIES",
        None,
        "a later fence of the same warps comes before the reading in every schedule of this call, "
        "and that no barrier orders it so for the other scorer is not looked at",
    ),
    _mutation(
        "wgmma reads p without a proxy fence", _ROLES,
        "    fence_proxy_async();\n    __syncwarp();", "    __syncwarp();", MissingFence,
    ),
    _mutation(
        "scorers do not wait for their copies", _ROLES,
        "    copy_async_wait<0>();\n    fence_proxy", "    fence_proxy", MissingWait,
    ),
    _mutation(
        "scorers do not wait for their copies of q", _ROLES,
        "  copy_async_wait<1>();  // q\n", "", MissingWait,
    ),
    _mutation(
        "page ids are not looked up a tile ahead", _ROLES,
        "    copies.look_up(cache, first + SCORERS * TILE_TOKENS, part.end);\n", "", WRONG,
    ),
    _mutation(
        "chunks are not exchanged as wgmma wants them", _TILE,
        "(part ^ row % 8) * 16", "part * 16", WRONG,
    ),
    # Barriers.
    _mutation(
        "q is read before the other scorer has copied its part", _ROLES,
        "  fence_proxy_async();\n  named_barrier_sync(QUERIES, SCORERS * GROUP);",
        "  fence_proxy_async();", Race,
    ),
    _mutation(
        "p comes where q is still read", _ROLES,
        "  named_barrier_sync(QUERIES, SCORERS * GROUP);  // p may", "  // p may", Race,
    ),
    _mutation(
        "warps of a scorer do not meet before their tile is read", _ROLES,
        "      named_barrier_sync(COPIED, GROUP);", "", Race,
    ),
    _mutation(
        "both scorers meet at one barrier", _ROLES,
        "named_barrier_sync(COPIED + 1, GROUP)", "named_barrier_sync(COPIED, GROUP)", Deadlock,
    ),
    _mutation(
        "sums of weights are read before they are there", _ROLES,
        "  named_barrier_sync(DONE, BLOCK);\n", "", Uninitialised,
    ),
    # mbarriers between scorers and adders.
    _mutation(
        "adders wait for the other phase of p (wrong parity)", _ROLES,
        "mbarrier_wait(&shared.scored[scorer], t / SCORERS % 2)",
        "mbarrier_wait(&shared.scored[scorer], (t / SCORERS + 1) % 2)", Uninitialised,
    ),
    _mutation(
        "scorers wait for the other phase of a free tile (wrong parity)", _ROLES,
        "mbarrier_wait(&shared.free[scorer], t / SCORERS % 2)",
        "mbarrier_wait(&shared.free[scorer], (t / SCORERS + 1) % 2)", Deadlock,
    ),
    _mutation(
        "scorers do not wait for a free tile", _ROLES,
        "    mbarrier_wait(&shared.free[scorer], t / SCORERS % 2);\n", "", Race,
    ),
    _mutation(
        "a scorer does not wait for the other one's maximum", _ROLES,
        "    if (t > 0) mbarrier_wait(&shared.scored[other], (t - 1) / SCORERS % 2);\n", "", Race,
    ),
    _mutation(
        "adders do not say that a tile is free", _ROLES,
        "if (threadIdx.x % WARP == 0) mbarrier_arrive(&shared.free[scorer]);", "", Deadlock,
    ),
    _mutation(
        "a tile is free when one of two adders is done with it", _ROLES,
        "mbarrier_init(&shared.free[scorer], ADDERS * GROUP_WARPS);",
        "mbarrier_init(&shared.free[scorer], GROUP_WARPS);", Deadlock,
    ),
    _mutation(
        "p counts as there when one warp of four has stored its rows", _ROLES,
        "mbarrier_init(&shared.scored[scorer], GROUP_WARPS);",
        "mbarrier_init(&shared.scored[scorer], 1);", Deadlock,
    ),
    # Products.
    _mutation(
        "scores are used before wgmma is done", _TILE, "  wgmma_wait(score);\n", "", MissingWait,
    ),
    _mutation(
        "sums fade while wgmma adds to them", _TILE,
        "  for (int part = 0; part < PARTS; ++part) wgmma_wait(acc[part]);",
        "  for (int part = 0; part < PARTS; ++part) {\n  }", MissingWait,
    ),
    _mutation(
        "values are added without wgmma.fence", _TILE,
        "  const auto values = matrix_descriptor(strips_smem, STRIP_BYTES, PATTERN_BYTES);\n"
        "  wgmma_fence();\n",
        "  const auto values = matrix_descriptor(strips_smem, STRIP_BYTES, PATTERN_BYTES);\n",
        MissingFence,
    ),
    _mutation(
        "patterns of tokens are taken for half as many", _TILE,
        "k * 2 * PATTERN_BYTES", "k * PATTERN_BYTES", WRONG,
    ),
    # Softmax over tiles.
    _mutation(
        "the adders' sums do not fade when the maximum grows", _ROLES,
        "acc[n][i] *= fade[i / 2 % 2]", "acc[n][i] *= 1.0f", WRONG,
    ),
    _mutation(
        "the total does not fade when the maximum grows", _ROLES,
        "      total[half] *= exp2_approx(top[half] - base);\n", "", WRONG,
    ),
    _mutation(
        "a row of 64 sees one token more than it may", _ROLES,
        "token < limit[half] ?", "token <= limit[half] ?", WRONG,
    ),
]  # fmt: skip
