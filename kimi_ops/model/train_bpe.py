"""A small deterministic byte-pair trainer, for the tokenizers of checkpoints made by this package.

Plain BPE: start from the 256 bytes, count neighbouring pairs inside the words of a text, merge the
most frequent pair, repeat. When the text has no pair left to offer, byte pairs and then longer
strings in a fixed order fill the vocabulary up, so that any size up to the released 163,584 ranks
can be made; a filler is always the concatenation of two earlier tokens, as BPE requires.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

_COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "grey", "brown")
_SIZES = ("small", "large", "tall", "wide", "round", "narrow", "tiny", "huge")
_SHAPES = ("circle", "square", "triangle", "star", "line", "cross", "ring", "bar", "arrow", "box")
_PLACES = (
    "left of",
    "right of",
    "above",
    "below",
    "inside",
    "next to",
    "in the middle of",
    "behind",
)
_VERBS = (
    "moves",
    "turns",
    "grows",
    "shrinks",
    "stops",
    "starts",
    "jumps",
    "falls",
    "waits",
    "fades",
)
_SENTENCES = (
    "A {size} {colour} {shape} is {place} the {colour2} {shape2}.",
    "The {colour} {shape} {verb}, and then the {colour2} {shape2} {verb2}.",
    "How many {colour} {shape}s are there? There are {number} of them.",
    "What is {place} the {shape}? It's a {size} {colour2} {shape2}.",
    "I don't see a {shape}; I see {number} {colour} {shape2}s.",
    "Let me think. The picture shows {number} {shape}s, so the answer is {number}.",
    "At 00:00:{number}.500 the {shape} {verb} and we'll wait for {number} seconds.",
    'The call is {{"shape": "{shape}", "colour": "{colour}", "count": {number}}}.',
    "for i in range({number}):\n    print(i, {number} + i)\n",
    "图中有{number}个{shape_han}。它们在{place_han}。",
    "这是什么颜色。这是{colour_han}的{shape_han}。",
    "You are a helpful assistant. Describe the image, then describe the video.",
    "# Tools\n\n## functions\nnamespace functions {{\ntype {verb} = (_: {{}}) => any;\n}}\n",
    "## Return of functions.{verb}:{number}\n",
)
_NUM_SENTENCES = 3000
# Approximates the tokenizer's own split: words with one leading space, digits, punctuation, space.
_WORDS = re.compile(r" ?[^\W\d_]+|\d{1,3}| ?[^\s\w]+|\s+|_+")


def built_in_text(seed: int = 0) -> str:
    """The training text: sentences about coloured shapes, numbers, times, code and tool calls."""
    rng = random.Random(seed)
    sentences = []
    for _ in range(_NUM_SENTENCES):
        sentences.append(
            rng.choice(_SENTENCES).format(
                size=rng.choice(_SIZES),
                colour=rng.choice(_COLOURS),
                colour2=rng.choice(_COLOURS),
                shape=rng.choice(_SHAPES),
                shape2=rng.choice(_SHAPES),
                place=rng.choice(_PLACES),
                verb=rng.choice(_VERBS),
                verb2=rng.choice(_VERBS),
                number=rng.randrange(60),
                shape_han=rng.choice(("圆形", "方形", "三角形", "星形")),
                place_han=rng.choice(("左边", "右边", "上面", "下面", "中间")),
                colour_han=rng.choice(("红色", "绿色", "蓝色", "黄色", "黑色", "白色")),
            )
        )
    return " ".join(sentences)


def train_ranks(num_ranks: int, text: str | None = None) -> dict[bytes, int]:
    """Exactly `num_ranks` byte strings with ranks 0..num_ranks-1.

    Args:
        num_ranks: at least 256; the first 256 ranks are the single bytes in order.
        text: what to learn from; by default `built_in_text()`.

    Returns:
        token bytes -> rank, in rank order. The same arguments always give the same result.

    Raises:
        ValueError: `num_ranks` is below 256, or above what the fillers can supply (16,843,008).
    """
    largest = 256 + 256**2 + 256**3
    if not 256 <= num_ranks <= largest:
        raise ValueError(f"train_ranks: num_ranks must be in [256, {largest}], got {num_ranks}")
    tokens = {bytes([byte]): byte for byte in range(256)}
    words = Counter(_WORDS.findall(built_in_text() if text is None else text))
    for token in itertools.chain(_merges(words), _fillers()):
        if len(tokens) == num_ranks:
            break
        tokens.setdefault(token, len(tokens))
    return tokens


def _merges(words: Counter[str]) -> Iterator[bytes]:
    """Tokens by repeated merging of the most frequent pair; ties go to the smaller pair."""
    counts = list(words.values())
    split = [[bytes([byte]) for byte in word.encode("utf-8")] for word in words]
    pair_counts: Counter[tuple[bytes, bytes]] = Counter()
    words_with: defaultdict[tuple[bytes, bytes], set[int]] = defaultdict(set)
    for index, parts in enumerate(split):
        for pair in itertools.pairwise(parts):
            pair_counts[pair] += counts[index]
            words_with[pair].add(index)
    while pair_counts:
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        if pair_counts[best] < 2:
            return
        yield best[0] + best[1]
        for index in words_with.pop(best):
            for pair in itertools.pairwise(split[index]):
                pair_counts[pair] -= counts[index]
                if not pair_counts[pair]:
                    del pair_counts[pair]
            split[index] = _merge(split[index], best)
            for pair in itertools.pairwise(split[index]):
                pair_counts[pair] += counts[index]
                words_with[pair].add(index)


def _merge(parts: Iterable[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for part in parts:
        # A part that was just merged is longer than pair[0], so it never merges again here.
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _fillers() -> Iterator[bytes]:
    """Every string of two bytes, then of three: each is two earlier tokens put together."""
    for length in (2, 3):
        for combination in itertools.product(range(256), repeat=length):
            yield bytes(combination)
