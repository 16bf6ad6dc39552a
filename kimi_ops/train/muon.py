"""Muon for the matrices of the model; AdamW, torch's own, for everything else.

The model keeps fused parameters: projections that read the same input are one matrix, the experts
of a layer one array. Muon is defined on the matrices of the released checkpoint, so each parameter
is taken apart into those (`rows`), and each is orthogonalised by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import KimiError
from kimi_ops.model.weight_map import FusedParameter, Kind, iter_fused

Coefficients = tuple[float, float, float]
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
# An orthogonal n x m matrix has an RMS of max(n, m)^-1/2; this is the RMS of an update of AdamW.
UPDATE_RMS = 0.2
# Matrices by shape, but tables by use: of each step they see a few rows.
_TABLES = ("language.embed_tokens", "language.lm_head")


def newton_schulz(
    matrix: Tensor,
    *,
    coefficients: Coefficients = QUINTIC,
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Brings all singular values of a matrix near 1 and leaves its singular vectors alone.

    Each step maps a singular value s to ``a s + b s^3 + c s^5``; the first starts from
    ``s / (Frobenius norm + eps)``. The default coefficients do not converge to 1: five steps of
    them bring every value from 0.002 on into 0.68 .. 1.21.

    Args:
        matrix: ``[..., n, m]``, any float dtype; leading dimensions are a batch of matrices.
        coefficients: (a, b, c).
        steps: of the iteration.
        eps: added to the norm, so that a matrix of zeros stays one.
        dtype: of the iteration. Public code of the predecessor uses bfloat16.

    Returns:
        ``[..., n, m]``, dtype of ``matrix``.

    Source: Muon is Scalable for LLM Training, arXiv 2502.16982 section 2.1.
    """
    a, b, c = coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix  # the square products are those of the shorter side
    exact = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(exact, dim=(-2, -1), keepdim=True)
    x = (exact / (norm + eps)).to(dtype)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    result: Tensor = x.mT if tall else x
    return result.to(matrix.dtype)


