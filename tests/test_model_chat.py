"""Chat rendering: the text of each rule of the format, and the checks of conversations.

Expected prompts are written out in full from the published description of Kimi K2.5's format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kimi_ops.model.chat import load_template, media_in_order, render_chat
from kimi_ops.model.chat_parser import parse_output
from kimi_ops.model.errors import ChatError
from kimi_ops.model.tokenizer import tiny_tokenizer_files
from kimi_ops.model.tokenizer_files import own_template

USER = {"role": "user", "content": "What is 2 + 2?"}
ASKED = "<|im_user|>user<|im_middle|>What is 2 + 2?<|im_end|>"
IMAGE = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
VIDEO = "<|kimi_k25_video_placeholder|>"


def call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def body(*messages: dict[str, Any], **options: Any) -> str:
    return render_chat(list(messages), add_generation_prompt=False, **options)


def test_generation_prompts_of_both_modes() -> None:
    opening = "<|im_assistant|>assistant<|im_middle|>"
    assert render_chat([USER]) == ASKED + opening + "<think>"
    assert render_chat([USER], thinking=False) == ASKED + opening + "<think></think>"
    assert render_chat([USER], add_generation_prompt=False) == ASKED


def test_roles_names_and_no_default_system_prompt() -> None:
    assert body({"role": "system", "content": "Be brief."}, USER) == (
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|>" + ASKED
    )
    assert body({"role": "user", "name": "Ada", "content": "Hi"}) == (
        "<|im_user|>Ada<|im_middle|>Hi<|im_end|>"
    )


def test_white_space_of_content_is_kept() -> None:
    text = "\n a {{ b }} {% c %} \n\n"
    assert body({"role": "user", "content": text}) == (
        f"<|im_user|>user<|im_middle|>{text}<|im_end|>"
    )
    assert body({"role": "user", "content": ""}) == "<|im_user|>user<|im_middle|><|im_end|>"


def test_reasoning_of_finished_turns_is_left_out() -> None:
    messages = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting."},
        USER,
    )
    assert body(*messages) == (
        "<|im_user|>user<|im_middle|>Hi<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>Hello!<|im_end|>" + ASKED
    )


TOOL_LOOP = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!", "reasoning_content": "old"},
    {"role": "user", "content": "Weather in Bern and Rome?"},
    {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Two calls.",
        "tool_calls": [
            call("call_x", "get_weather", '{"city":  "Bern"}'),
            call("call_y", "get_weather", {"city": "Rome", "äther": [1, None]}),
        ],
    },
    {"role": "tool", "tool_call_id": "call_y", "content": "20 C"},
    {"role": "tool", "tool_call_id": "call_x", "name": "get_weather", "content": "12 C"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "One more.",
        "tool_calls": [call("call_x", "get_time", "{}")],
    },
    {"role": "tool", "tool_call_id": "call_x", "content": "noon"},
)


@pytest.mark.parametrize("thinking", [True, False])
def test_reasoning_survives_inside_the_tool_loop_under_way(thinking: bool) -> None:
    first, second = ("Two calls.", "One more.") if thinking else ("", "")
    assert body(*TOOL_LOOP, thinking=thinking) == (
        "<|im_user|>user<|im_middle|>Hi<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>Hello!<|im_end|>"
        "<|im_user|>user<|im_middle|>Weather in Bern and Rome?<|im_end|>"
        f"<|im_assistant|>assistant<|im_middle|><think>{first}</think>I look."
        "<|tool_calls_section_begin|>"
        "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city":  "Bern"}<|tool_call_end|>'
        "<|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>"
        '{"city": "Rome", "äther": [1, null]}<|tool_call_end|>'
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.get_weather:1\n20 C<|im_end|>"
        "<|im_system|>get_weather<|im_middle|>## Return of functions.get_weather:0\n12 C<|im_end|>"
        f"<|im_assistant|>assistant<|im_middle|><think>{second}</think>"
        "<|tool_calls_section_begin|>"
        "<|tool_call_begin|>functions.get_time:2<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.get_time:2\nnoon<|im_end|>"
    )


def test_an_answer_ends_the_loop_and_makes_all_before_it_history() -> None:
    text = body(*TOOL_LOOP, {"role": "assistant", "content": "Done.", "reasoning_content": "x"})
    assert "Two calls." not in text
    assert "One more." not in text
    assert text.endswith("<|im_assistant|>assistant<|im_middle|><think></think>Done.<|im_end|>")


def test_pictures_and_clips() -> None:
    message = {
        "role": "user",
        "content": [
            {"type": "image", "image": "a.png"},
            {"type": "text", "text": "Compare "},
            {"type": "image_url", "image_url": {"url": "b.png"}},
            {"type": "video", "video": b"bytes"},
            {"type": "video_url", "video_url": "c.mp4"},
            {"type": "text", "text": "?"},
        ],
    }
    assert body(message) == (
        f"<|im_user|>user<|im_middle|>{IMAGE}Compare {IMAGE}{VIDEO}{VIDEO}?<|im_end|>"
    )
    assert media_in_order([USER, message]) == [
        {"kind": "image", "source": "a.png"},
        {"kind": "image", "source": "b.png"},
        {"kind": "video", "source": b"bytes"},
        {"kind": "video", "source": "c.mp4"},
    ]
    assert media_in_order([{"role": "user", "content": [{"type": "image", "path": "p"}]}]) == [
        {"kind": "image", "source": "p"}
    ]


def test_tool_declarations_come_first() -> None:
    tools = [{"type": "function", "function": {"name": "now", "description": "The time."}}]
    assert body({"role": "system", "content": "S"}, USER, tools=tools) == (
        "<|im_system|>tool_declare<|im_middle|># Tools\n\n## functions\nnamespace functions {\n"
        "// The time.\ntype now = (_: {}) => any;\n}\n<|im_end|>"
        "<|im_system|>system<|im_middle|>S<|im_end|>" + ASKED
    )
    assert body(USER, tools=[]) == body(USER, tools=None) == ASKED


def test_declarations_that_typescript_cannot_say_are_compact_sorted_json() -> None:
    parameters = {"type": "object", "properties": {"v": {"oneOf": [{"type": "string"}]}}}
    function = {"name": "f", "parameters": parameters, "description": "<é> & 'x'"}
    assert body(USER, tools=[{"type": "function", "function": function}]) == (
        "<|im_system|>tool_declare<|im_middle|>"
        '[{"function":{"description":"<é> & \'x\'","name":"f","parameters":'
        '{"properties":{"v":{"oneOf":[{"type":"string"}]}},"type":"object"}},"type":"function"}]'
        "<|im_end|>" + ASKED
    )


def test_a_parsed_output_renders_back_to_itself() -> None:
    output = (
        "I need the time.</think>One moment.<|tool_calls_section_begin|>"
        "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    )
    message = parse_output(output).to_message()
    assert body(USER, message) == render_chat([USER]) + output + "<|im_end|>"


def test_messages_are_not_changed() -> None:
    before = json.dumps(TOOL_LOOP)
    body(*TOOL_LOOP)
    assert json.dumps(TOOL_LOOP) == before


def assistant(**fields: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": "", **fields}]


def with_arguments(arguments: Any) -> list[dict[str, Any]]:
    return assistant(tool_calls=[call("c", "f", arguments)])


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages must be a list of messages, got NoneType"),
        ("hi", "messages must be a list of messages, got str"),
        (USER, "messages must be a list of messages, got dict"),
        ([], "messages is empty"),
        ([USER, "hi"], r"messages\[1\] must be a mapping, got str"),
        ([{"content": "x"}], r"messages\[0\]\.role must be one of system, user, .*got None"),
        ([{"role": "robot", "content": "x"}], "got 'robot'"),
        ([{"role": ["user"], "content": "x"}], r"got \['user'\]"),
        ([{"role": "user"}], r"messages\[0\] \(user\) has no content"),
        ([USER, {"role": "assistant"}], r"messages\[1\] \(assistant\) has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content must be a string or"),
        ([{"role": "user", "content": []}], "a non-empty list of parts, got"),
        ([{"role": "user", "content": ["hi"]}], r"messages\[0\]\.content\[0\] must be a mapping"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "with type text, image, image_url"),
        ([{"role": "user", "content": [ENDLESS]}], "with type text, image, image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"text must be a string, got NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"\(image\) has no source"),
        ([{"role": "user", "content": [{"type": "video", "video": ""}]}], "has no source"),
        ([{"role": "user", "content": "x", "name": 3}], r"name must be a string, got int"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "has the key 'tool_calls'"),
        ([{"role": "user", "content": "x", "reasoning": "y"}], "has the key 'reasoning'"),
        (assistant(reasoning_content=1), "reasoning_content must be a string, got int"),
        (assistant(tool_calls={"id": 1}), r"tool_calls must be a list, got dict"),
        (assistant(tool_calls=[1]), r"messages\[1\]\.tool_calls\[0\] must be"),
        (assistant(tool_calls=[{"id": "c", "type": "code", "function": {}}]), "must be {'id'"),
        (assistant(tool_calls=[call("", "f", "{}")]), "id must be new in its message"),
        (assistant(tool_calls=[call("c", "f", "{}")] * 2), "id must be new .* got 'c'"),
        (assistant(tool_calls=[call("c", "a b", "{}")]), "name must be 1 to 128 letters"),
        (assistant(tool_calls=[call("c", None, "{}")]), "name must be 1 to 128 letters"),
        (with_arguments("{"), r"arguments must be a JSON object or its text, got '\{'"),
        (with_arguments(""), "arguments must be a JSON object or its text, got ''"),
        (with_arguments("[]"), "expected a JSON object, got list"),
        (with_arguments('{"a": NaN}'), "NaN is not JSON"),
        (with_arguments({"a": float("nan")}), "not JSON"),
        (with_arguments({"a": ENDLESS}), "not JSON"),
        (with_arguments("[" * 100_000), "nested too deeply"),
        (with_arguments('{"a": ' + "9" * 5000 + "}"), "must be a JSON object or its text"),
        (with_arguments(None), "must be a JSON object or its text, got NoneType"),
        ([{"role": "tool", "content": "x"}], r"\(there is none\), got None"),
        (
            [*TOOL_LOOP, {"role": "tool", "content": "x", "tool_call_id": "z"}],
            r"messages\[8\]\.tool_call_id must be .*'call_x', 'call_y'\), got 'z'",
        ),
    ],
)
def test_invalid_conversations(messages: Any, message: str) -> None:
    for function in (render_chat, media_in_order):
        with pytest.raises(ChatError, match=message) as error:
            function(messages)
        assert len(str(error.value)) < 500


def test_empty_fields_of_other_apis_are_ignored() -> None:
    extra = {"refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    assert body(USER, {"role": "assistant", "content": "4", **extra}).endswith("4<|im_end|>")


def test_load_template(tmp_path: Path) -> None:
    assert load_template(tmp_path) == own_template()
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "from config"}')
    assert load_template(tmp_path) == "from config"
    config.write_text('{"chat_template": [{"name": "default", "template": "named"}]}')
    assert load_template(tmp_path) == "named"
    (tmp_path / "chat_template.jinja").write_text("own {{ messages | length }} é")
    assert load_template(tmp_path) == "own {{ messages | length }} é"
    assert render_chat([USER], template=load_template(tmp_path)) == "own 1 é"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("chat_template.jinja", b"\xff", "not UTF-8 text"),
        ("chat_template.jinja", b"a" * (1 << 21), "at most 1048576 characters expected"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "must be jinja2 source text, got int"),
        ("tokenizer_config.json", b'{"chat_template": [{}]}', "source text, got list"),
    ],
)
def test_broken_template_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ChatError, match=message) as error:
        load_template(tmp_path)
    assert name in str(error.value)


def test_a_made_checkpoint_carries_this_template(tmp_path: Path) -> None:
    for name, data in tiny_tokenizer_files(600).items():
        (tmp_path / name).write_bytes(data)
    assert load_template(tmp_path) == own_template()
