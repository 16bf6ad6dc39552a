"""One kernel made flat: device functions inlined, names unique.

PTX functions have no recursion in what the compilers emit for kernels, so that a call is its
callee's text with its parameters (`.param` variables) renamed to the caller's.

Source: PTX ISA, "Function Declarations and Definitions",
"Control Flow Instructions: call", "Control Flow Instructions: ret".
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kimi_ops.testing.ptx.errors import LaunchError, UnsupportedPtx
from kimi_ops.testing.ptx.syntax import (
    Address,
    Function,
    Instruction,
    Module,
    Name,
    Operand,
    Pair,
    Variable,
    Vector,
)
from kimi_ops.testing.ptx.types import ScalarType


@dataclass
class Program:
    """A kernel ready to run.

    Attributes:
        name: of the entry.
        params: its parameters, in order.
        code: instructions.
        labels: name -> index into ``code``.
        branch_tables: name -> labels.
        registers: name -> type.
        variables: name -> variable, of every space.
        required_block, max_block: ``.reqntid`` and ``.maxntid``, or ().
        max_registers, min_ctas: ``.maxnreg`` and ``.minnctapersm``, or 0.
        target: "sm_80".
    """

    name: str
    target: str
    params: list[Variable]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    registers: dict[str, ScalarType] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    required_block: tuple[int, ...] = ()
    max_block: tuple[int, ...] = ()
    max_registers: int = 0
    min_ctas: int = 0


def _renamed(operand: Operand, names: dict[str, str]) -> Operand:
    if isinstance(operand, Name):
        return replace(operand, name=names.get(operand.name, operand.name))
    if isinstance(operand, Vector):
        return Vector(tuple(_renamed(item, names) for item in operand.items))
    if isinstance(operand, Pair):
        return Pair(
            Name(names.get(operand.first.name, operand.first.name)),
            Name(names.get(operand.second.name, operand.second.name)),
        )
    if isinstance(operand, Address):
        base = operand.base
        if isinstance(base, Name):
            base = Name(names.get(base.name, base.name))
        return Address(base, operand.offset, tuple(_renamed(c, names) for c in operand.coords))
    return operand


class _Linker:
    def __init__(self, module: Module, program: Program) -> None:
        self.module = module
        self.program = program
        self.calls = 0

    def add(
        self, function: Function, names: dict[str, str], end: str, stack: tuple[str, ...]
    ) -> None:
        """Appends a function's text; ``names`` renames all its own names, ``end`` is its end."""
        program = self.program
        for register, scalar in function.registers.items():
            program.registers[names.get(register, register)] = scalar
        for variable in function.variables:
            name = names.get(variable.name, variable.name)
            program.variables[name] = replace(variable, name=name)
        for table, targets in function.branch_tables.items():
            program.branch_tables[names.get(table, table)] = tuple(names.get(t, t) for t in targets)
        at: dict[int, list[str]] = {}
        for label, index in function.labels.items():
            at.setdefault(index, []).append(names.get(label, label))
        for index, instruction in enumerate(function.body):
            for label in at.pop(index, ()):
                program.labels[label] = len(program.code)
            guard = instruction.guard
            renamed = replace(
                instruction,
                operands=tuple(_renamed(o, names) for o in instruction.operands),
                guard=guard and replace(guard, name=names.get(guard.name, guard.name)),
            )
            if renamed.parts[0] == "call":
                self.call(renamed, stack)
            elif renamed.parts[0] == "ret" and end:
                program.code.append(replace(renamed, opcode="bra", operands=(Name(end),)))
            else:
                program.code.append(renamed)
        for labels in at.values():
            for label in labels:
                program.labels[label] = len(program.code)
        if end:
            program.labels[end] = len(program.code)

    def call(self, instruction: Instruction, stack: tuple[str, ...]) -> None:
        where = f"PTX line {instruction.line}"
        groups = [o.items for o in instruction.operands if isinstance(o, Vector)]
        targets = [o for o in instruction.operands if isinstance(o, Name)]
        if len(targets) != 1 or targets[0].name not in self.module.functions:
            raise UnsupportedPtx("indirect call", where)
        callee = self.module.functions[targets[0].name]
        if callee.name == "__assertfail" and not callee.defined:
            # What CUDA C++ makes of a failed `assert`.
            self.program.code.append(replace(instruction, opcode="trap", operands=()))
            return
        if not callee.defined:
            raise UnsupportedPtx(f"call of the external function {callee.name}", where)
        if callee.name in stack:
            raise UnsupportedPtx(f"recursive call of {callee.name}", where)
        formal = [*callee.results, *callee.params]
        actual = [item for group in groups for item in group]
        if len(actual) != len(formal) or not all(isinstance(a, Name) for a in actual):
            raise UnsupportedPtx(f"call of {callee.name} with other than .param variables", where)
        prefix = f"{callee.name}@{self.calls}."
        self.calls += 1
        own = [*callee.registers, *callee.labels, *callee.branch_tables]
        own += [v.name for v in callee.variables if v.space in ("local", "param")]
        names = {name: prefix + name for name in own}
        names |= {
            f.name: a.name for f, a in zip(formal, actual, strict=True) if isinstance(a, Name)
        }
        end = prefix + "end"
        if instruction.guard is not None:
            around = replace(instruction.guard, negated=not instruction.guard.negated)
            self.program.code.append(
                replace(instruction, opcode="bra", operands=(Name(end),), guard=around)
            )
        self.add(callee, names, end, (*stack, callee.name))


def link(module: Module, name: str | None = None) -> Program:
    """The flat program of one kernel of a module.

    Args:
        name: of the entry; may be left out where there is one only.

    Raises:
        LaunchError: no such kernel, or several and no name.
        UnsupportedPtx: indirect, external or recursive calls.
    """
    entries = module.entries
    if name is None and len(entries) != 1:
        raise LaunchError(f"the module has the kernels {', '.join(entries) or '(none)'}: name one")
    name = name or entries[0]
    if name not in entries:
        raise LaunchError(f"no kernel {name!r}; the module has {', '.join(entries)}")
    function = module.functions[name]
    program = Program(
        name,
        module.target,
        function.params,
        required_block=function.required_block,
        max_block=function.max_block,
        max_registers=function.max_registers,
        min_ctas=function.min_ctas,
        variables=dict(module.variables),
    )
    _Linker(module, program).add(function, {}, "", (name,))
    return program
