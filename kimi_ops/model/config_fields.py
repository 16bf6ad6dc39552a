"""Declared constraints of the config dataclasses: one declaration reads, checks and explains.

A config field is declared as `hidden_size: int = integer(1, MAX_SIZE)`. `check_fields` enforces the
declarations on a finished object (so `dataclasses.replace` is checked like a file), `read_fields`
takes the declared keys from a JSON object and refuses every key that is neither declared nor listed
harmless.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kimi_ops.model.errors import ConfigError
from kimi_ops.model.json_file import printable

# Far above any real value; keeps products of two sizes inside int64 and a hostile file from making
# us enumerate for hours.
MAX_SIZE = 2**24

Check = Callable[[Any], str | None]


def _declare(check: Check, default: Any) -> Any:
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"check": check})
    return dataclasses.field(default=default, metadata={"check": check})


def integer(low: int, high: int, default: Any = dataclasses.MISSING) -> Any:
    """A field that holds an int in `low..high` (booleans are not integers here)."""

    def check(value: Any) -> str | None:
        if type(value) is int and low <= value <= high:
            return None
        return f"must be an integer from {low} to {high}"

    return _declare(check, default)


def number(low: float, *, above: bool = False, default: Any = dataclasses.MISSING) -> Any:
    """A field that holds a finite int or float, at least `low` (greater than `low` if `above`)."""

    def check(value: Any) -> str | None:
        relation = "greater than" if above else "at least"
        # The bound also refuses NaN and infinities.
        finite = type(value) in (int, float) and abs(value) <= 1e30
        if finite and (value > low or (value == low and not above)):
            return None
        return f"must be a number {relation} {low:g}"

    return _declare(check, default)


def flag(default: Any = dataclasses.MISSING) -> Any:
    """A field that holds true or false."""
    return _declare(lambda value: None if type(value) is bool else "must be true or false", default)


def text(default: Any = dataclasses.MISSING) -> Any:
    """A field that holds a non-empty string."""

    def check(value: Any) -> str | None:
        return None if type(value) is str and value else "must be a non-empty string"

    return _declare(check, default)


def strings(default: Any = dataclasses.MISSING) -> Any:
    """A field that holds a tuple of strings (a JSON array in the file)."""

    def check(value: Any) -> str | None:
        if type(value) is tuple and all(type(item) is str for item in value):
            return None
        return "must be an array of strings"

    return _declare(check, default)


def choice(*supported: Any, default: Any = dataclasses.MISSING) -> Any:
    """A field for which only the `supported` values are implemented."""

    def check(value: Any) -> str | None:
        if any(type(value) is type(option) and value == option for option in supported):
            return None
        return f"is not supported; supported: {', '.join(map(show, supported))}"

    return _declare(check, default)


def show(value: Any) -> str:
    """`value` for a message: JSON spelling of the constants, and never more than a line."""
    spelled = {None: "null", True: "true", False: "false"}
    shown = spelled[value] if value is None or type(value) is bool else repr(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."


def check_fields(config: Any, where: str) -> None:
    """Raises `ConfigError` for the first field of `config` that breaks its declaration.

    `where` is the prefix of the key in messages, such as `"text_config."`.
    """
    for field in dataclasses.fields(config):
        check = field.metadata.get("check")
        problem = check(getattr(config, field.name)) if check else None
        if problem:
            raise ConfigError(
                f"{where}{field.name} {problem}, got {show(getattr(config, field.name))}"
            )


def read_fields(
    cls: type, values: Mapping[str, Any], where: str, harmless: Collection[str]
) -> dict[str, Any]:
    """The keyword arguments for the dataclass `cls` from a JSON object.

    Raises `ConfigError` for a key that is neither a field of `cls` nor in `harmless` (it might
    change what the model computes), and for a field without default that is absent.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields and key not in harmless:
            raise ConfigError(
                f"{where}{printable(key)} is unknown and may change the model; got "
                f"{show(values[key])}"
            )
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} is missing")
    taken = {name: values[name] for name in fields if name in values}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in taken.items()}


def require_object(value: Any, where: str) -> dict[str, Any]:
    """`value` if it is a JSON object, else `ConfigError`."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be an object, got {show(value)}")
    return value
