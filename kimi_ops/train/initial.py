"""Initial weights of a model that is trained from nothing."""

from __future__ import annotations

import math

import torch

from kimi_ops.model.kimi import KimiK25

EMBEDDING_STD = 0.1
HEAD_STD = 0.02


@torch.no_grad()
def initialize_(model: KimiK25, *, seed: int = 0) -> None:
    """Fills every parameter, and lets all but the selection biases take gradients.

    Matrices keep the magnitude of what they are given (variance 1 / columns); those that add to
    the residual stream are smaller by sqrt(2 * layers), so that depth does not inflate it. Norms
    start at one, biases and the selection bias at zero.

    Args:
        model: with float experts; **written**.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = {
        "language": model.config.text_config.num_hidden_layers,
        "vision": model.config.vision_config.vt_num_hidden_layers,
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("moe.bias"))
        leaf = name.rsplit(".", 1)[-1]
        if "norm" in leaf and not leaf.endswith("_bias"):
            parameter.fill_(1)
        elif leaf == "bias" or leaf.endswith("_bias"):
            parameter.zero_()
        else:
            if leaf == "embed_tokens":
                std = EMBEDDING_STD
            elif leaf in ("lm_head", "pos_emb"):
                std = HEAD_STD
            else:
                columns = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
                std = 1 / math.sqrt(columns)
                if leaf in ("o", "down", "shared_down", "wo_weight", "fc1_weight"):
                    std /= math.sqrt(2 * depth[name.split(".")[0]])
            parameter.normal_(0, std, generator=generator)
