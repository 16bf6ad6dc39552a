"""Kimi K2.5's tokenizer: byte-level BPE (tiktoken) with 256 reserved control tokens on top.

A vocabulary of V ids is n = V - 256 byte strings ("ranks", file `tiktoken.model`) followed by 256
control ids n..n+255. The released model has n = 163,584; control tokens are placed relative to n,
so a tokenizer of 512 ids behaves like the full one. Source: the released `tokenizer_config.json`
and the behaviour of the tokenizer class published with Kimi K2.5.

Text from users must never turn into control ids. `encode(text)` reads control tokens, as a rendered
chat template needs; `encode(text, allow_special=False)` and `encode_pieces` do not.
"""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import tiktoken

from kimi_ops.model.errors import CheckpointError, KimiError, checked_path
from kimi_ops.model.json_file import read_json_object
from kimi_ops.model.tokenizer_files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MODEL_FILE,
    NUM_RESERVED,
    TEMPLATE_FILE,
    VISIBLE_TOKENS,
    added_tokens,
    check_ranks,
    control_names,
    dump_config,
    dump_ranks,
    own_template,
    parse_ranks,
    read_file,
    reserved_names,
)
from kimi_ops.model.train_bpe import train_ranks

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
MAX_CHUNK_CHARS = 400_000
MAX_RUN_CHARS = 25_000
_RUN = re.compile(r"\s+|\S+")


def _cuts(text: str) -> list[int]:
    """Positions at which `text` is cut before BPE, ascending: every 400,000 characters, and inside
    such a chunk every 25,000 characters of a run of white space or of non-space."""
    cuts = []
    if len(text) > MAX_RUN_CHARS:
        for chunk in range(0, len(text), MAX_CHUNK_CHARS):
            if chunk:
                cuts.append(chunk)
            for run in _RUN.finditer(text, chunk, min(chunk + MAX_CHUNK_CHARS, len(text))):
                cuts += range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS)
    return cuts


