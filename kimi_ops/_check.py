"""Shape, dtype and device expectations of the ops, written once as text.

Each op states its arguments in the notation of the documentation, for example ::

    checks = {
        "x": "[T, D] float",
        "packed": "[N, D/8] int32",
        "scale": "[N, D/32] bfloat16|float16|float32",
        "D": "D % 32 == 0",
    }

and `compile_checks` turns that text into one straight-line Python function. The text is therefore
the check, the error message and the documentation at once, and a call pays for a few comparisons
instead of for an interpreter of the notation.

Notation of a tensor argument: ``[optional] [dim, dim, ...] dtypes``, or two such forms joined by
``or``, which differ in dtype and in dims that are expressions.

- A dim is an integer, a letter, or an expression of letters with ``+ * /`` (``2*F``, ``D/8``,
  ``C+R``; division is exact). A letter takes its value where it first can, every other occurrence
  must agree. An expression none of whose letters can be solved stands for one unknown number.
  ``...`` in first place is any number of leading dims, the same ones in every argument.
- dtypes: ``float`` (bfloat16, float16, float32, float64), ``int`` (int32, int64), ``like NAME``
  (the dtype of an earlier argument), or dtype names joined by ``|``.
- Every tensor must be on the device of the first one; a written one must not overlap itself.

Any other key is a rule: a Python condition over letters and arguments, checked as soon as all of
them are known. Only metadata is read: no check ever waits for a device.
"""

from __future__ import annotations

import ast
import builtins
import linecache
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

DTYPE_GROUPS = {
    "float": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
    "int": (torch.int32, torch.int64),
}
_TENSOR = re.compile(r"^(optional )?\[(.*?)\] (.+)$")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _TensorSpec:
    """One tensor argument's line of the contract, parsed."""

    def __init__(self, name: str, text: str) -> None:
        text, _, second = text.partition(" or ")
        match = _TENSOR.match(text)
        if match is None:
            raise ValueError(f"not a tensor specification: {name}: {text!r}")
        self.name = name
        self.optional = match[1] is not None
        dims = [d.strip() for d in match[2].split(",")] if match[2].strip() else []
        self.prefix = bool(dims) and dims[0] == "..."
        self.dims = dims[1:] if self.prefix else dims
        self.shape_text = f"[{', '.join(dims)}]"
        self.like = match[3].removeprefix("like ") if match[3].startswith("like ") else None
        self.dtypes: tuple[torch.dtype, ...] = ()
        if self.like is None:
            for word in match[3].split("|"):
                self.dtypes += DTYPE_GROUPS.get(word) or (getattr(torch, word),)
        # The second of two forms knows the first.
        self.other = _TensorSpec(name, second) if second else None
        if self.other is not None:
            self.other.first = self
            assert self.other.other is None, f"{name}: more than two forms: {text}"
            pairs = zip(self.dims, self.other.dims, strict=True)
            assert all(a == b or not (a + b).isidentifier() for a, b in pairs), f"{name}: {text}"
        self.first: _TensorSpec | None = None

    @property
    def forms(self) -> list[_TensorSpec]:
        """The one form or both."""
        return [self, self.other] if self.other else [self]

    def dtypes_in(self, args: Mapping[str, Any]) -> tuple[torch.dtype, ...]:
        return self.dtypes if self.like is None else (args[self.like].dtype,)

    def dtype_text(self, args: Mapping[str, Any]) -> str:
        if self.like is not None:
            return f"{_dtype_name(args[self.like].dtype)} (like {self.like})"
        return "|".join(map(_dtype_name, self.dtypes))


def _letters(expression: str) -> list[str]:
    names = [n.id for n in ast.walk(ast.parse(expression, mode="eval")) if isinstance(n, ast.Name)]
    return list(dict.fromkeys(names))


def _exact(expression: str) -> str:
    """The expression with exact division spelled as Python's integer division."""
    return expression.replace("/", "//")


def _solve(node: ast.expr, value: str, unknown: str) -> tuple[str, list[str]]:
    """Solves `node == value` for the letter `unknown`: its expression, and what must divide."""
    if isinstance(node, ast.Name):
        return value, []
    assert isinstance(node, ast.BinOp), "a dim is a letter, a number, or + * / of those"
    left, right = ast.unparse(node.left), ast.unparse(node.right)
    in_left = unknown in _letters(left)
    inner, other = (node.left, right) if in_left else (node.right, left)
    if isinstance(node.op, ast.Add):
        return _solve(inner, f"({value} - ({_exact(other)}))", unknown)
    if isinstance(node.op, ast.Mult):
        solution, divides = _solve(inner, f"({value} // ({_exact(other)}))", unknown)
        return solution, [f"{value} % ({_exact(other)}) == 0", *divides]
    assert isinstance(node.op, ast.Div), "a dim is a letter, a number, or + * / of those"
    assert in_left, "only a number may stand below a division"
    return _solve(inner, f"({value} * {other})", unknown)


