"""The tokenizer's files: `tiktoken.model` and `tokenizer_config.json`, read with care and written.

`tiktoken.model` holds one token per line: its bytes in base64, a space, its rank. The 256 control
tokens are not in it; their names are a fixed table that `tokenizer_config.json` can override
(`added_tokens_decoder`). Source: the released Kimi K2.5 files.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence, Set
from importlib import resources
from pathlib import Path
from typing import Any

from kimi_ops.model.errors import CheckpointError

NUM_RESERVED = 256
RELEASED_NUM_RANKS = 163_584
MODEL_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_CONFIG_BYTES = 1 << 24

# Position after the last rank -> name, for the ids that have a role.
CONTROL_TOKENS: Mapping[int, str] = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    255: "[PAD]",
}
# Added tokens that are not flagged special: `skip_special_tokens` keeps them, since a reader of the
# model's output needs them.
VISIBLE_TOKENS = frozenset(CONTROL_TOKENS[i] for i in (11, 12, 13, 14, 15, 22, 23))

_MAX_RANK_DIGITS = 9


def reserved_names(num_ranks: int) -> list[str]:
    """Names of the 256 ids that follow `num_ranks` ranks, as released."""
    return [
        CONTROL_TOKENS.get(i, f"<|reserved_token_{num_ranks + i}|>") for i in range(NUM_RESERVED)
    ]


def own_template() -> str:
    """The chat template that ships with this package, as jinja2 source."""
    return resources.files("kimi_ops.model").joinpath(TEMPLATE_FILE).read_text(encoding="utf-8")


def read_file(path: Path) -> bytes:
    """Bytes of `path`; a file that is absent or unreadable is a CheckpointError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: a readable file was expected, got: {error.strerror}"
        ) from None


def parse_ranks(data: bytes, source: str) -> dict[bytes, int]:
    """Token bytes -> rank, from the contents of a `tiktoken.model`.

    Raises:
        CheckpointError: naming `source` and the line: not "base64 rank", bad base64, an empty
            token, a rank or a token given twice, ranks that are not 0..n-1, a missing single byte.
    """
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        where = f"{source}, line {number}"
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) != 2:
            raise CheckpointError(f"{where}: expected 'base64 rank', got {_show(line)}")
        try:
            token = base64.b64decode(fields[0], validate=True)
        except binascii.Error as error:
            raise CheckpointError(
                f"{where}: the token {_show(fields[0])} is not base64 ({error})"
            ) from None
        if not token:
            raise CheckpointError(f"{where}: the token is empty")
        if not fields[1].isdigit() or len(fields[1]) > _MAX_RANK_DIGITS:
            raise CheckpointError(
                f"{where}: the rank must be a number of at most {_MAX_RANK_DIGITS} digits, "
                f"got {_show(fields[1])}"
            )
        rank = int(fields[1])
        if rank in line_of_rank:
            raise CheckpointError(
                f"{where}: rank {rank} was already given in line {line_of_rank[rank]}"
            )
        if token in ranks:
            raise CheckpointError(
                f"{where}: token {token!r} was already given in line {line_of_rank[ranks[token]]}"
            )
        ranks[token] = rank
        line_of_rank[rank] = number
    check_ranks(ranks, source)
    return ranks


def check_ranks(ranks: Mapping[bytes, int], source: str) -> None:
    """Ranks are exactly 0..n-1 and every single byte has one. Raises CheckpointError."""
    for token, rank in ranks.items():
        if not isinstance(token, bytes) or not token or type(rank) is not int:
            raise CheckpointError(
                f"{source}: expected non-empty bytes -> int, got {token!r} -> {rank!r}"
            )
    present = set(ranks.values())
    for expected in range(len(ranks)):
        if expected not in present:
            raise CheckpointError(
                f"{source}: ranks must be 0..{len(ranks) - 1} without gaps or repeats, "
                f"rank {expected} is missing"
            )
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise CheckpointError(
                f"{source}: every single byte needs a rank, byte 0x{byte:02x} has none"
            )


def dump_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """Contents of `tiktoken.model`, in rank order."""
    lines = [
        base64.b64encode(token) + b" %d\n" % rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    return b"".join(lines)


def control_names(
    config: Mapping[str, Any], num_ranks: int, source: str
) -> tuple[list[str], frozenset[str]]:
    """Names of ids n..n+255 and those among them not flagged special, from `added_tokens_decoder`.

    Ids past n+255 are allowed and not used: some released files of the family list two of them,
    outside the embedding table.

    Raises:
        CheckpointError: an id below n, a malformed entry, a name used twice, or a control token
            that the model needs and the file renamed away.
    """
    names = reserved_names(num_ranks)
    visible = set(VISIBLE_TOKENS)
    added = config.get("added_tokens_decoder")
    if added is None:
        added = {}
    if not isinstance(added, dict):
        raise CheckpointError(
            f"{source}: added_tokens_decoder must be an object, got {type(added).__name__}"
        )
    for key, entry in added.items():
        where = f"{source}: added_tokens_decoder[{key!r}]"
        if not (key.isascii() and key.isdigit() and len(key) <= _MAX_RANK_DIGITS):
            raise CheckpointError(f"{where}: the key must be a token id")
        name = entry.get("content") if isinstance(entry, dict) else None
        # One character could not be told from ordinary text that contains it.
        if not isinstance(name, str) or len(name) < 2:
            raise CheckpointError(
                f"{where}: expected {{'content': name of two or more characters, ...}}, "
                f"got {entry!r:.80}"
            )
        if any("\ud800" <= char <= "\udfff" for char in name):
            raise CheckpointError(f"{where}: the name {name!r} has no UTF-8 form")
        special = entry.get("special", name not in VISIBLE_TOKENS)
        if not isinstance(special, bool):
            raise CheckpointError(f"{where}: 'special' must be true or false, got {special!r}")
        position = int(key) - num_ranks
        if position < 0:
            raise CheckpointError(
                f"{where}: control ids start after the {num_ranks} ranks of {MODEL_FILE}"
            )
        if position < NUM_RESERVED:
            names[position] = name
            (visible.discard if special else visible.add)(name)
    if len(set(names)) < NUM_RESERVED:
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{source}: added_tokens_decoder names two ids {twice!r}")
    for position, name in CONTROL_TOKENS.items():
        if name not in names:
            raise CheckpointError(
                f"{source}: no id is called {name!r}; id {num_ranks + position} was expected to "
                f"be, got {names[position]!r}"
            )
    return names, frozenset(visible)


def added_tokens(
    names: Sequence[str], num_ranks: int, special_ids: Set[int]
) -> dict[str, dict[str, Any]]:
    """The `added_tokens_decoder` that `control_names` reads back."""
    return {
        str(num_ranks + position): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": num_ranks + position in special_ids,
        }
        for position, name in enumerate(names)
    }


def dump_config(config: Mapping[str, Any]) -> bytes:
    """Contents of `tokenizer_config.json`."""
    return (json.dumps(config, indent=2) + "\n").encode("ascii")


def _show(data: bytes) -> str:
    """A line of a broken file, short enough for a message."""
    text = repr(data.decode("utf-8", errors="replace"))
    return text if len(text) <= 60 else text[:57] + "..."
