"""QK-Clip: after a step, heads whose attention logits have grown too large are scaled back.

Letters as in `model.attention`: T tokens, L keys, H heads, N nope, R rope, V value, C latent, Q
query latent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from kimi_ops.model.attention import LatentAttention
from kimi_ops.model.errors import KimiError
from kimi_ops.model.kimi import KimiK25

THRESHOLD = 100.0


@torch.no_grad()
def max_logits(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    *,
    causal: bool = True,
    block: int = 256,
) -> Tensor:
    """The largest scaled logit of each head, over the pairs that attend to each other.

    Arguments are those of `kimi_ops.mla_prefill`. Holds ``H * block * block`` logits at a time.
    Reads the offsets on the host.

    Args:
        q: ``[T, H, N+R]``, rotated, any float dtype.
        k: ``[L, H, N+R]``, dtype of ``q``.
        cu_seqlens_q, cu_seqlens_k: ``[B+1]`` integers, offsets of the sequences.
        scale: of the logits, with YaRN's factor where the model has it (``softmax_scale``).
        causal: bottom-right aligned.
        block: queries and keys taken together, in tokens.

    Returns:
        ``[H]`` float32 (float64 for float64 ``q``); -inf for a head without a pair, NaN for one
        with a NaN among its pairs. Join micro-batches with `torch.maximum`.

    Raises:
        KimiError: shapes that do not belong together, or a block below 1.

    Source: Kimi K2, arXiv 2507.20534 section 2.1 (S_max).
    """
    if q.dim() != 3 or k.dim() != 3 or q.shape[1:] != k.shape[1:]:
        raise KimiError(
            f"q and k must be [T, H, N+R] and [L, H, N+R], got {list(q.shape)} and {list(k.shape)}"
        )
    if block < 1:
        raise KimiError(f"block must be at least 1, got {block}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    largest = torch.full(q.shape[1:2], -torch.inf, dtype=dtype, device=q.device)
    spans = zip(
        itertools.pairwise(cu_seqlens_q.tolist()),
        itertools.pairwise(cu_seqlens_k.tolist()),
        strict=True,
    )
    for (q0, q1), (k0, k1) in spans:
        offset = (k1 - k0) - (q1 - q0) if causal else k1 - k0
        for i in range(0, q1 - q0, block):
            queries = q[q0 + i : min(q0 + i + block, q1)].to(dtype)
            # Query i sees the keys up to i + offset; the last of the block sees most.
            visible = min(k1 - k0, i + len(queries) + offset)
            for j in range(0, visible, block):
                keys = k[k0 + j : k0 + min(j + block, visible)].to(dtype)
                logits = torch.einsum("thd,lhd->htl", queries, keys) * scale
                rows = torch.arange(i, i + len(queries), device=q.device)[:, None]
                columns = torch.arange(j, j + len(keys), device=q.device)
                hidden = columns > rows + offset
                logits = logits.masked_fill(hidden, -torch.inf)
                largest = torch.maximum(largest, logits.amax(dim=(1, 2)))
    return largest


@torch.no_grad()
def qk_clip_(
    q_b: Tensor,
    kv_b: Tensor,
    largest: Tensor,
    *,
    nope: int,
    rope: int,
    threshold: float = THRESHOLD,
) -> Tensor:
    """Scales the logits of each head above the threshold by ``gamma = threshold / largest``.

    The parts of a query and a key without position take sqrt(gamma) each, the rotated part of the
    query takes gamma, because the rotated key is shared by all heads. Values, latent projections
    and other heads stay as they are. To be called after the optimizer's step, with what the
    forward before it saw.

    Args:
        q_b: ``[H*(N+R), Q]``, **written**; of the model or of the released ``q_b_proj``.
        kv_b: ``[H*(N+V), C]``, **written**; likewise ``kv_b_proj``.
        largest: ``[H]`` from `max_logits`, the maximum over the whole batch and all ranks.
        nope, rope: N and R.
        threshold: 100 in Kimi K2.

    Returns:
        gamma ``[H]``, dtype of ``largest``, at most 1.

    Raises:
        KimiError: shapes that do not belong together, a threshold that is not positive, or a NaN
            or +infinity in ``largest`` (nothing is written then).

    Source: Kimi K2, arXiv 2507.20534 section 2.1 (QK-Clip, for MLA).
    """
    heads = len(largest)
    if heads == 0 or q_b.shape[0] != heads * (nope + rope) or kv_b.shape[0] % heads:
        raise KimiError(
            f"q_b and kv_b must have {heads} heads of {nope} + {rope} rows and of {nope} + V rows, "
            f"got {list(q_b.shape)} and {list(kv_b.shape)}"
        )
    if kv_b.shape[0] // heads < nope:
        raise KimiError(f"kv_b must have at least {nope} rows a head, got {list(kv_b.shape)}")
    if not threshold > 0:
        raise KimiError(f"threshold must be positive, got {threshold}")
    bad = (largest.isnan() | largest.isposinf()).nonzero().flatten().tolist()
    if bad:
        raise KimiError(f"the largest logit is not finite in heads {bad}")
    clipped = largest > threshold
    gamma = torch.where(clipped, threshold / largest, 1.0)
    if clipped.any():
        root = gamma.sqrt()[:, None, None]
        queries = q_b.view(heads, nope + rope, -1)
        queries[:, :nope] *= root
        queries[:, nope:] *= gamma[:, None, None]
        kv_b.view(heads, kv_b.shape[0] // heads, -1)[:, :nope] *= root
    return gamma


def clip_model_(
    model: KimiK25, largest: Mapping[int, Tensor], *, threshold: float = THRESHOLD
) -> dict[int, Tensor]:
    """`qk_clip_` on decoder layers of a model.

    Args:
        model: its ``attn.q_b`` and ``attn.kv_b`` are **written**.
        largest: ``[H]`` by number of the decoder layer.
        threshold: as `qk_clip_`.

    Returns:
        gamma ``[H]`` by layer.

    Raises:
        KimiError: a layer that the model does not have, and as `qk_clip_`.

    Source: Kimi K2, arXiv 2507.20534 section 2.1.
    """
    text, gamma = model.config.text_config, {}
    for layer, values in largest.items():
        if layer not in model.decoder_layers:
            raise KimiError(f"the model has no decoder layer {layer}")
        attention = model.get_submodule(f"language.layers.{layer}.attn")
        assert isinstance(attention, LatentAttention)
        if len(values) != text.num_attention_heads:
            raise KimiError(
                f"layer {layer} has {text.num_attention_heads} heads, got {len(values)} values"
            )
        gamma[layer] = qk_clip_(
            attention.q_b,
            attention.kv_b,
            values,
            nope=text.qk_nope_head_dim,
            rope=text.qk_rope_head_dim,
            threshold=threshold,
        )
    return gamma
