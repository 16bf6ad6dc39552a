"""How evenly the router of each layer uses its experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from kimi_ops.model.kimi import KimiK25
from kimi_ops.model.moe import MixtureOfExperts
from kimi_ops.train.balance import ExpertLoad


@contextlib.contextmanager
def router_load(model: KimiK25) -> Iterator[Mapping[int, ExpertLoad]]:
    """Counts what the routers choose within a ``with`` block, on any backend.

    Every token that goes through a layer counts: those of prompts, of pictures and clips, and new
    ones.

    Yields:
        the load by number of the decoder layer, of those that have experts.
    """
    loads: dict[int, ExpertLoad] = {}
    watched: list[MixtureOfExperts] = []
    try:
        for name, module in model.language.layers.named_children():
            moe = getattr(module, "moe", None)
            if isinstance(moe, MixtureOfExperts):
                load = ExpertLoad(len(moe.gate), model.device)
                loads[int(name)], moe.on_route = load, load.add
                watched.append(moe)
        yield loads
    finally:
        for moe in watched:
            moe.on_route = None


def to_json(loads: Mapping[int, ExpertLoad]) -> list[dict[str, Any]]:
    """Per layer the least and the largest load of an expert, over the mean of the layer."""
    return [
        {"layer": layer, "least": float(share.min()), "largest": float(share.max())}
        for layer, load in loads.items()
        for share in [load.share()]
    ]
