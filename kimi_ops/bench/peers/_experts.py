"""What the peers of the int4 ops share: the experts that calls choose, and a loop over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_ops.bench.case import Args
from kimi_ops.bench.memory import available_bytes
from kimi_ops.bench.peers import Declined, Prepared
from kimi_ops.quant.int4 import dequantize

SHARE_OF_MEMORY = 0.5  # of what is free, for a peer's own copy of weights


def silu_mul(gate_up: Tensor) -> Tensor:
    """As the op."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def made_once(calls: Sequence[Args], place: int, make: Callable[[Args], Any]) -> list[Any]:
    """``make(call)``, per call, once for each tensor that stands at a place of the arguments."""
    made: dict[int, Any] = {}
    for call in calls:
        key = call[place].data_ptr()
        if key not in made:
            made[key] = make(call)
    return [made[call[place].data_ptr()] for call in calls]


def chosen_experts(calls: Sequence[Args]) -> list[int]:
    """Local experts that any of the calls of `moe_experts_int4` chooses, ascending.

    Raises:
        Declined: the calls do not share their weights.
    """
    if len({call[1].data_ptr() for call in calls}) > 1:
        raise Declined("each call has expert weights of its own, too many to prepare")
    found: set[int] = set()
    for call in calls:
        found.update((call[6].unique() - first_expert(call)).tolist())
    return sorted(e for e in found if 0 <= e < len(calls[0][1]))


def first_expert(call: Args) -> int:
    """Where the local experts start among all."""
    return int(call[9][0]) if len(call) > 9 and call[9] else 0


def renumbered(calls: Sequence[Args], chosen: Sequence[int], elsewhere: int) -> list[Tensor]:
    """int64 ids of each call as places among the chosen experts; of experts that are not local,
    ``elsewhere``."""
    found = []
    for call in calls:
        local = call[6].long() - first_expert(call)
        places = torch.full((len(call[1]),), elsewhere, device=local.device)
        places[list(chosen)] = torch.arange(len(chosen), device=local.device)
        here = (local >= 0) & (local < len(places))
        found.append(places[local.clamp(0, len(places) - 1)].masked_fill(~here, elsewhere))
    return found


def shared_expert(call: Args) -> Tensor | None:
    """What the shared expert of a call adds, or None without one."""
    if len(call) < 9 or call[7] is None:
        return None
    return F.linear(silu_mul(F.linear(call[0], call[7])), call[8])


def expert_loop(calls: Sequence[Args], experts: dict[int, Callable[[Tensor], Tensor]]) -> Prepared:
    """``run`` of a loop over the experts; ``experts[e](rows)`` is local expert e on its tokens."""

    def run(i: int) -> Tensor:
        call, first = calls[i], first_expert(calls[i])
        x, weights, ids = call[0], call[5], call[6]
        y = torch.zeros(x.shape, device=x.device)
        for e in ids.unique().tolist():
            if e - first in experts:
                token, place = (ids == e).nonzero(as_tuple=True)
                out = experts[e - first](x[token]).float()
                y.index_add_(0, token, out.mul_(weights[token, place, None]))
        shared = shared_expert(call)
        return (y if shared is None else y + shared).to(x.dtype)

    return run


def check_copy(
    what: str, count: int, each_bytes: float, *, device: torch.device | None = None
) -> None:
    """Raises `Declined` where a peer's own copy of the weights would not fit beside ours.

    Args:
        what: for the message, ``"bfloat16 weights of {count} experts"``.
        count, each_bytes: how many, and of what size.
        device: the CPU if None.
    """
    limit = SHARE_OF_MEMORY * available_bytes(device or torch.device("cpu"))
    if count * each_bytes > limit:
        text = f"{what} would take {count * each_bytes / 2**30:.1f} GiB"
        raise Declined(f"{text}, the limit is {limit / 2**30:.1f} GiB: half of what is free")


def wide_experts(calls: Sequence[Args]) -> tuple[list[int], Tensor, Tensor]:
    """The n chosen experts, their weights ``[n, 2F, D]`` and ``[n, D, F]`` in the dtype of x."""
    x, gate_up, gate_up_scale, down, down_scale = calls[0][:5]
    chosen = chosen_experts(calls)
    each = 8 * x.element_size() * (gate_up[0].numel() + down[0].numel())  # 8 weights a word
    what = f"{str(x.dtype).removeprefix('torch.')} weights of {len(chosen)} experts"
    check_copy(what, len(chosen), each, device=x.device)

    def filled(packed: Tensor, scale: Tensor) -> Tensor:
        rows, words = packed.shape[1:]
        wide: Tensor = x.new_empty((len(chosen), rows, 8 * words))
        for place, e in enumerate(chosen):
            wide[place] = dequantize(packed[e], scale[e], x.dtype)
        return wide

    return chosen, filled(gate_up, gate_up_scale), filled(down, down_scale)
