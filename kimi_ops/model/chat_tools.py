"""Tool declarations: checks OpenAI function tools and writes them as the model's TypeScript text.

The model was trained on declarations in the form of a TypeScript namespace. A JSON schema that has
no such form (`oneOf`, an unresolvable `$ref`, ...) makes the whole list fall back to compact JSON
with sorted keys. Source: descriptions of the encoder published with the Kimi K2.5 tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kimi_ops.model.chat_messages import check_function_name, shown
from kimi_ops.model.errors import ChatError

_MAX_DEPTH = 64
_LARGEST_NUMBER = 1e308
_TYPES: Mapping[str, str] = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
}
_CONSTRAINTS: Mapping[str, tuple[str, ...]] = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_DEFINITIONS = "#/$defs/"


def parse_tools_json(text: str | bytes, source: str = "tools") -> list[dict[str, Any]]:
    """Tools from JSON text: a list of OpenAI function tools.

    Raises:
        ChatError: not JSON, or not valid tools; `source` (a file name) begins the message.
    """
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{source}: not JSON ({error or 'nested too deeply'})") from None
    if tools is None:
        raise ChatError(f"{source} must be a list of tools, got null")
    return normalize_tools(tools, source) or []


def normalize_tools(
    tools: Sequence[Mapping[str, Any]] | None, source: str = "tools"
) -> list[dict[str, Any]] | None:
    """Checked copies of `tools` with every mapping's keys sorted; None for no tools.

    A tool is {"type": "function", "function": {"name", "description"?, "parameters"?: schema}}.

    Raises:
        ChatError: naming the tool by its index.
    """
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise ChatError(f"{source} must be a list of tools, got {type(tools).__name__}")
    result = []
    names: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"{source}[{index}]"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise ChatError(
                f"{where} must be {{'type': 'function', 'function': {{...}}}}, got {shown(tool)}"
            )
        name = check_function_name(function.get("name"), f"{where}.function.name")
        if name in names:
            raise ChatError(f"{where}.function.name {name!r} was already declared")
        names.add(name)
        if not isinstance(function.get("description") or "", str):
            raise ChatError(f"{where}.function.description must be a string")
        _check_parameters(function.get("parameters"), f"{where}.function.parameters")
        result.append(_sorted_copy(tool, where))
    return result or None


def tools_to_typescript(tools: Sequence[Mapping[str, Any]]) -> str | None:
    """The TypeScript text of normalized `tools`; None when one of them cannot be written so."""
    try:
        functions = [_function(tool["function"]) for tool in tools]
    except _UnsupportedSchemaError:
        return None
    return "# Tools\n\n## functions\nnamespace functions {\n" + "\n".join(functions) + "\n}\n"


class _UnsupportedSchemaError(Exception):
    """A JSON schema that the TypeScript form cannot express."""


class _Writer:
    """Writes the schemas of one function, which share their definitions."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self.definitions = definitions
        self.refers_to_itself = False

    def type_of(self, schema: Any, indent: str) -> str:
        if isinstance(schema, bool):
            return "any" if schema else "null"
        if not isinstance(schema, Mapping):
            raise _UnsupportedSchemaError
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "anyOf" in schema:
            return _union(self.type_of(option, indent) for option in _list(schema["anyOf"]))
        if "enum" in schema:
            return _union(_literal(value) for value in _list(schema["enum"]))
        kind = schema.get("type")
        if isinstance(kind, list):
            return _union(self.type_of({"type": one}, indent) for one in _list(kind))
        if kind == "object":
            fields = self.fields(schema, indent + "  ")
            return "{\n" + ",\n".join(fields) + "\n" + indent + "}" if fields else "{}"
        if kind == "array":
            return self._array(schema.get("items", {}), indent)
        if isinstance(kind, str) and kind in _TYPES:
            return _TYPES[kind]
        if not schema:
            return "any"
        raise _UnsupportedSchemaError

    def fields(self, schema: Mapping[str, Any], indent: str) -> list[str]:
        """Members of an object, required ones first, each group by name."""
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise _UnsupportedSchemaError
        fields = []
        for name in sorted(properties, key=lambda name: (name not in required, name)):
            member = properties[name]
            mark = "" if name in required else "?"
            default = member.get("default") if isinstance(member, Mapping) else None
            lines = _comments(member, indent)
            if default is not None:
                lines.append(f"{indent}// Default: {_default(default)}")
            lines.append(f"{indent}{name}{mark}: {self.type_of(member, indent)}")
            fields.append("\n".join(lines))
        additional = schema.get("additionalProperties")
        if additional is not None:
            kind = "never" if additional is False else self.type_of(additional, indent)
            fields.append(f"{indent}[k: string]: {kind}")
        return fields

    def _array(self, items: Any, indent: str) -> str:
        comments = _comments(items, indent + "  ")
        if not comments:
            return f"Array<{self.type_of(items, indent)}>"
        inner = f"{indent}  {self.type_of(items, indent + '  ')}"
        return "\n".join(["Array<", *comments, inner, f"{indent}>"])

    def _reference(self, reference: Any) -> str:
        if reference == "#":
            self.refers_to_itself = True
            return "parameters"
        name = reference.removeprefix(_DEFINITIONS) if isinstance(reference, str) else ""
        if name == reference or name not in self.definitions:
            raise _UnsupportedSchemaError
        return name


