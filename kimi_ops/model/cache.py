"""The paged latent cache: which page holds which token of which sequence.

Per token and layer the cache holds the normalised latent and the rotated key part, C + R values
(576 in Kimi K2.5: 70,272 bytes a token over 61 layers in bfloat16). Pages are shared by all
sequences; a sequence owns the pages in its row of the page table until it is released.
Bookkeeping is done on the host: planning a step reads nothing back from the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import KimiError
from kimi_ops.model.weight_map import check_layers

DECODE_TOKENS = 16  # up to this many new tokens per sequence attend in absorbed form
KEYS_AT_ONCE = 4096  # keys that prefill expands to heads at a time: 160 MiB at full size


@dataclass(frozen=True)
class KeyChunk:
    """Cached tokens that one call of `mla_prefill` attends to.

    Attributes:
        slots: ``[L]`` int64, of all sequences, one after the other.
        cu_seqlens: ``[B+1]`` int32 offsets of the sequences in ``slots``.
        max_seqlen: the longest of them.
        causal: the last queries of a sequence belong to the last of these tokens; otherwise every
            query sees all of them.
    """

    slots: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    causal: bool


@dataclass(frozen=True)
class Step:
    """New tokens of some sequences, packed: what the layers must know about them.

    Attributes:
        positions: ``[T]`` int32.
        slots: ``[T]`` int64, where each goes in the cache.
        page_table: ``[B, max_pages]`` int32; unused entries are -1.
        seq_lens: ``[B]`` int32, lengths with the new tokens.
        cu_seqlens: ``[B+1]`` int32, offsets of the sequences among the new tokens.
        new_tokens: new tokens of each sequence.
        chunks: what prefill attends to, in order; empty for decode.
    """

    positions: Tensor
    slots: Tensor
    page_table: Tensor
    seq_lens: Tensor
    cu_seqlens: Tensor
    new_tokens: tuple[int, ...]
    chunks: tuple[KeyChunk, ...]

    @property
    def decode(self) -> bool:
        """Whether the step attends in absorbed form: few new tokens, as many in each sequence."""
        return not self.chunks


class LatentCache:
    """Pages of latents for all decoder layers, and the sequences that own them.

    Args:
        config: of the model.
        num_pages: pages shared by all sequences.
        page_size: tokens per page.
        dtype, device: of the pages; those of the model.
        layers: decoder layers that are kept; all if None.

    Raises:
        KimiError: a number of pages or a page size below 1.
    """

    def __init__(
        self,
        config: KimiK25Config,
        *,
        num_pages: int,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        layers: range | None = None,
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise KimiError(
                f"cache: num_pages and page_size must be at least 1, got {num_pages}, {page_size}"
            )
        text = config.text_config
        self.page_size = page_size
        self.max_positions = text.max_position_embeddings
        self.device = torch.device(device)
        width = text.kv_lora_rank + text.qk_rope_head_dim
        self.pages = {
            layer: torch.empty((num_pages, page_size, width), dtype=dtype, device=self.device)
            for layer in check_layers(config, layers)
        }
        self._free = list(range(num_pages - 1, -1, -1))
        self._owned: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._ids = itertools.count()

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers."""
        return sum(page.nbytes for page in self.pages.values())

    @property
    def free_pages(self) -> int:
        """Pages that no sequence owns."""
        return len(self._free)

    def add_sequence(self) -> int:
        """Starts an empty sequence and returns its number."""
        sequence = next(self._ids)
        self._owned[sequence], self._lengths[sequence] = [], 0
        return sequence

    def length(self, sequence: int) -> int:
        """Cached tokens of a sequence."""
        return self._lengths[sequence]

    def release(self, sequence: int) -> None:
        """Ends a sequence and frees its pages. Raises KeyError for one that does not exist."""
        del self._lengths[sequence]
        self._free += reversed(self._owned.pop(sequence))

    def extend(
        self, sequences: Sequence[int], new_tokens: Sequence[int], *, absorbed: bool | None = None
    ) -> Step:
        """Makes room for new tokens and says where they go.

        Args:
            sequences: distinct numbers from `add_sequence`.
            new_tokens: how many each gets, at least 1.
            absorbed: attend in absorbed form, which needs as many new tokens in each sequence.
                None takes it where they are that and at most 16; a caller who wants a sequence's
                rounding not to depend on its neighbours decides it.

        Raises:
            KimiError: a sequence would pass the context limit, or the pages do not suffice; nothing
                has changed then.
        """
        if not len(set(sequences)) == len(sequences) == len(new_tokens) > 0:
            raise KimiError(
                f"cache: sequences must be distinct, one number of tokens each, got "
                f"{list(sequences)} and {list(new_tokens)}"
            )
        if min(new_tokens) < 1:
            raise KimiError(f"cache: new_tokens must be at least 1, got {list(new_tokens)}")
        uniform = len(set(new_tokens)) == 1
        if absorbed and not uniform:
            raise KimiError(f"cache: absorbed needs equal new_tokens, got {list(new_tokens)}")
        if absorbed is None:
            absorbed = uniform and new_tokens[0] <= DECODE_TOKENS
        lengths = [self._lengths[s] + n for s, n in zip(sequences, new_tokens, strict=True)]
        for sequence, length in zip(sequences, lengths, strict=True):
            if length > self.max_positions:
                raise KimiError(
                    f"sequence {sequence} would have {length} tokens, the context limit is "
                    f"{self.max_positions} (text_config.max_position_embeddings)"
                )
        pages = [-(-length // self.page_size) for length in lengths]
        missing = sum(n - len(self._owned[s]) for s, n in zip(sequences, pages, strict=True))
        if missing > len(self._free):
            raise KimiError(
                f"the cache has {len(self._free)} free pages of {self.page_size} tokens, "
                f"{missing} are needed"
            )
        for sequence, count, length in zip(sequences, pages, lengths, strict=True):
            while len(self._owned[sequence]) < count:
                self._owned[sequence].append(self._free.pop())
            self._lengths[sequence] = length
        return self._step(sequences, tuple(new_tokens), absorbed)

    def _step(self, sequences: Sequence[int], new_tokens: tuple[int, ...], absorbed: bool) -> Step:
        lengths = [self._lengths[s] for s in sequences]
        prefixes = [n - new for n, new in zip(lengths, new_tokens, strict=True)]
        table = torch.full((len(sequences), max(len(self._owned[s]) for s in sequences)), -1)
        for row, sequence in enumerate(sequences):
            table[row, : len(self._owned[sequence])] = torch.tensor(self._owned[sequence])
        spans = list(zip(prefixes, lengths, strict=True))
        positions = torch.cat([torch.arange(start, stop) for start, stop in spans])
        return Step(
            positions=positions.int().to(self.device),
            slots=self._slots(table, spans).to(self.device),
            page_table=table.int().to(self.device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32).to(self.device),
            cu_seqlens=self._offsets(new_tokens),
            new_tokens=new_tokens,
            chunks=() if absorbed else tuple(self._chunks(table, prefixes, spans)),
        )

    def _chunks(
        self, table: Tensor, prefixes: list[int], new: list[tuple[int, int]]
    ) -> list[KeyChunk]:
        """The cached prefixes, a part of each at a time, and last the new tokens themselves."""
        chunks, start = [], 0
        while start < max(prefixes):
            part = max(KEYS_AT_ONCE // sum(n > start for n in prefixes), 1)
            spans = [(min(start, n), min(start + part, n)) for n in prefixes]
            chunks.append(self._chunk(table, spans, causal=False))
            start += part
        return [*chunks, self._chunk(table, new, causal=True)]

    def _chunk(self, table: Tensor, spans: list[tuple[int, int]], *, causal: bool) -> KeyChunk:
        counts = [stop - start for start, stop in spans]
        slots = self._slots(table, spans).to(self.device)
        return KeyChunk(slots, self._offsets(counts), max(counts), causal)

    def _slots(self, table: Tensor, spans: list[tuple[int, int]]) -> Tensor:
        slots = []
        for row, (start, stop) in zip(table, spans, strict=True):
            token = torch.arange(start, stop)
            slots.append(row[token // self.page_size] * self.page_size + token % self.page_size)
        return torch.cat(slots)

    def _offsets(self, counts: Sequence[int]) -> Tensor:
        offsets = [0, *itertools.accumulate(counts)]
        return torch.tensor(offsets, dtype=torch.int32).to(self.device)