class KimiTokenizer:
    """Text to ids and back. Build it with `from_pretrained` or `from_ranks`; it is immutable.

    Ids are plain Python integers in [0, vocab_size). No BOS is ever added.
    """

    def __init__(
        self,
        mergeable_ranks: Mapping[bytes, int],
        names: Sequence[str],
        visible: frozenset[str],
        config: Mapping[str, Any],
    ) -> None:
        """Internal; the arguments have been checked. `names` are those of ids n..n+255."""
        num_ranks = len(mergeable_ranks)
        self._ranks = dict(mergeable_ranks)
        self._config = dict(config)
        self._names = tuple(names)
        self._id_of = {name: num_ranks + i for i, name in enumerate(names)}
        self._special_ids = frozenset(
            token_id for name, token_id in self._id_of.items() if name not in visible
        )
        self._control = re.compile(
            "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
        )
        self._bpe = tiktoken.Encoding(
            name="kimi-k2.5",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=self._ranks,
            special_tokens=self._id_of,
        )

    @classmethod
    def from_ranks(cls, mergeable_ranks: Mapping[bytes, int]) -> KimiTokenizer:
        """Tokenizer of `mergeable_ranks` (token bytes -> rank) with the released control tokens.

        Raises:
            CheckpointError: the ranks are not exactly 0..n-1, or one of the 256 single bytes that
                make every text encodable is missing.
        """
        check_ranks(mergeable_ranks, source="mergeable_ranks")
        return cls(mergeable_ranks, reserved_names(len(mergeable_ranks)), VISIBLE_TOKENS, {})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> KimiTokenizer:
        """Read `tiktoken.model` and, when present, `tokenizer_config.json` from `directory`.

        `added_tokens_decoder` of the configuration may rename reserved ids and set their `special`
        flag; ids past n+255 lie outside the embedding table and are not used.

        Raises:
            CheckpointError: a missing or malformed file, with the file and the line or key.
        """
        directory = checked_path(directory, CheckpointError)
        model_path = directory / MODEL_FILE
        ranks = parse_ranks(read_file(model_path), source=str(model_path))
        config_path = directory / CONFIG_FILE
        config = (
            read_json_object(config_path, MAX_CONFIG_BYTES, CheckpointError)
            if config_path.exists()
            else {}
        )
        names, visible = control_names(config, len(ranks), source=str(config_path))
        return cls(ranks, names, visible, config)

    def save(self, directory: str | Path) -> None:
        """Write `tiktoken.model` and `tokenizer_config.json`; `from_pretrained` reads them back.

        Keys of a loaded configuration that this class does not use are written back unchanged.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (target / name).write_bytes(data)

    def files(self, config: Mapping[str, Any] | None = None) -> dict[str, bytes]:
        """What `save` writes, as file name -> contents. `config`: further configuration keys, by
        default those that were loaded."""
        config = self._config if config is None else config
        past_the_table = {
            key: entry
            for key, entry in (config.get("added_tokens_decoder") or {}).items()
            if int(key) >= self.vocab_size
        }
        table = added_tokens(self._names, self.num_ranks, self._special_ids)
        return {
            MODEL_FILE: dump_ranks(self._ranks),
            CONFIG_FILE: dump_config(
                {**config, "added_tokens_decoder": {**table, **past_the_table}}
            ),
        }

    @property
    def num_ranks(self) -> int:
        """n: the number of ordinary tokens, and the id of the first control token."""
        return len(self._ranks)

    @property
    def vocab_size(self) -> int:
        """n + 256; 163,840 for the released model."""
        return self.num_ranks + NUM_RESERVED

    def token_id(self, name: str) -> int:
        """Id of the control token called `name`, e.g. `"<|im_user|>"`. Raises KimiError."""
        if name not in self._id_of:
            raise KimiError(f"tokenizer: no control token is called {name!r}")
        return self._id_of[name]

    @cached_property
    def bos_id(self) -> int:
        """`[BOS]`; nothing in this package adds it."""
        return self.token_id("[BOS]")

    @cached_property
    def eos_id(self) -> int:
        """`[EOS]`, the id that the released config.json names."""
        return self.token_id("[EOS]")

    @cached_property
    def im_end_id(self) -> int:
        """`<|im_end|>`, the end of a turn in the chat template."""
        return self.token_id("<|im_end|>")

    @cached_property
    def pad_id(self) -> int:
        """`[PAD]`."""
        return self.token_id("[PAD]")

    @cached_property
    def unk_id(self) -> int:
        """`[UNK]`; byte-level BPE never produces it."""
        return self.token_id("[UNK]")

    @cached_property
    def media_pad_id(self) -> int:
        """`<|media_pad|>`, one per vision token of a picture or a clip's chunk."""
        return self.token_id("<|media_pad|>")

    @cached_property
    def think_id(self) -> int:
        """`<think>`."""
        return self.token_id("<think>")

    @cached_property
    def end_think_id(self) -> int:
        """`</think>`."""
        return self.token_id("</think>")

    @property
    def stop_ids(self) -> tuple[int, int]:
        """Generation ends at either: the config's `[EOS]`, the template's `<|im_end|>`."""
        return (self.eos_id, self.im_end_id)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` drops: all control tokens but think and tool calls."""
        return self._special_ids

    @property
    def control_names(self) -> tuple[str, ...]:
        """Names of ids n..n+255, in order."""
        return self._names

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Ids of `text`.

        Args:
            text: any string; lone surrogates, which have no UTF-8 form, become U+FFFD.
            allow_special: control token names in `text` become their ids. Pass False for text that
                is not the template's own: the names are then ordinary characters.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode: text must be str, got {type(text).__name__}")
        return self.encode_pieces(self.split_control(text) if allow_special else [text])

    def split_control(self, text: str) -> list[str | int]:
        """Cut `text` into ordinary strings and ids of the control tokens named in it."""
        pieces: list[str | int] = []
        end = 0
        for match in self._control.finditer(text):
            pieces += [text[end : match.start()], self._id_of[match[0]]]
            end = match.end()
        pieces.append(text[end:])
        return [piece for piece in pieces if piece != ""]

    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        """Ids of a sequence of ordinary strings (never control tokens) and control ids.

        A boundary between two strings is not a token boundary: they are joined first.
        """
        ids: list[int] = []
        # Cuts depend on the position in the whole text, the control tokens' names included, as in
        # the released tokenizer.
        whole = "".join(p if isinstance(p, str) else self._name(p) for p in pieces)
        cuts = iter([*_cuts(whole), len(whole)])
        cut = next(cuts)
        start = 0
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            if not is_text:
                for control_id in group:
                    ids.append(int(control_id))
                    start += len(self._name(int(control_id)))
                continue
            end = start + sum(len(str(piece)) for piece in group)
            while start < end:
                while cut <= start:
                    cut = next(cuts)
                stop = min(cut, end)
                ids += self._bpe.encode_ordinary(whole[start:stop])
                start = stop
        return ids

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> bytes:
        """UTF-8 bytes of `ids`; they may begin or end inside a character.

        Raises:
            KimiError: an id outside [0, vocab_size), with its position.
            TypeError: something that is not an integer.
        """
        parts = []
        for position, item in enumerate(ids):
            token_id = operator.index(item)
            if not 0 <= token_id < self.vocab_size:
                raise KimiError(
                    f"decode: ids[{position}] must be in [0, {self.vocab_size}), got {token_id}"
                )
            if not (skip_special_tokens and token_id in self._special_ids):
                parts.append(self._bpe.decode_single_token_bytes(token_id))
        return b"".join(parts)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Errors as in `decode_bytes`."""
        data = self.decode_bytes(ids, skip_special_tokens=skip_special_tokens)
        return data.decode("utf-8", errors="replace")

    def stream_decoder(self, *, skip_special_tokens: bool = False) -> StreamDecoder:
        """A decoder for one sequence whose ids arrive one after another."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    def _name(self, token_id: int) -> str:
        if not self.num_ranks <= token_id < self.vocab_size:
            raise KimiError(
                f"encode: a control id must be in [{self.num_ranks}, {self.vocab_size}), "
                f"got {token_id}"
            )
        return self._names[token_id - self.num_ranks]


class StreamDecoder:
    """Ids in, text out, without ever printing part of a character.

    The texts returned by `feed` and the one by `finish` concatenate to `decode` of all the ids.
    """

    def __init__(self, tokenizer: KimiTokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: int | Iterable[int]) -> str:
        """Text that `ids` complete; an unfinished character waits for the next call."""
        batch = ids if isinstance(ids, Iterable) else [ids]
        return self._utf8.decode(
            self._tokenizer.decode_bytes(batch, skip_special_tokens=self._skip)
        )

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never was completed, else nothing."""
        return self._utf8.decode(b"", final=True)


def tiny_tokenizer_files(vocab_size: int, text: str | None = None) -> dict[str, bytes]:
    """A real tokenizer of any size, for checkpoints made by this package: file name -> contents.

    The same arguments always give the same bytes.

    Args:
        vocab_size: ids in total, at least 512 (256 single bytes and 256 control tokens).
        text: what the BPE ranks are learned from; by default a small built-in text.

    Raises:
        KimiError: `vocab_size` is below 512.
    """
    if vocab_size < 256 + NUM_RESERVED:
        raise KimiError(
            f"tiny_tokenizer_files: vocab_size must be at least {256 + NUM_RESERVED} (256 bytes "
            f"and {NUM_RESERVED} control tokens), got {vocab_size}"
        )
    tokenizer = KimiTokenizer.from_ranks(train_ranks(vocab_size - NUM_RESERVED, text))
    config = {
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "tokenizer_class": "TikTokenTokenizer",
    }
    return {**tokenizer.files(config), TEMPLATE_FILE: own_template().encode("utf-8")}
