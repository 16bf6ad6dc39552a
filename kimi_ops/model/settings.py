"""Where a model is placed and in which dtype: settings of a caller, checked before any work."""

from __future__ import annotations

import torch

from kimi_ops.model.errors import KimiError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def usable_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype of the model's float parameters; "bf16", "fp16" and "fp32" are short for theirs.

    Raises:
        KimiError: anything else.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise KimiError(
            "dtype must be torch.bfloat16, torch.float16 or torch.float32 (or 'bf16', 'fp16', "
            f"'fp32'), got {dtype!r:.80}"
        )
    assert found is not None
    return found


def usable_device(device: str | torch.device) -> torch.device:
    """A device that this torch can compute on: "cpu", "cuda" or "cuda:N".

    Raises:
        KimiError: another kind of device, or one that is not there.
    """
    try:
        found = device if isinstance(device, torch.device) else torch.device(device)
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ):  # torch lists thirty kinds, of which the ops know two
        found = None
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index):
        raise KimiError(f"device must be cpu, cuda or cuda:N, got {str(device)!r:.80}")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # torch keeps an index in 8 bits: cuda:999 is cuda:-25 to it.
        if str(found) != str(device) or not 0 <= (found.index or 0) < count:
            raise KimiError(f"device {device}: torch sees {count} CUDA device(s)")
    return found
