"""Turns a jit'd function into a Python function that behaves as the compiled one does.

Python and Triton differ where Triton decides by type: a loop counter is an int32 that can overflow,
and so is what a loop carries from one turn to the next; numbers computed from constants stay
constants. So ``range`` is replaced by one that counts in tensors, and numbers that a loop assigns
become tensors in front of it. ``and``, ``or`` and ``not`` of tensors go element by element, and
evaluate both sides. Line numbers stay those of the source.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from kimi_ops.testing.triton_interpreter.faults import UnsupportedByInterpreter
from kimi_ops.testing.triton_interpreter.machine import KERNEL_CODE

CARRY = "__interpreted_carry__"
RANGE = "__interpreted_range__"
LOGIC = "__interpreted_logic__"
NOT = "__interpreted_not__"


def _assigned(nodes: list[ast.stmt]) -> set[str]:
    """Names that statements assign without declaring them constants."""
    found = set()
    for node in nodes:
        for child in ast.walk(node):
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                found.add(child.id)
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                found.discard(child.target.id)
    return found


class _Rewriter(ast.NodeTransformer):
    def __init__(self, params: set[str]) -> None:
        self._bound = set(params)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if isinstance(node.ctx, ast.Store):
            self._bound.add(node.id)
        elif node.id == "range":
            return ast.copy_location(ast.Name(RANGE, ast.Load()), node)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        name = "logical_and" if isinstance(node.op, ast.And) else "logical_or"
        result, nothing = node.values[0], ast.arguments([], [], None, [], [], None, [])
        for value in node.values[1:]:
            later = ast.Lambda(nothing, value)
            args = [ast.Constant(name), result, later]
            result = ast.copy_location(ast.Call(ast.Name(LOGIC, ast.Load()), args, []), node)
        return result

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        call = ast.Call(ast.Name(NOT, ast.Load()), [node.operand], [])
        return ast.copy_location(call, node)

    def _carried(self, body: list[ast.stmt], at: ast.stmt) -> list[ast.stmt]:
        """``name = carry(name)`` for what the loop takes from one turn to the next."""
        made: list[ast.stmt] = []
        for name in sorted(_assigned(body) & self._bound):
            call = ast.Call(ast.Name(CARRY, ast.Load()), [ast.Name(name, ast.Load())], [])
            assign = ast.Assign([ast.Name(name, ast.Store())], call)
            # A name bound in a branch that was not taken is bound by the loop itself.
            unbound = ast.ExceptHandler(ast.Name("NameError", ast.Load()), None, [ast.Pass()])
            attempt = ast.Try([assign], [unbound], [], [])
            made.append(ast.fix_missing_locations(ast.copy_location(attempt, at)))
        return made

    def visit_For(self, node: ast.For) -> list[ast.stmt]:
        unrolled = "static_range" in ast.unparse(node.iter)
        before = [] if unrolled else self._carried(node.body, node)
        self.generic_visit(node)
        return [*before, node]

    def visit_While(self, node: ast.While) -> list[ast.stmt]:
        before = self._carried(node.body, node)
        self.generic_visit(node)
        return [*before, node]


def rewrite(
    function: FunctionType, names: Mapping[str, Any], replaced: Mapping[int, Any]
) -> Callable[..., Any]:
    """The Python function to run instead of a jit'd one.

    Args:
        function: the plain function under the decorator.
        names: what `CARRY`, `RANGE`, `LOGIC` and `NOT` stand for.
        replaced: by the id of an object among the function's globals, what to use instead.

    Raises:
        UnsupportedByInterpreter: the function has no source.
    """
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise UnsupportedByInterpreter(f"{function.__qualname__}: it has no source") from error
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise UnsupportedByInterpreter(f"{function.__qualname__} is no plain function")
    definition.decorator_list = []
    definition.returns = None
    arguments = definition.args
    params = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    constants = {p.arg for p in params if p.annotation and "constexpr" in ast.unparse(p.annotation)}
    for param in params:
        param.annotation = None
    rewriter = _Rewriter({p.arg for p in params} - constants)
    definition.body = [
        statement
        for node in definition.body
        for visited in [rewriter.visit(node)]
        for statement in (visited if isinstance(visited, list) else [visited])
    ]
    ast.increment_lineno(tree, first - 1)
    code = compile(ast.fix_missing_locations(tree), inspect.getfile(function), "exec")
    scope = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    scope = {name: replaced.get(id(value), value) for name, value in scope.items()}
    scope.update(names)
    scope[KERNEL_CODE] = True
    exec(code, scope)
    made: Callable[..., Any] = scope[function.__name__]
    # A function that calls itself must find the jit'd one, as any other caller does.
    if function.__name__ in function.__globals__:
        scope[function.__name__] = function.__globals__[function.__name__]
    return made
