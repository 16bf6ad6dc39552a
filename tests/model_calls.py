"""A tiny checkpoint, a prompt with a picture and a clip, and what the model says to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

import kimi_ops
from kimi_ops.model.kimi import KimiK25

GRID = torch.tensor([[1, 4, 6], [2, 2, 4]])  # (t, h, w) of the picture and of the clip


def prompt(model: KimiK25) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[T]`` with placeholders of the media between the text, and their patches."""
    pieces = [torch.arange(5, 14), torch.arange(20, 23)]
    for _, h, w in GRID.tolist():
        media = torch.full((h * w // 4,), model.config.media_placeholder_token_id)
        pieces.insert(-1, media)
    patch = model.config.vision_config.patch_size
    pixels = torch.rand(int(GRID.prod(1).sum()), 3, patch, patch) * 2 - 1
    return torch.cat(pieces), pixels


def logits(
    model: KimiK25, ids: torch.Tensor, pixels: torch.Tensor, following: Sequence[int]
) -> torch.Tensor:
    """Logits of the last prompt token and of each token that follows, a cached step each.

    Returns:
        ``[1 + len(following), vocab]`` float32.
    """
    media = model.encode_media(pixels, GRID)
    cache = model.new_cache(num_pages=8, page_size=7)
    sequence = cache.add_sequence()
    step = cache.extend([sequence], [len(ids)])
    hidden = model.hidden_states(model.embed(ids, media), step, cache)
    found = [model.language.logits(hidden[-1:])]
    for token in following:
        x = model.language.embed(torch.tensor([token]))
        step = cache.extend([sequence], [1])
        found.append(model.language.logits(model.hidden_states(x, step, cache)))
    return torch.cat(found)


class Routing:
    """Which experts the router chose in one run, so that others can take the same ones.

    Selection is not continuous: on a near tie two correct routers differ, which ties there are
    depends on the last bits of the matrix products of the machine, and behind another expert no two
    results can be compared.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[torch.Tensor, torch.Tensor]] = []  # ids, and scores in float64

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Calls of `moe_route` in the block are kept, in order."""
        route = kimi_ops.moe_route

        def routed(x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, k: int, **how: Any):
            weights, ids = route(x, gate, bias, k, **how)
            self._calls.append((ids.long(), _scores(x, gate, bias)))
            return weights, ids

        with mock.patch.object(kimi_ops, "moe_route", routed):
            yield

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Calls in the block choose as those that were kept, with weights of their own.

        Asserts that a right router could have chosen so: scores of chosen experts may be below the
        best ones by no more than those of the two runs are apart, one up and one down.
        """
        route, calls = kimi_ops.moe_route, iter(self._calls)

        def routed(x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, k: int, **how: Any):
            ids, theirs = next(calls)
            mine = _scores(x, gate, bias)
            short = mine.topk(k).values[:, -1] - mine.gather(1, ids).amin(1)
            assert bool((short <= 2 * (mine - theirs).abs().amax(1)).all()), "another choice"
            found = []
            for row, chosen in zip(x, ids, strict=True):
                above = bias.clone()
                above[chosen] += 2  # sigmoids are below 1
                found.append(route(row[None], gate, above, k, **how))
            weights, again = (torch.cat(parts) for parts in zip(*found, strict=True))
            assert torch.equal(again.long().sort().values, ids.sort().values)
            return weights, again

        with mock.patch.object(kimi_ops, "moe_route", routed):
            yield
        assert next(calls, None) is None


def _scores(x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (x.double() @ gate.double().T).sigmoid() + bias.double()
