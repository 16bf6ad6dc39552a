"""The output parser: each part of the format, any cutting of the stream, and broken output.

Two properties hold for every text: the message does not depend on how the text was cut, and the raw
texts of all events joined are the text (nothing is lost).
"""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_ops.model.chat_parser import ChatParser, Event, ParsedMessage, parse_output
from kimi_ops.model.errors import ChatError

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGS, CLOSE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


def call(call_id: str = "functions.f:0", arguments: str = "{}") -> str:
    return f"{CALL}{call_id}{ARGS}{arguments}{CLOSE}"


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, object]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parse_pieces(
    pieces: list[str], thinking: bool, reason: str = "stop"
) -> tuple[list[Event], ParsedMessage]:
    parser = ChatParser(thinking=thinking)
    events = [event for piece in pieces for event in parser.feed(piece)]
    events += parser.finish(reason)  # type: ignore[arg-type]
    return events, parser.message


def test_thinking_output_starts_inside_the_reasoning() -> None:
    message = parse_output("Let me see.</think>It is 4.", thinking=True)
    assert message == ParsedMessage(reasoning_content="Let me see.", content="It is 4.")


def test_instant_output_is_content() -> None:
    assert parse_output("It is 4.", thinking=False) == ParsedMessage(content="It is 4.")


def test_tool_calls_after_content() -> None:
    text = (
        "Two cities.</think>I look both up."
        + BEGIN
        + call("functions.get_weather:0", '{"city": "Bern"}')
        + call("functions.get_weather:1", '{"city": "北京"}')
        + END
    )
    message = parse_output(text)
    assert message.content == "I look both up."
    assert message.tool_calls == [
        tool_call("functions.get_weather:0", "get_weather", '{"city": "Bern"}'),
        tool_call("functions.get_weather:1", "get_weather", '{"city": "北京"}'),
    ]
    assert message.errors == []
    assert message.finish_reason == "tool_calls"
    assert message.to_message() == {
        "role": "assistant",
        "content": "I look both up.",
        "reasoning_content": "Two cities.",
        "tool_calls": message.tool_calls,
    }


def test_white_space_around_calls_ids_and_arguments_is_allowed() -> None:
    text = f"</think>{BEGIN}\n{call(' functions.a.b-c:12 ', ' {} ')}\n{END}"
    message = parse_output(text)
    assert message.tool_calls == [tool_call("functions.a.b-c:12", "a.b-c", "{}")]
    assert message.errors == []


def test_a_repeated_opening_tag_is_markup() -> None:
    for thinking in (True, False):
        message = parse_output("<think>why</think>so", thinking=thinking)
        assert (message.reasoning_content, message.content) == ("why", "so")
    later = parse_output("a<think>b</think>c", thinking=False)
    assert later == ParsedMessage(content="a<think>b</think>c")


def test_one_trailing_stop_token_is_markup_and_any_other_is_text() -> None:
    assert parse_output("yes<|im_end|>", thinking=False).content == "yes"
    assert parse_output("yes[EOS]", thinking=False).content == "yes"
    assert parse_output("a[EOS]b<|im_end|>", thinking=False).content == "a[EOS]b"
    message = parse_output(f"</think>{BEGIN}{call()}{END}<|im_end|>")
    assert (len(message.tool_calls), message.errors, message.content) == (1, [], "")


@pytest.mark.parametrize("reason", ["length", "interrupted"])
def test_reasoning_cut_off(reason: str) -> None:
    _, message = parse_pieces(["I wonder </thi"], True, reason)
    assert message.reasoning_content == "I wonder </thi"
    assert message.errors == ["the output ended before </think>"]
    assert message.finish_reason == reason


@pytest.mark.parametrize(
    ("section", "malformed", "error"),
    [
        (call("get_weather:0"), call("get_weather:0"), "must be functions.NAME:INDEX"),
        (call("functions.a b:0"), call("functions.a b:0"), "must be functions.NAME:INDEX"),
        (call("functions.f"), call("functions.f"), "must be functions.NAME:INDEX"),
        (call(arguments="{"), call(arguments="{"), "are not a JSON object"),
        (call(arguments=""), call(arguments=""), "are not a JSON object"),
        (call(arguments="[1]"), call(arguments="[1]"), "got list"),
        (call(arguments='{"a": NaN}'), call(arguments='{"a": NaN}'), "NaN is not JSON"),
        (call(arguments="[" * 20_000), call(arguments="[" * 20_000), "nested too deeply"),
        (f"{CALL}functions.f:0{CLOSE}", f"{CALL}functions.f:0{CLOSE}", f"without {ARGS}"),
        ("and also", "and also", "text between tool calls"),
        (f"{CALL}functions.f:0{ARGS}{{", f"{CALL}functions.f:0{ARGS}{{", f"without {CLOSE}"),
    ],
)
def test_malformed_calls_are_kept_and_reported(section: str, malformed: str, error: str) -> None:
    good = call("functions.ok:7", '{"x": 1}')
    message = parse_output(f"</think>{BEGIN}{good}{section}{END}done")
    assert message.tool_calls == [tool_call("functions.ok:7", "ok", '{"x": 1}')]
    assert message.malformed == [malformed]
    assert len(message.errors) == 1
    assert error in message.errors[0]
    assert message.content == "done"