class Muon(Optimizer):
    """Momentum, orthogonalised; a step of a matrix ``W [n, m]`` with gradient G is::

        M <- momentum * M + G
        O  = newton_schulz(M, or G + momentum * M if nesterov) * sqrt(max(n, m)) * 0.2
        W <- W - lr * (O + weight_decay * W)

    so that an update has an RMS near 0.2, like one of AdamW, and shares its learning rate and
    decay. State is ``momentum_buffer``, shape and dtype of the parameter: train float32 parameters
    where small updates matter. `state_dict` and `load_state_dict` are bit-exact.

    Args:
        params: parameters ``[n, m]`` or ``[E, n, m]`` (E matrices, each by itself), or param
            groups of them. A group may set every argument below for itself.
        lr: learning rate.
        momentum: in 0 .. 1, 1 excluded.
        nesterov: see above. Algorithm 1 of Kimi K2 has none; public code of the predecessor does.
        weight_decay: decoupled, multiplied by ``lr`` alone.
        coefficients, steps, eps, dtype: of `newton_schulz`.
        rows: the matrices that a parameter is made of, one below the other, by their numbers of
            rows; None is one matrix.

    Raises:
        KimiError: a parameter of other shape or of an integer dtype, rows that do not add up, a
            number out of range, a sparse gradient.

    Source: Kimi K2, arXiv 2507.20534 section 2.1 and algorithm 1; constants that it does not
        state: arXiv 2502.16982 and its public code.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 2e-4,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.1,
        coefficients: Coefficients = QUINTIC,
        steps: int = 5,
        eps: float = 1e-7,
        dtype: torch.dtype = torch.float32,
        rows: tuple[int, ...] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "coefficients": coefficients,
            "steps": steps,
            "eps": eps,
            "dtype": dtype,
            "rows": rows,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters to move, as ``params`` of the constructor. Raises `KimiError`."""
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(  # type: ignore[override] # torch has an overload for each case of the closure
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Moves every parameter that has a gradient. ``closure`` as in every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            raise KimiError("Muon takes no sparse gradients")
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        average.mul_(group["momentum"]).add_(gradient)
        direction = average
        if group["nesterov"]:
            direction = gradient.add(average, alpha=group["momentum"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rows = list(group["rows"] or direction.shape[-2:-1])
        pieces = zip(parameter.split(rows, dim=-2), direction.split(rows, dim=-2), strict=True)
        for target, piece in pieces:
            update = newton_schulz(
                piece,
                coefficients=group["coefficients"],
                steps=group["steps"],
                eps=group["eps"],
                dtype=group["dtype"],
            )
            factor = UPDATE_RMS * math.sqrt(max(piece.shape[-2:]))
            target.add_(update, alpha=-group["lr"] * factor)


def _check_group(group: dict[str, Any]) -> None:
    for key in ("lr", "weight_decay", "eps", "steps"):
        if not group[key] >= 0:
            raise KimiError(f"{key} must be at least 0, got {group[key]!r:.80}")
    if not 0 <= group["momentum"] < 1:
        raise KimiError(f"momentum must be in 0 .. 1, 1 excluded, got {group['momentum']!r:.80}")
    for parameter in group["params"]:
        if parameter.dim() not in (2, 3) or not parameter.is_floating_point():
            raise KimiError(
                "Muon takes float parameters [n, m] or [E, n, m], got "
                f"{list(parameter.shape)} {parameter.dtype}"
            )
        rows = group["rows"]
        if rows is not None and sum(rows) != parameter.shape[-2]:
            raise KimiError(
                f"rows must add up to those of the parameter ({parameter.shape[-2]}), got {rows}"
            )


def split_parameters(
    model: nn.Module, config: KimiK25Config
) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Which parameters Muon moves, and which AdamW.

    Muon takes what is a matrix in the released checkpoint, the router and each expert among them,
    but for the embedding and the head. AdamW takes those two, norms, biases, the position table
    and the patch embedding. Parameters without ``requires_grad`` are left out, and so is the
    selection bias of the routers, which `balance` moves.

    Args:
        model: has parameters by the names of `weight_map.fused_parameters`.
        config: of the model.

    Returns:
        Param groups of `Muon` (``params`` and ``rows``), and the rest.

    Raises:
        KimiError: a trainable parameter whose name the config does not have, or a trainable scale
            of int4 weights.

    Source: arXiv 2502.16982 section 2.2 (matrices), and its public code (the rest).
    """
    fused = {entry.name: entry for entry in iter_fused(config)}
    groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
    rest = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in fused:
            raise KimiError(f"{name}: no parameter of this config")
        entry = fused[name]
        if entry.kind is Kind.SELECTION_BIAS:
            continue
        if entry.kind is not Kind.FLOAT:
            raise KimiError(f"{name}: int4 weights are not trained; set its requires_grad to False")
        if name in _TABLES or len(entry.parts[0].shape) != 2:
            rest.append(parameter)
        else:
            groups.setdefault(_rows(entry), []).append(parameter)
    return [{"params": params, "rows": rows} for rows, params in groups.items()], rest


def _rows(entry: FusedParameter) -> tuple[int, ...]:
    """Rows of the matrices of one fused parameter; of a stack of experts, those of the first."""
    parts = [p for p in entry.parts if len(entry.shape) == 2 or p.index[0] == 0]
    return tuple(part.shape[0] for part in parts)


def make_optimizers(
    model: nn.Module,
    config: KimiK25Config,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    **muon: Any,
) -> tuple[Muon, AdamW]:
    """`Muon` and `torch.optim.AdamW` (eps 1e-8) for the parameters as `split_parameters` has them.

    Args:
        model, config: as `split_parameters`.
        lr, weight_decay: of both.
        betas: of AdamW.
        muon: further arguments of `Muon`.

    Raises:
        KimiError: as `split_parameters`, and a model without trainable parameters of either sort.

    Source: arXiv 2502.16982 section 2.2.
    """
    groups, rest = split_parameters(model, config)
    if not groups or not rest:
        raise KimiError("the model has no trainable parameters (requires_grad) for both optimizers")
    adamw = AdamW(rest, lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay)
    return Muon(groups, lr=lr, weight_decay=weight_decay, **muon), adamw
