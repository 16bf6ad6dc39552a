"""Reads one JSON object from an untrusted file: bounded, strict, errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kimi_ops.model.errors import KimiError


def printable(name: str) -> str:
    """`name`, from an untrusted file, for a message: not endless, no control characters."""
    shown = name if name.isprintable() and name else ascii(name)
    return shown if len(shown) <= 200 else shown[:197] + "..."


def parse_json_object(text: bytes, source: str, error: type[KimiError]) -> dict[str, Any]:
    """Parses `text` (UTF-8) as one JSON object.

    Stricter than `json.loads` where leniency would hide a fault: a key given twice is an error (the
    library keeps the last silently). `source` names the text in messages. Raises `error`.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise error(f"{source}: the key {printable(key)} is given twice")
            result[key] = value
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except KimiError:
        raise
    except RecursionError:
        raise error(f"{source}: not readable as JSON: nested too deeply") from None
    except ValueError as fault:  # JSONDecodeError, UnicodeDecodeError and over-long integers
        raise error(f"{source}: not valid JSON: {fault}") from None
    if not isinstance(value, dict):
        raise error(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json_object(path: Path, max_bytes: int, error: type[KimiError]) -> dict[str, Any]:
    """Reads the JSON object in the file `path` of at most `max_bytes`. Raises `error`."""
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror or fault}") from None
    if len(text) > max_bytes:
        raise error(f"{path}: longer than the {max_bytes} bytes expected of such a file")
    return parse_json_object(text, str(path), error)