def _function(function: Mapping[str, Any]) -> str:
    parameters = {**(function.get("parameters") or {}), "type": "object"}
    definitions = parameters.get("$defs") or {}
    if not isinstance(definitions, Mapping):
        raise _UnsupportedSchemaError
    writer = _Writer(definitions)
    argument = writer.type_of(parameters, "")
    interfaces = []
    for name, schema in definitions.items():
        interfaces += _description(schema, "")
        interfaces.append(f"interface {name} {writer.type_of(schema, '')}")
    if writer.refers_to_itself:
        interfaces.insert(0, f"interface parameters {argument}")
        argument = "parameters"
    declaration = f"type {function['name']} = (_: {argument}) => any;"
    return "\n".join([*interfaces, *_description(function, ""), declaration])


def _comments(schema: Any, indent: str) -> list[str]:
    """Comment lines above a member: its description, then its constraints."""
    lines = _description(schema, indent)
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    keys = _CONSTRAINTS.get(kind, ()) if isinstance(kind, str) else ()
    constraints = [f"{key}: {schema[key]}" for key in keys if key in schema]
    return [*lines, f"{indent}// {', '.join(constraints)}"] if constraints else lines


def _description(schema: Any, indent: str) -> list[str]:
    text = schema.get("description") if isinstance(schema, Mapping) else None
    if not text:
        return []
    if not isinstance(text, str):
        raise _UnsupportedSchemaError
    return [f"{indent}// {line}" if line else "" for line in text.split("\n")]


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _default(value: Any) -> str:
    # Numbers and booleans appear as Python prints them (True, not true): so the model saw them.
    return str(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)


def _union(options: Iterable[str]) -> str:
    return " | ".join(options)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _UnsupportedSchemaError
    return value


def _check_parameters(parameters: Any, where: str) -> None:
    if parameters is None:
        return
    if not isinstance(parameters, Mapping):
        raise ChatError(f"{where} must be a JSON schema object, got {type(parameters).__name__}")
    if parameters.get("type", "object") != "object":
        raise ChatError(f"{where}.type must be 'object', got {shown(parameters['type'])}")
    properties = parameters.get("properties", {})
    if not isinstance(properties, Mapping):
        raise ChatError(
            f"{where}.properties must be a mapping of names to schemas, got {shown(properties)}"
        )
    required = parameters.get("required", [])
    if not isinstance(required, list | tuple) or not all(
        isinstance(name, str) for name in required
    ):
        raise ChatError(f"{where}.required must be a list of strings, got {shown(required)}")


def _sorted_copy(value: Any, where: str, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise ChatError(f"{where} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ChatError(f"{where} has the key {key!r}; keys must be strings")
        return {key: _sorted_copy(value[key], where, depth + 1) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_sorted_copy(item, where, depth + 1) for item in value]
    if value is None or isinstance(value, str):
        return value
    # Excludes NaN and infinities, which JSON lacks, and integers too long to be printed.
    if isinstance(value, int | float) and abs(value) < _LARGEST_NUMBER:
        return value
    raise ChatError(f"{where} holds {shown(value)}, which is not JSON")
