"""Runs a chat template without trusting it: a checkpoint's template is somebody else's program.

jinja2's immutable sandbox keeps it from Python's internals and from changing its input; there is
no loader, so it reaches no file. What the sandbox leaves open is time and memory. Both are bounded
here as far as one process can: every loop turn and macro call counts and looks at a deadline, every
operation that can make a long string pays for its length, and filters and methods whose result can
be arbitrarily long for a short input are left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kimi_ops.model.errors import ChatError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_STEPS = 200_000
MAX_MADE_CHARS = 1 << 28
MAX_SECONDS = 20.0

_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "first", "float"),
    *("groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min"),
    *("reject", "rejectattr", "reverse", "safe", "select", "selectattr", "sort", "string"),
    *("title", "trim", "unique", "upper"),
)
_GLOBALS = frozenset(("range", "dict", "namespace"))
_LENGTHENING_METHODS = frozenset(
    ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")
)
_MAX_JSON_INDENT = 16


@dataclass
class _Budget:
    """What one rendering has used."""

    steps: int = 0
    made_chars: int = 0
    deadline: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ChatError(f"chat template: stopped after {MAX_STEPS} loop turns and macro calls")
        if time.monotonic() > self.deadline:
            raise ChatError(f"chat template: stopped after {MAX_SECONDS:.0f} seconds")

    def make(self, chars: int) -> None:
        self.made_chars += chars
        if self.made_chars > MAX_MADE_CHARS:
            raise ChatError(f"chat template: stopped after making {MAX_MADE_CHARS} characters")


_budget: ContextVar[_Budget] = ContextVar("_budget")


def render_template(source: str, variables: Mapping[str, Any], now: datetime) -> str:
    """Text that the jinja2 template `source` makes of `variables`.

    The template also finds `raise_exception(message)` and `strftime_now(format)`, and `tojson`
    writes plain JSON (no HTML escapes), as chat templates expect.

    Args:
        now: the time that `strftime_now` tells.

    Raises:
        ChatError: the template is malformed, fails, raises, or exceeds a bound.
    """
    token = _budget.set(_Budget())
    try:
        return _compiled(source).render(**variables, strftime_now=now.strftime)
    except (jinja2.TemplateError, SyntaxError) as error:
        line = getattr(error, "lineno", None)
        where = f" line {line}" if line else ""
        raise ChatError(f"chat template{where}: {type(error).__name__}: {error}") from error
    except RecursionError as error:
        raise ChatError("chat template: nested too deeply") from error
    except ChatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What expressions of a template raise: wrong types, missing keys, division by zero.
        raise ChatError(f"chat template: {type(error).__name__}: {error}") from error
    finally:
        _budget.reset(token)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE_CHARS:
        raise ChatError(
            f"chat template: at most {MAX_TEMPLATE_CHARS} characters expected, got {len(source)}"
        )
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols],
        finalize=_pay_for_output,
    )
    tree = environment.parse(source)
    _bound(tree)
    return environment.from_string(tree)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox with the bounds of this module."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self.filters["tojson"] = _tojson
        self.filters["join"] = _paid_join
        self.filters["replace"] = _paid_replace
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals["raise_exception"] = _raise_exception

    def step(self, static_chars: int) -> str:
        """Called at the top of each loop body and macro; `static_chars` of plain text are in it."""
        _budget.get().step()
        _budget.get().make(static_chars)
        return ""

    def pay(self, value: Any) -> Any:
        """Called with the result of each filter."""
        if isinstance(value, str | list | tuple | dict):
            _budget.get().make(len(value))
        return value

    def concatenate(self, *parts: Any) -> str:
        """Stands in for `~`."""
        return _paid_join(parts, "")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise ChatError("chat template: the string operator % is not available; use ~")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _budget.get().make(left.bit_length() * max(right, 0))
        if operator == "+" and isinstance(left, str | list | tuple):
            _budget.get().make(len(left) + len(right))
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    _budget.get().make(len(many) * max(times, 0))
                elif isinstance(many, int):
                    _budget.get().make(many.bit_length())
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        text = getattr(obj, "__self__", None)
        name = getattr(obj, "__name__", None)
        if isinstance(text, str) and name == "replace":
            return _paid_replace(text, *args)
        if isinstance(text, str) and name == "join" and len(args) == 1:
            return _paid_join(args[0], text)
        return self.pay(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes) and attr in _LENGTHENING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


def _bound(tree: nodes.Template) -> None:
    """Rewrites `tree` so that loop turns and macro calls take a step and results are paid for."""
    parents = [tree, *tree.find_all(nodes.Node)]
    for parent in parents:
        # The filters of these two statements have no operand of their own to wrap.
        if isinstance(parent, nodes.FilterBlock | nodes.AssignBlock):
            continue
        for name, value in list(parent.iter_fields()):
            if isinstance(value, list):
                value[:] = [_paid(item) for item in value]
            else:
                setattr(parent, name, _paid(value))
    for block in parents:
        if isinstance(block, nodes.For | nodes.Macro | nodes.CallBlock):
            static_chars = sum(len(data.data) for data in block.find_all(nodes.TemplateData))
            step = _call("step", [nodes.Const(static_chars)], block.lineno)
            block.body.insert(0, nodes.Output([step], lineno=block.lineno))


def _paid(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _call("concatenate", node.nodes, node.lineno)
    if isinstance(node, nodes.Filter):
        return _call("pay", [node], node.lineno)
    return node


def _call(method: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
    """A call of a method of the environment, which no name in the template can shadow."""
    function = nodes.EnvironmentAttribute(method)
    return nodes.Call(function, args, [], None, None, lineno=lineno)


@jinja2.pass_environment
def _pay_for_output(_environment: jinja2.Environment, value: Any) -> Any:
    _budget.get().make(len(str(value)))
    return value


def _paid_join(values: Iterable[Any], d: Any = "") -> str:
    """The filter and method `join`, without the filter's `attribute`."""
    separator = str(d)
    texts: list[str] = []
    for value in values:
        texts.append(str(value))
        _budget.get().make(len(texts[-1]) + len(separator))
    return separator.join(texts)


def _paid_replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    """The filter and method `replace`."""
    source = str(text)
    limit = -1 if count is None else count
    found = source.count(old) if limit < 0 else min(source.count(old), limit)
    _budget.get().make(len(source) + found * len(new))
    return source.replace(old, new, limit)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= _MAX_JSON_INDENT:
        raise ChatError(f"chat template: tojson(indent) must be 0..{_MAX_JSON_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise ChatError(f"chat template: {message}")
