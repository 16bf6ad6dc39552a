"""Which bytes of tensors hold values, from launch to launch.

A launch alone cannot know what an earlier one has written. `Written` keeps, for tensors that start
out without content (outputs, workspaces), which bytes some launch has written; a launch that is
given it reports reads of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kimi_ops.testing.ptx.errors import Uninitialised
from kimi_ops.testing.ptx.types import Array


def element_flags(flags: Array, tensor: torch.Tensor) -> torch.Tensor:
    """The flags of a tensor's own bytes, ``[*shape, element_size]``; gaps between them left out."""
    width = tensor.element_size()
    stride = (*(s * width for s in tensor.stride()), 1)
    offset = int(tensor.storage_offset()) * width
    return torch.from_numpy(flags).as_strided((*tensor.shape, width), stride, offset)


@dataclass
class _Storage:
    """Flags of one storage [bytes]; a tensor that keeps it alive, and its version then."""

    flags: Array
    tensor: torch.Tensor
    version: int | None


class Written:
    """Tensors without content at first, and which of their bytes hold a value by now."""

    def __init__(self) -> None:
        self._storages: dict[int, _Storage] = {}

    def declare(self, tensor: torch.Tensor) -> None:
        """From now on no byte of a CPU tensor holds a value."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or not tensor.numel() or not storage.data_ptr():
            return
        kept = self._storages.get(storage.data_ptr())
        flags = np.ones(storage.nbytes(), np.uint8) if kept is None else kept.flags
        element_flags(flags, tensor).zero_()
        # An inference tensor has no version: what torch itself writes to it goes unseen.
        version = None if tensor.is_inference() else tensor._version
        self._storages[storage.data_ptr()] = _Storage(flags, tensor, version)

    def flags(self, tensor: torch.Tensor) -> Array | None:
        """Flags [bytes] of the storage behind a tensor, to be kept up to date; None: all hold."""
        kept = self._storages.get(tensor.untyped_storage().data_ptr())
        if kept is None:
            return None
        if kept.version is not None and kept.tensor._version != kept.version:
            # torch has written to it since, somewhere.
            kept.flags[:] = 1
        return kept.flags

    def wrote(self, tensor: torch.Tensor) -> None:
        """Something else than a launch or torch has written to a tensor: all of it holds values."""
        flags = self.flags(tensor)
        if flags is not None and tensor.numel():
            element_flags(flags, tensor).fill_(1)

    def require(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raises Uninitialised unless every element of the tensors holds a value."""
        for number, tensor in enumerate(tensors):
            flags = self.flags(tensor)
            if flags is None or not tensor.numel():
                continue
            left = (element_flags(flags, tensor) == 0).any(-1)
            if left.any():
                first = tuple(left.nonzero()[0].tolist())
                raise Uninitialised(
                    f"output {number} {list(first)} was never written "
                    f"({int(left.sum())} of {tensor.numel()} elements)"
                )
