"""The latent cache: pages come when they are needed, and the page table follows step by step.

What each step is told is compared with a plain account of pages kept here: a list per sequence.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_ops.model import cache as cache_module
from kimi_ops.model.cache import LatentCache
from kimi_ops.model.errors import KimiError
from kimi_ops.model.make_checkpoint import tiny_config

CONFIG = tiny_config(text={"max_position_embeddings": 4096})


def _slots(cache: LatentCache, step, row: int, length: int) -> list[int]:
    """Where the page table of a step puts the first tokens of its sequence ``row``."""
    table = step.page_table[row].tolist()
    size = cache.page_size
    return [table[t // size] * size + t % size for t in range(length)]


def _check(cache: LatentCache, step, sequences: list[int], before: list[int], held) -> None:
    """A step against the account: ``held`` has the slots of each sequence's tokens so far."""
    lengths = [cache.length(s) for s in sequences]
    assert step.seq_lens.tolist() == lengths
    assert step.cu_seqlens.tolist()[-1] == len(step.slots) == len(step.positions)
    starts = step.cu_seqlens.tolist()
    for row, (sequence, old, new) in enumerate(zip(sequences, before, lengths, strict=True)):
        own = slice(starts[row], starts[row + 1])
        assert step.positions[own].tolist() == list(range(old, new))
        held[sequence] = held.get(sequence, []) + step.slots[own].tolist()
        assert _slots(cache, step, row, new) == held[sequence]
        used = -(-new // cache.page_size)
        assert (step.page_table[row, used:] == -1).all()
        assert cache.page_table[cache.row(sequence), :used].tolist() == [
            slot // cache.page_size for slot in held[sequence][:: cache.page_size]
        ]
        assert cache.seq_lens[cache.row(sequence)] == new
    if step.chunks:
        for row, sequence in enumerate(sequences):
            seen = []
            for chunk in step.chunks:
                ends = chunk.cu_seqlens.tolist()
                seen += chunk.slots[ends[row] : ends[row + 1]].tolist()
            assert seen == held[sequence]


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("inference", [True, False])
def test_any_history_of_sequences_is_accounted_for(page_size, inference, monkeypatch):
    """Random starts, extensions and releases, with growth of pages and of rows."""
    monkeypatch.setattr(cache_module, "KEYS_AT_ONCE", 50)
    draw = random.Random(page_size)
    with torch.inference_mode(inference):
        cache = LatentCache(
            CONFIG, num_pages=1, max_pages=2000, page_size=page_size, max_sequences=2
        )
        width = cache.pages[0].shape[-1]
    # A cache that was made in inference mode must serve outside of it too.
    held: dict[int, list[int]] = {}
    live: list[int] = []
    for _ in range(120):
        if len(live) < 2 or draw.random() < 0.15:
            live.append(cache.add_sequence())
        if len(live) > 2 and draw.random() < 0.12:
            gone = live.pop(draw.randrange(len(live)))
            cache.release(gone)
            held.pop(gone, None)
        chosen = draw.sample(live, draw.randint(1, len(live)))
        before = [cache.length(s) for s in chosen]
        counts = [draw.choice((1, 1, 2, 17)) for _ in chosen]
        step = cache.extend(chosen, counts)
        _check(cache, step, chosen, before, held)
    slots = [slot for own in held.values() for slot in own]
    assert len(set(slots)) == len(slots)
    pages = {slot // page_size for slot in slots}
    assert cache.free_pages == 2000 - len(pages)
    assert cache.pages[0].shape == (max(len(cache.pages[1]), max(pages) + 1), page_size, width)
    for sequence in live:
        cache.release(sequence)
    assert cache.free_pages == 2000
    assert (cache.page_table == -1).all()
    assert (cache.seq_lens == 0).all()


def test_pages_come_as_they_are_needed_and_keep_what_is_in_them():
    cache = LatentCache(CONFIG, num_pages=2, max_pages=64, page_size=4)
    sequence = cache.add_sequence()
    sizes, written = [], []
    for length in range(1, 257):
        step = cache.extend([sequence], [1])
        for layer, pages in cache.pages.items():
            pages.flatten(0, 1)[step.slots] = length + layer * 0.25
        sizes.append(len(cache.pages[0]))
        written.append(int(step.slots))
        # Never more than half again of what was needed, at least at four pages and more.
        assert sizes[-1] <= max(1.5 * -(-length // 4), 4)
    assert sizes[-1] == 64
    for layer, pages in cache.pages.items():
        found = pages.flatten(0, 1)[written][:, 0].float()
        expected = torch.arange(1, 257) + layer * 0.25
        assert torch.equal(found, expected.to(pages.dtype).float())
    # A growth copies all there is. By halves that sums to twice the last size; the limit may cut
    # the last growth short, which adds one more, and rounding down one page for each.
    growths = sorted(set(sizes))
    assert sum(growths[:-1]) <= 3 * 64 + len(growths)
    assert cache.nbytes == sum(64 * 4 * p.shape[-1] * 2 for p in cache.pages.values())
    with pytest.raises(KimiError, match="the cache has 0 free pages of 4 tokens, 1 are needed"):
        cache.extend([sequence], [1])


def test_what_a_graph_captured_stays_where_it_is():
    cache = LatentCache(CONFIG, num_pages=512, page_size=8, max_sequences=4)
    places = [t.data_ptr() for t in (cache.page_table, cache.seq_lens, *cache.pages.values())]
    assert cache.page_table.shape == (4, 512)
    assert cache.page_table.dtype == torch.int32
    for _ in range(3):
        sequences = [cache.add_sequence() for _ in range(4)]
        for count in (100, 1, 1, 30):
            cache.extend(sequences, [count] * 4)
        assert cache.seq_lens.tolist() == [132] * 4
        for sequence in sequences:
            cache.release(sequence)
    assert places == [
        t.data_ptr() for t in (cache.page_table, cache.seq_lens, *cache.pages.values())
    ]


def test_a_step_reads_and_writes_little_of_a_long_sequence():
    """The work of a decode step does not grow with what is cached: counted, not timed."""

    def elements(length: int) -> int:
        cache = LatentCache(CONFIG, num_pages=4096, page_size=1)
        sequence = cache.add_sequence()
        cache.extend([sequence], [length])
        count = 0

        class Counter(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal count
                result = func(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor) and not func.is_view:
                    count += result.numel()
                return result

        with Counter():
            cache.extend([sequence], [1], absorbed=True)
        return count

    assert elements(4000) == elements(40) < 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.extend([7], [1]), "there is no sequence 7: add_sequence has not returned it"),
        (lambda c: c.extend([0, 0], [1, 1]), "sequences must be distinct"),
        (lambda c: c.extend([0], [1, 1]), "one number of tokens each"),
        (lambda c: c.extend([], []), "sequences must be distinct"),
        (lambda c: c.extend(0, [1]), "sequences must be a list of integers, got 0"),
        (lambda c: c.extend([0], 1), "new_tokens must be a list of integers, got 1"),
        (lambda c: c.extend([0], [0]), "new_tokens must be an integer of at least 1, got 0"),
        (lambda c: c.extend([0], [1.5]), "new_tokens must be an integer of at least 1, got 1.5"),
        (lambda c: c.extend([0, 1], [1, 2], absorbed=True), "absorbed needs equal new_tokens"),
        (lambda c: c.extend([0], [1], absorbed="yes"), "absorbed must be True, False or None"),
        (lambda c: c.extend([0], [5000]), "would have 5000 tokens, the context limit is 4096"),
        (lambda c: c.extend([0], [65]), "has 8 free pages of 8 tokens, 9 are needed"),
        (lambda c: LatentCache(CONFIG, num_pages=0), "num_pages must be an integer of at least 1"),
        (lambda c: LatentCache(CONFIG, num_pages=2**50), r"num_pages must be below 2\^40"),
        (lambda c: LatentCache(CONFIG, num_pages=2, max_pages=1), "max_pages must be at least 2"),
        (lambda c: LatentCache(CONFIG, num_pages=2, dtype="bf16"), "dtype must be a float"),
        (lambda c: LatentCache(None, num_pages=2), "config must be a KimiK25Config"),
        (lambda c: LatentCache(CONFIG, num_pages=2, layers=[0]), "layers must be a range"),
    ],
)
def test_bad_requests_change_nothing(call, message):
    cache = LatentCache(CONFIG, num_pages=4, max_pages=8, page_size=8)
    sequences = [cache.add_sequence(), cache.add_sequence()]
    with pytest.raises(KimiError, match=message):
        call(cache)
    assert [cache.length(s) for s in sequences] == [0, 0]
    assert cache.free_pages == 8
    assert (cache.page_table == -1).all()
