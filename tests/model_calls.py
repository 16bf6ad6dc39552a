"""A tiny checkpoint, a prompt with a picture and a clip, and what the model says to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