class Checks:
    """The checks of one op: `run(*args)` returns None or raises a ValueError or TypeError."""

    def __init__(
        self,
        op: str,
        params: Sequence[str],
        checks: Mapping[str, str],
        written: Sequence[str] = (),
    ) -> None:
        self.op = op
        self.written = set(written)
        self.params = tuple(params)
        self.tensors = {k: _TensorSpec(k, v) for k, v in checks.items() if _TENSOR.match(v)}
        self.rules = {k: v for k, v in checks.items() if k not in self.tensors}
        if unknown := [name for name in self.tensors if name not in self.params]:
            raise ValueError(f"{op}: checks name arguments that the schema lacks: {unknown}")
        # What has a value at this point of the text: at first whatever is not a required tensor.
        self.known = {p for p in self.params if p not in self.tensors or self.tensors[p].optional}
        self.source = "\n".join(self._lines()) + "\n"
        filename = f"<checks of {op}>"
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(True), filename)
        namespace: dict[str, Any] = {
            "_fail_tensor": self._fail_tensor,
            "_fail_rule": self._fail_rule,
            "_fail_overlap": self._fail_overlap,
            "_holds": _holds,
            **{f"_{spec.name}_dtypes": frozenset(spec.dtypes) for spec in self.tensors.values()},
            **{
                f"_{spec.name}_other_dtypes": frozenset(spec.other.dtypes)
                for spec in self.tensors.values()
                if spec.other
            },
        }
        exec(compile(self.source, filename, "exec"), namespace)
        self.run: Callable[..., None] = namespace["check"]

    def _lines(self) -> list[str]:
        rules = dict(self.rules)
        body = self._known_rules(rules)
        for spec in self.tensors.values():
            body += self._guarded(spec, self._metadata(spec))
            self.known.add(spec.name)
            body += self._known_rules(rules)
        # Letters that stand alone are bound now; what is left are numbers and expressions.
        dims = [
            (form, dim, f"{form.name}_shape[{i - len(form.dims)}]")
            for spec in self.tensors.values()
            for form in spec.forms
            for i, dim in enumerate(form.dims)
            if not dim.isidentifier()
        ]
        while dims:
            solvable = [d for d in dims if len(set(_letters(d[1])) - self.known) <= 1]
            if solvable:
                done = solvable[:1]
                spec, dim, value = done[0]
                body += self._form(spec, self._expression(spec, dim, value))
            else:  # the first expression stands for one unknown number
                done = [d for d in dims if d[1] == dims[0][1]]
                body += self._unknown(done)
            dims = [d for d in dims if d not in done]
            body += self._known_rules(rules)
        if rules:
            raise ValueError(f"{self.op}: rules with letters that no tensor gives: {list(rules)}")
        return [f"def check({', '.join(self.params)}):", *(f"    {line}" for line in body)]

    def _guarded(self, spec: _TensorSpec, lines: list[str]) -> list[str]:
        if spec.optional:
            return [f"if {spec.name} is not None:", *(f"    {line}" for line in lines)]
        return lines

    def _form(self, spec: _TensorSpec, lines: list[str]) -> list[str]:
        """Lines about an expression of one form: they hold for tensors of that form's dtype."""
        if spec.other or spec.first:
            isin = "not in" if spec.other else "in"
            head = f"if {spec.name}.dtype {isin} _{spec.name}_other_dtypes:"
            lines = [head, *(f"    {line}" for line in lines)]
        return self._guarded(spec, lines)

    def _metadata(self, spec: _TensorSpec) -> list[str]:
        """Dtype, rank, device, and the dims that are a single letter."""
        name, first = spec.name, next(iter(self.tensors))
        if spec.like is not None:
            dtype = f"{name}.dtype is not {spec.like}.dtype"
        else:
            dtype = f"{name}.dtype not in _{name}_dtypes"
        if spec.other:
            dtype = f"({dtype} and {name}.dtype not in _{name}_other_dtypes)"
        rank = f"len({name}_shape) {'<' if spec.prefix else '!='} {len(spec.dims)}"
        conditions = [dtype] + ([rank] if spec.dims or not spec.prefix else [])
        lines, equal = [], []
        if name == first:
            lines.append(f"_device = {name}.device")
        else:
            conditions.append(f"{name}.device != _device")
        if spec.prefix:
            prefix = f"{name}_shape[:-{len(spec.dims)}]" if spec.dims else f"{name}_shape"
            if "..." in self.known:
                equal.append(f"{prefix} != _prefix")
            else:
                self.known.add("...")
                lines.append(f"_prefix = {prefix}")
        for i, dim in enumerate(spec.dims):
            if dim.isidentifier():
                value = f"{name}_shape[{i - len(spec.dims)}]"
                if dim in self.known:
                    equal.append(f"{value} != {dim}")
                else:
                    self.known.add(dim)
                    lines.append(f"{dim} = {value}")
        fail = f"    _fail_tensor({name!r}, locals())"
        head = [f"{name}_shape = {name}.shape", f"if {' or '.join(conditions)}:", fail]
        if name in self.written:
            head += [f"if 0 in {name}.stride():", f"    _fail_overlap({name!r}, {name})"]
        return head + lines + ([f"if {' or '.join(equal)}:", fail] if equal else [])

    def _expression(self, spec: _TensorSpec, dim: str, value: str) -> list[str]:
        fail = f"    _fail_tensor({spec.name!r}, locals())"
        unknown = set(_letters(dim)) - self.known
        if not unknown:
            divisions = re.findall(r"(\w+)/(\d+)", dim)
            conditions = [f"{letter} % {number} != 0" for letter, number in divisions]
            conditions.append(f"{value} != {_exact(dim)}")
            return [f"if {' or '.join(conditions)}:", fail]
        letter = unknown.pop()
        solution, divides = _solve(ast.parse(dim, mode="eval").body, value, letter)
        self.known.add(letter)
        lines = [f"if not ({' and '.join(divides)}):", fail] if divides else []
        negative = [f"if {letter} < 0:", fail] if "-" in solution else []
        return [*lines, f"{letter} = {solution}", *negative]

    def _unknown(self, dims: list[tuple[_TensorSpec, str, str]]) -> list[str]:
        (_, text, first), *others = dims
        symbol = re.sub(r"\W+", "_", text)
        lines = [f"{symbol} = {first}"]
        self.known.add(symbol)
        for spec, _, value in others:
            fail = f"    _fail_tensor({spec.name!r}, locals())"
            lines += self._guarded(spec, [f"if {value} != {symbol}:", fail])
        return lines

    def _known_rules(self, rules: dict[str, str]) -> list[str]:
        """Takes out of ``rules`` those that can be decided by now, and returns their lines."""
        ready = {
            k: r for k, r in rules.items() if set(_letters(r)) - set(dir(builtins)) <= self.known
        }
        lines = []
        for key, rule in ready.items():
            del rules[key]
            # A rule on numbers alone may meet one that a trace does not know yet.
            numbers = set(_letters(rule)) <= set(self.params) - set(self.tensors)
            condition = f"_holds({rule})" if numbers else f"({rule})"
            lines += [f"if not {condition}:", f"    _fail_rule({key!r}, locals())"]
        return lines

    def _fail_tensor(self, name: str, env: Mapping[str, Any]) -> NoReturn:
        spec = self.tensors[name]
        tensor = env[name]
        first = next(iter(self.tensors))
        got = f"{[_plain(n) for n in tensor.shape]} {_dtype_name(tensor.dtype)}"
        expected = " or ".join(f"{f.shape_text} {f.dtype_text(env)}" for f in spec.forms)
        if not any(tensor.dtype in form.dtypes_in(env) for form in spec.forms):
            raise TypeError(f"{self.op}: {name} must be {expected}, got {got}")
        if tensor.device != env[first].device:
            raise ValueError(
                f"{self.op}: {name} must be on {env[first].device} like {first}, "
                f"got {tensor.device}"
            )
        dims = [d for form in spec.forms for d in form.dims]
        letters = list(dict.fromkeys(n for d in dims for n in _letters(d)))
        values = {n: env[n] for n in letters if n in env and not isinstance(env[n], torch.Tensor)}
        values |= {d: env[s] for d in dims if (s := re.sub(r"\W+", "_", d)) in env and s != d}
        if spec.prefix and "_prefix" in env:
            values["..."] = [_plain(n) for n in env["_prefix"]]
        where = ", ".join(f"{n} = {_plain(v)}" for n, v in values.items())
        where = f" with {where}" if where else ""
        raise ValueError(f"{self.op}: {name} must be {expected}{where}, got {got}")

    def _fail_overlap(self, name: str, tensor: torch.Tensor) -> None:
        if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(
                f"{self.op}: {name} is written and must not overlap itself, "
                f"got {list(tensor.shape)} with strides {list(tensor.stride())}"
            )

    def _fail_rule(self, key: str, env: Mapping[str, Any]) -> NoReturn:
        rule = self.rules[key]
        got = ", ".join(f"{n} = {_plain(env[n])}" for n in _letters(rule) if n in env)
        raise ValueError(f"{self.op}: {key} must satisfy {rule}, got {got}")


def _holds(condition: Any) -> bool:
    """A rule's truth; under tracing, one that depends on the data becomes a check at run time."""
    if isinstance(condition, torch.SymBool):
        torch._check(condition)
        return True
    return bool(condition)


def _plain(value: Any) -> Any:
    """A value as an error message shows it."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {_dtype_name(value.dtype)}"
    return value