def test_an_unclosed_call_does_not_swallow_the_next_one() -> None:
    unclosed = f'{CALL}functions.a:0{ARGS}{{"x": '
    message = parse_output(f"</think>{BEGIN}{unclosed}{call('functions.b:1')}{END}")
    assert message.malformed == [unclosed]
    assert [c["id"] for c in message.tool_calls] == ["functions.b:1"]


def test_arguments_may_quote_the_tags() -> None:
    arguments = json.dumps({"text": f"{CALL}{END}</think>{BEGIN}"})
    message = parse_output(f"</think>{BEGIN}{call(arguments=arguments)}{END}")
    assert message.tool_calls == [tool_call("functions.f:0", "f", arguments)]
    assert message.errors == []


def test_section_never_closed() -> None:
    message = parse_output(f"</think>{BEGIN}{call()}")
    assert len(message.tool_calls) == 1
    assert message.errors == [f"the output ended before {END}"]


def test_tool_calls_inside_the_reasoning_are_found_and_reported() -> None:
    message = parse_output(f"I need it{BEGIN}{call()}{END}")
    assert message.reasoning_content == "I need it"
    assert len(message.tool_calls) == 1
    assert message.errors == ["tool calls began before </think>"]


def test_text_is_passed_on_as_soon_as_it_cannot_be_a_tag() -> None:
    parser = ChatParser(thinking=True)
    assert parser.feed("Hello <") == [Event("reasoning", "Hello ")]
    assert parser.feed("b> </thin") == [Event("reasoning", "<b> ")]
    assert parser.feed("k>Yes") == [Event("markup", "</think>"), Event("content", "Yes")]
    assert parser.finish() == []


def test_empty_output() -> None:
    assert parse_output("", thinking=False) == ParsedMessage()
    assert parse_output("").errors == ["the output ended before </think>"]


def test_misuse_is_an_error() -> None:
    parser = ChatParser(thinking=True)
    with pytest.raises(TypeError, match="text must be str, got NoneType"):
        parser.feed(None)  # type: ignore[arg-type]
    with pytest.raises(ChatError, match="reason must be stop, length or interrupted, got 'x'"):
        parser.finish("x")  # type: ignore[arg-type]
    parser.finish()
    with pytest.raises(ChatError, match="already called"):
        parser.finish()
    with pytest.raises(ChatError, match="feed after finish"):
        parser.feed("a")


FRAGMENTS = [
    *("<think>", "</think>", BEGIN, END, CALL, ARGS, CLOSE, "<|im_end|>", "[EOS]", "<|", "</", "["),
    *("functions.f:0", "functions.", '{"a": 1}', "{}", "{", " ", "\n", "text", "思考", "<", ">"),
    *(call(), call("functions.g:1", '{"q": "</think>"}'), "</think>" + BEGIN, call() + END),
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=14),
    thinking=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_cutting_gives_the_same_message_and_loses_nothing(
    fragments: list[str], thinking: bool, seed: int
) -> None:
    text = "".join(fragments)
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
    cuttings = [
        [text],
        list(text),
        [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)],
    ]
    whole = parse_output(text, thinking)
    for pieces in cuttings:
        events, message = parse_pieces(pieces, thinking)
        assert message == whole
        assert "".join(event.raw for event in events) == text
        for kind, joined in (
            ("reasoning", message.reasoning_content),
            ("content", message.content),
        ):
            assert "".join(event.raw for event in events if event.kind == kind) == joined


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    reasoning=st.text(alphabet="ab 思\n.,<>|", max_size=30),
    content=st.text(alphabet="ab 思\n.,<>|", max_size=30),
    arguments=st.lists(
        st.dictionaries(st.text(max_size=5), st.text(max_size=10) | st.integers(), max_size=3),
        max_size=3,
    ),
)
def test_well_formed_output_comes_back_exactly(
    reasoning: str, content: str, arguments: list[dict[str, object]]
) -> None:
    calls = [(f"functions.tool:{i}", json.dumps(a)) for i, a in enumerate(arguments)]
    section = BEGIN + "".join(call(*c) for c in calls) + END if calls else ""
    message = parse_output(f"{reasoning}</think>{content}{section}")
    assert message == ParsedMessage(
        reasoning_content=reasoning,
        content=content,
        tool_calls=[tool_call(i, "tool", a) for i, a in calls],
        finish_reason="tool_calls" if calls else "stop",
    )


def test_long_arguments_fed_in_small_pieces() -> None:
    arguments = json.dumps({"text": "x" * 200_000})
    text = f"</think>{BEGIN}{call(arguments=arguments)}{END}"
    pieces = [text[i : i + 16] for i in range(0, len(text), 16)]
    _, message = parse_pieces(pieces, True)
    assert message.tool_calls == [tool_call("functions.f:0", "f", arguments)]
