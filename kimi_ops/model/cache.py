"""The paged latent cache: which page holds which token of which sequence.

Per token and layer the cache holds the normalised latent and the rotated key part, C + R values
(576 in Kimi K2.5: 70,272 bytes a token over 61 layers in bfloat16, 40,016 in the fp8 format). Pages
are shared by all sequences; a sequence owns the pages in its row of the page table until it is
released.
Bookkeeping is done on the host: planning a step reads nothing back from the device, and writes to
it what is new, not the table again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import KimiError, check_count
from kimi_ops.model.settings import usable_device
from kimi_ops.model.weight_map import check_layers
from kimi_ops.quant import latent_fp8

DECODE_TOKENS = 16  # up to this many new tokens per sequence attend in absorbed form
CacheFormat = Literal["plain", "fp8"]
KEYS_AT_ONCE = 4096  # keys that prefill expands to heads at a time: 160 MiB at full size


def check_format(cache_format: object) -> None:
    """Raises `KimiError` for what is no `CacheFormat`."""
    if cache_format not in get_args(CacheFormat):
        formats = ", ".join(get_args(CacheFormat))
        raise KimiError(f"cache_format must be one of {formats}, got {cache_format!r:.80}")


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
        page_table: ``[B, max_pages]`` int32; unused entries are -1. A part of the cache's own table
            where the sequences are neighbours in it, so it is good until one of them is released.
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


@dataclass
class _Owner:
    """A sequence: its row of the page table, and what is in it."""

    row: int
    tokens: int = 0
    pages: int = 0


class LatentCache:
    """Pages of latents for all decoder layers, and the sequences that own them.

    Two tensors on the device say what is where; they and the pages stay where they are, as a
    captured CUDA graph needs it, while there are no more pages and sequences than at first.

    Args:
        config: of the model.
        num_pages: pages shared by all sequences, allocated at once.
        max_pages: grows up to so many when they are needed, by half of what there is at least, so
            that copying adds no more than three writes a token; ``num_pages`` if None.
        page_size: tokens per page.
        max_sequences: rows of the page table at first; it doubles when they do not suffice.
        dtype, device: of the pages; those of the model.
        cache_format: "plain" holds values of ``dtype``; "fp8" the bytes of
            `kimi_ops.quant.latent_fp8`, a little over half of those of bfloat16.
        layers: decoder layers that are kept; all if None.

    Attributes:
        pages: ``[num_pages, P, C+R]`` of each layer, or ``[num_pages, P, C+16+2R]`` uint8.
        page_table: ``[max_sequences, columns]`` int32, a row per sequence (`row`), -1 where unused;
            as many columns as the longest sequence can have pages.
        seq_lens: ``[max_sequences]`` int32, tokens of each row.

    Raises:
        KimiError: a number that is no integer of at least 1, ``max_pages`` below ``num_pages``, or
            an unknown format.
    """

    def __init__(
        self,
        config: KimiK25Config,
        *,
        num_pages: int,
        max_pages: int | None = None,
        page_size: int = 64,
        max_sequences: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        cache_format: CacheFormat = "plain",
        layers: range | None = None,
    ) -> None:
        kept = check_layers(config, layers)
        self.device = usable_device(device)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise KimiError(f"cache: dtype must be a float torch.dtype, got {dtype!r:.80}")
        check_format(cache_format)
        max_pages = num_pages if max_pages is None else max_pages
        for name, value in (
            ("num_pages", num_pages),
            ("max_pages", max_pages),
            ("page_size", page_size),
            ("max_sequences", max_sequences),
        ):
            check_count(f"cache: {name}", value)
        if max_pages < num_pages:
            raise KimiError(f"cache: max_pages must be at least {num_pages}, got {max_pages}")
        text = config.text_config
        self.page_size = page_size
        self.max_pages = max_pages
        self.max_positions = text.max_position_embeddings
        rank, rope = text.kv_lora_rank, text.qk_rope_head_dim
        width = rank + rope
        if cache_format == "fp8":
            width, dtype = latent_fp8.entry_bytes(rank, rope), torch.uint8
        self.pages = {
            layer: torch.empty((num_pages, page_size, width), dtype=dtype, device=self.device)
            for layer in kept
        }
        self._num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners: dict[int, _Owner] = {}
        self._ids = itertools.count()
        self._free_rows: list[int] = []
        columns = min(max_pages, -(-self.max_positions // page_size))
        self._table = torch.empty((0, columns), dtype=torch.int32)
        self.page_table = self._table
        self.seq_lens = torch.empty(0, dtype=torch.int32, device=self.device)
        self._add_rows(max_sequences)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers that are allocated."""
        return sum(page.nbytes for page in self.pages.values())

    @property
    def free_pages(self) -> int:
        """Pages that no sequence owns, those included that are yet to be allocated."""
        return len(self._free) + self.max_pages - self._num_pages

    def add_sequence(self) -> int:
        """Starts an empty sequence and returns its number."""
        if not self._free_rows:
            self._add_rows(len(self._table))
        sequence = next(self._ids)
        self._owners[sequence] = _Owner(self._free_rows.pop())
        return sequence

    def length(self, sequence: int) -> int:
        """Cached tokens of a sequence. Raises `KimiError` for one that does not exist."""
        return self._owner(sequence).tokens

    def row(self, sequence: int) -> int:
        """Its row in `page_table` and `seq_lens`. Raises `KimiError` as `length`."""
        return self._owner(sequence).row

    def release(self, sequence: int) -> None:
        """Ends a sequence and frees its pages. Raises `KimiError` for one that does not exist."""
        owner = self._owner(sequence)
        del self._owners[sequence]
        self._free += reversed(self._table[owner.row, : owner.pages].tolist())
        for table in {id(t): t for t in (self._table, self.page_table)}.values():
            table[owner.row, : owner.pages] = -1
        self.seq_lens[owner.row] = 0
        self._free_rows.append(owner.row)

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
            KimiError: a sequence that does not exist or would pass the context limit, or the pages
                do not suffice; nothing has changed then.
        """
        sequences, new_tokens = _listed("sequences", sequences), _listed("new_tokens", new_tokens)
        owners = [self._owner(sequence) for sequence in sequences]
        if not len(set(sequences)) == len(sequences) == len(new_tokens) > 0:
            raise KimiError(
                f"cache: sequences must be distinct, one number of tokens each, got "
                f"{list(sequences)} and {list(new_tokens)}"
            )
        for count in new_tokens:
            check_count("cache: new_tokens", count)
        uniform = len(set(new_tokens)) == 1
        if absorbed is not None and not isinstance(absorbed, bool):
            raise KimiError(f"cache: absorbed must be True, False or None, got {absorbed!r:.80}")
        if absorbed and not uniform:
            raise KimiError(f"cache: absorbed needs equal new_tokens, got {list(new_tokens)}")
        if absorbed is None:
            absorbed = uniform and new_tokens[0] <= DECODE_TOKENS
        spans = [(o.tokens, o.tokens + n) for o, n in zip(owners, new_tokens, strict=True)]
        for sequence, (_, length) in zip(sequences, spans, strict=True):
            if length > self.max_positions:
                raise KimiError(
                    f"sequence {sequence} would have {length} tokens, the context limit is "
                    f"{self.max_positions} (text_config.max_position_embeddings)"
                )
        pages = [-(-length // self.page_size) for _, length in spans]
        missing = sum(n - owner.pages for owner, n in zip(owners, pages, strict=True))
        if missing > self.free_pages:
            raise KimiError(
                f"the cache has {self.free_pages} free pages of {self.page_size} tokens, "
                f"{missing} are needed"
            )
        self._grow(missing - len(self._free))
        for owner, count, (_, length) in zip(owners, pages, spans, strict=True):
            self._give(owner, count - owner.pages)
            owner.tokens = length
        return self._step(owners, spans, tuple(new_tokens), absorbed)

    def _owner(self, sequence: int) -> _Owner:
        owner = self._owners.get(sequence) if isinstance(sequence, int) else None
        if owner is None:
            raise KimiError(
                f"cache: there is no sequence {sequence!r}: add_sequence has not returned it, or "
                "it was released"
            )
        return owner

    def _add_rows(self, count: int) -> None:
        rows, columns = self._table.shape
        # Ordinary tensors even inside inference mode, outside of which they could not be changed.
        with torch.inference_mode(False):
            table = torch.full((rows + count, columns), -1, dtype=torch.int32)
            table[:rows] = self._table
            lengths = torch.zeros(rows + count, dtype=torch.int32, device=self.device)
            lengths[:rows] = self.seq_lens
            # On the CPU one tensor serves both: the host's copy is the device's.
            self._table, self.page_table, self.seq_lens = table, table.to(self.device), lengths
        self._free_rows += range(rows + count - 1, rows - 1, -1)

    def _grow(self, needed: int) -> None:
        """Allocates pages, at least ``needed`` of them; none if that is 0 or less."""
        if needed <= 0:
            return
        old, half = self._num_pages, self._num_pages // 2
        new = min(old + max(needed, half), self.max_pages)
        for layer, pages in self.pages.items():  # one after the other: only one is held twice
            grown = pages.new_empty((new, *pages.shape[1:]))
            grown[:old] = pages[:old]
            self.pages[layer] = grown
        self._num_pages = new
        self._free[:0] = range(new - 1, old - 1, -1)

    def _give(self, owner: _Owner, count: int) -> None:
        if count == 0:
            return
        fresh = torch.tensor([self._free.pop() for _ in range(count)], dtype=torch.int32)
        for table in {id(t): t for t in (self._table, self.page_table)}.values():
            table[owner.row, owner.pages : owner.pages + count] = fresh
        owner.pages += count

    def _step(
        self,
        owners: list[_Owner],
        spans: list[tuple[int, int]],
        new_tokens: tuple[int, ...],
        absorbed: bool,
    ) -> Step:
        rows = [owner.row for owner in owners]
        positions, slots = self._places(rows, spans)
        lengths = self._int32(length for _, length in spans)
        used = self.page_table[:, : max(owner.pages for owner in owners)]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            table = used[rows[0] : rows[0] + len(rows)]
            self.seq_lens[rows[0] : rows[0] + len(rows)] = lengths
        else:
            index = torch.tensor(rows).to(self.device)
            table = used[index]
            self.seq_lens[index] = lengths
        return Step(
            positions=positions.int().to(self.device),
            slots=slots.to(self.device),
            page_table=table,
            seq_lens=lengths,
            cu_seqlens=self._offsets(new_tokens),
            new_tokens=new_tokens,
            chunks=() if absorbed else tuple(self._chunks(rows, spans)),
        )

    def _chunks(self, rows: list[int], new: list[tuple[int, int]]) -> list[KeyChunk]:
        """The cached prefixes, a part of each at a time, and last the new tokens themselves."""
        prefixes = [start for start, _ in new]
        chunks, start = [], 0
        while start < max(prefixes):
            part = max(KEYS_AT_ONCE // sum(n > start for n in prefixes), 1)
            spans = [(min(start, n), min(start + part, n)) for n in prefixes]
            chunks.append(self._chunk(rows, spans, causal=False))
            start += part
        return [*chunks, self._chunk(rows, new, causal=True)]

    def _chunk(self, rows: list[int], spans: list[tuple[int, int]], *, causal: bool) -> KeyChunk:
        counts = [stop - start for start, stop in spans]
        _, slots = self._places(rows, spans)
        return KeyChunk(slots.to(self.device), self._offsets(counts), max(counts), causal)

    def _places(self, rows: list[int], spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Positions and slots of the tokens ``start .. stop`` of each row, ``[L]`` int64 each."""
        starts, stops = torch.tensor(spans).unbind(1)
        counts = stops - starts
        owner = torch.repeat_interleave(counts)
        position = torch.arange(len(owner)) + (stops - counts.cumsum(0))[owner]
        page = self._table[torch.tensor(rows)[owner], position // self.page_size].long()
        return position, page * self.page_size + position % self.page_size

    def _offsets(self, counts: Sequence[int]) -> Tensor:
        return self._int32([0, *itertools.accumulate(counts)])

    def _int32(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32).to(self.device)


def _listed(name: str, values: Sequence[int]) -> list[int]:
    plain = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(plain, str | bytes) or not isinstance(plain, Iterable):
        raise KimiError(f"cache: {name} must be a list of integers, got {values!r:.80}")
    return list(plain)
