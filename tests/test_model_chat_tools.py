"""Tool declarations: the TypeScript text of each schema keyword, the JSON fall-back, the checks.

Expected texts are written out from the published description of the declaration format.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from kimi_ops.model.chat_tools import normalize_tools, parse_tools_json, tools_to_typescript
from kimi_ops.model.errors import ChatError


def tool(parameters: Any = None, **function: Any) -> dict[str, Any]:
    declared = {"name": "f", **function}
    if parameters is not None:
        declared["parameters"] = parameters
    return {"type": "function", "function": declared}


def typescript(*tools: dict[str, Any]) -> str | None:
    return tools_to_typescript(normalize_tools(list(tools)) or [])


def argument(properties: dict[str, Any], **schema: Any) -> str | None:
    """The argument type of a function with these parameters."""
    text = typescript(tool({"type": "object", "properties": properties, **schema}))
    if text is None:
        return None
    head = "# Tools\n\n## functions\nnamespace functions {\ntype f = (_: "
    tail = ") => any;\n}\n"
    assert text.startswith(head)
    assert text.endswith(tail)
    return text[len(head) : -len(tail)]


def test_a_whole_declaration() -> None:
    weather = tool(
        {
            "type": "object",
            "properties": {
                "units": {"type": "string", "enum": ["c", "f"], "default": "c"},
                "city": {"type": "string", "description": "City name", "minLength": 1},
                "area": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "area"],
        },
        name="get_weather",
        description="Read the weather.\n\nSlow.",
    )
    assert typescript(weather, tool(name="now")) == (
        "# Tools\n\n## functions\nnamespace functions {\n"
        "// Read the weather.\n\n// Slow.\n"
        "type get_weather = (_: {\n"
        "  area: string,\n"
        "  // City name\n"
        "  // minLength: 1\n"
        "  city: string,\n"
        "  // maximum: 7, minimum: 1\n"
        "  days?: number,\n"
        '  // Default: "c"\n'
        '  units?: "c" | "f"\n'
        "}) => any;\n"
        "type now = (_: {}) => any;\n"
        "}\n"
    )


@pytest.mark.parametrize(
    ("schema", "written"),
    [
        ({"type": "string"}, "string"),
        ({"type": "integer"}, "number"),
        ({"type": "number"}, "number"),
        ({"type": "boolean"}, "boolean"),
        ({"type": "null"}, "null"),
        ({}, "any"),
        (True, "any"),
        ({"type": ["string", "null"], "default": None}, "string | null"),
        ({"enum": ["a", 1, 'q"'], "type": "string"}, '"a" | 1 | "q\\""'),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "string | number"),
        ({"type": "array"}, "Array<any>"),
        ({"type": "array", "items": {"type": "string"}}, "Array<string>"),
        ({"type": "array", "items": {"type": "array"}}, "Array<Array<any>>"),
        ({"type": "object"}, "{}"),
        ({"type": "object", "properties": {}}, "{}"),
        ({"type": "object", "properties": {"b": {"type": "null"}}}, "{\n    b?: null\n  }"),
        ({"type": "object", "additionalProperties": False}, "{\n    [k: string]: never\n  }"),
        ({"type": "object", "additionalProperties": True}, "{\n    [k: string]: any\n  }"),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            "{\n    [k: string]: number\n  }",
        ),
        (
            {"type": "array", "items": {"type": "string", "description": "One", "pattern": "a+"}},
            "Array<\n    // One\n    // pattern: a+\n    string\n  >",
        ),
    ],
)
def test_types(schema: Any, written: str) -> None:
    assert argument({"x": schema}, required=["x"]) == "{\n  x: " + written + "\n}"


@pytest.mark.parametrize(
    ("schema", "comments"),
    [
        ({"type": "number", "minimum": 0.5}, "  // minimum: 0.5\n"),
        ({"type": "array", "minItems": 1, "maxItems": 2}, "  // maxItems: 2, minItems: 1\n"),
        ({"type": "string", "maxLength": 3, "description": "D"}, "  // D\n  // maxLength: 3\n"),
        ({"type": "boolean", "default": True}, "  // Default: True\n"),
        ({"type": "integer", "default": 0}, "  // Default: 0\n"),
        ({"type": "array", "default": ["é"]}, '  // Default: ["é"]\n'),
    ],
)
def test_comments(schema: dict[str, Any], comments: str) -> None:
    text = argument({"x": schema})
    assert text is not None
    assert text.startswith("{\n" + comments + "  x?: ")


def test_definitions_become_interfaces() -> None:
    parameters = {
        "type": "object",
        "$defs": {
            "Point": {
                "type": "object",
                "description": "A place.",
                "properties": {"x": {"type": "number"}},
                "required": ["x"],
            },
            "Axis": {"enum": ["x", "y"]},
        },
        "properties": {"at": {"$ref": "#/$defs/Point"}, "axis": {"$ref": "#/$defs/Axis"}},
        "required": ["at"],
    }
    assert typescript(tool(parameters, description="Go.")) == (
        "# Tools\n\n## functions\nnamespace functions {\n"
        'interface Axis "x" | "y"\n'
        "// A place.\n"
        "interface Point {\n  x: number\n}\n"
        "// Go.\n"
        "type f = (_: {\n  at: Point,\n  axis?: Axis\n}) => any;\n"
        "}\n"
    )


def test_parameters_that_refer_to_themselves() -> None:
    text = typescript(tool({"type": "object", "properties": {"child": {"$ref": "#"}}}))
    assert text == (
        "# Tools\n\n## functions\nnamespace functions {\n"
        "interface parameters {\n  child?: parameters\n}\n"
        "type f = (_: parameters) => any;\n"
        "}\n"
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "string"}]},
        {"$ref": "#/$defs/Missing"},
        {"$ref": 5},
        {"title": "nothing known"},
        {"type": "integer32"},
        {"type": 5},
        {"anyOf": []},
        {"enum": "ab"},
        {"type": "string", "description": 5},
        {"type": "object", "properties": []},
        {"type": "object", "properties": {"a": "string"}},
        {"type": "array", "items": [{"type": "string"}]},
    ],
)
def test_schemas_without_a_typescript_form(schema: dict[str, Any]) -> None:
    assert argument({"x": schema}) is None


def test_normalized_tools_are_sorted_copies() -> None:
    tools = [tool({"type": "object", "properties": {"b": {}, "a": {}}}, strict=True)]
    before = json.dumps(tools)
    normal = normalize_tools(tools)
    assert normal == tools
    assert json.dumps(normal) == json.dumps(tools, sort_keys=True)
    assert json.dumps(tools) == before
    assert normalize_tools(None) is None
    assert normalize_tools([]) is None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return {"type": "object", "properties": {"x": schema}}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "tools must be a list of tools, got dict"),
        ("[]", "tools must be a list of tools, got str"),
        ([None], r"tools\[0\] must be {'type': 'function'"),
        ([{"type": "web_search"}], r"tools\[0\] must be {'type': 'function'"),
        ([{"function": {"name": "f"}}], r"tools\[0\] must be {'type': 'function'"),
        ([tool(name="a b")], r"tools\[0\]\.function\.name must be 1 to 128 letters"),
        ([tool(name="a\n")], r"name must be 1 to 128 letters"),
        ([tool(name="a" * 129)], r"name must be 1 to 128 letters"),
        ([tool(), tool()], r"tools\[1\]\.function\.name 'f' was already declared"),
        ([tool(description=5)], "description must be a string"),
        ([tool([])], "parameters must be a JSON schema object, got list"),
        ([tool({"type": "string"})], "parameters.type must be 'object', got 'string'"),
        ([tool({"properties": []})], "properties must be a mapping of names to schemas"),
        ([tool({"required": "x"})], "required must be a list of strings"),
        ([tool({"required": [[]]})], "required must be a list of strings"),
        ([tool({"x": float("nan")})], "holds nan, which is not JSON"),
        ([tool({"x": 10**4999})], "which is not JSON"),
        ([tool({"x": {1, 2}})], "which is not JSON"),
        ([tool({1: 2})], "has the key 1; keys must be strings"),
        ([tool(nested(100))], "nested more than 64 levels deep"),
        ([tool(nested(100_000))], "nested more than 64 levels deep"),
    ],
)
def test_invalid_tools(tools: Any, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        normalize_tools(tools)


def test_tools_from_json() -> None:
    text = '[{"type": "function", "function": {"name": "é_no"}}]'
    with pytest.raises(ChatError, match=r"t\.json\[0\]\.function\.name must be"):
        parse_tools_json(text, "t.json")
    assert parse_tools_json(text.replace("é", "e").encode(), "t.json") == [tool(name="e_no")]
    assert parse_tools_json("[]") == []


@pytest.mark.parametrize("text", ["", "{", b"\xff\xff", "[" * 100_000, "[NaN]", "5", "null"])
def test_tools_from_broken_json(text: str | bytes) -> None:
    with pytest.raises(ChatError, match=r"^t\.json"):
        parse_tools_json(text, "t.json")
