"""The small tasks: splits are apart, answers follow from what is shown, samples repeat.

What a picture shows is found from its pixels (`task_pictures`), not from the code that drew it.
"""

from __future__ import annotations

import itertools
import json
import operator
import re

import numpy as np
import pytest
import task_pictures
from PIL import Image

from kimi_ops.model.chat_parser import ParsedMessage
from kimi_ops.model.errors import KimiError
from kimi_ops.tasks import SPLITS, TASKS, Sample, digits, is_correct, make_sample
from kimi_ops.tasks.photographs import PHOTOGRAPHS
from kimi_ops.tasks.sample import Clip, is_well_formed
from kimi_ops.tasks.scenes import CELL
from kimi_ops.tasks.sums import is_held_out

CALCULATE = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def media_of(sample: Sample) -> list[Image.Image | Clip]:
    parts = [p for m in sample.messages if not isinstance(m["content"], str) for p in m["content"]]
    return [part[part["type"]] for part in parts if part["type"] != "text"]


def pictures_of(sample: Sample) -> list[Image.Image]:
    """Pictures, and the frames of clips."""
    return [
        image
        for medium in media_of(sample)
        for image in (medium.frames if isinstance(medium, Clip) else (medium,))
    ]


def turns_of(sample: Sample) -> list[tuple[str, str]]:
    """Questions and answers, without the media."""
    texts = [
        content if isinstance(content, str) else content[-1]["text"]
        for content in (message["content"] for message in sample.messages)
    ]
    return list(zip(texts[::2], texts[1::2], strict=True))


def contents_of(sample: Sample) -> tuple[object, ...]:
    """Everything that two samples could differ in."""
    text = json.dumps(sample.messages, default=lambda medium: type(medium).__name__)
    pixels = [(image.size, image.tobytes()) for image in pictures_of(sample)]
    return sample.task, text, pixels, sample.thinking, sample.tools


@pytest.mark.parametrize("task", TASKS)
def test_same_arguments_same_sample(task):
    for split in SPLITS:
        for several in (False, True):
            arguments = {"seed": 3, "several": several}
            once = make_sample(task, split, 5, **arguments)
            # Others in between, so that no common state can be what makes them equal.
            others = [
                make_sample(task, split, 6, **arguments),
                make_sample(task, SPLITS[split == "train"], 5, **arguments),
                make_sample(task, split, 5, seed=4, several=several),
            ]
            assert contents_of(make_sample(task, split, 5, **arguments)) == contents_of(once)
            assert all(contents_of(other) != contents_of(once) for other in others)
            assert once.task == task
            assert once.answer["role"] == "assistant"


def test_unknown_names_are_refused():
    with pytest.raises(KimiError, match=r"unknown task 'chess', expected one of digits, scenes"):
        make_sample("chess", "train", 0)
    with pytest.raises(KimiError, match=r"unknown split 'test', expected one of train, held-out"):
        make_sample("digits", "test", 0)


@pytest.mark.parametrize("task", TASKS)
def test_one_question_unless_several_are_wanted(task):
    asked = [
        sum(m["role"] == "user" for m in make_sample(task, "held-out", number).messages)
        for number in range(20)
    ]
    assert set(asked) == {1}


def test_digits_of_training_are_others_than_those_held_out(monkeypatch):
    drawn: dict[str, set[int]] = {split: set() for split in SPLITS}
    original = digits._draw

    def draw(rng, split):
        place, label = original(rng, split)
        drawn[split].add(place)
        return place, label

    monkeypatch.setattr(digits, "_draw", draw)
    for number in range(1500):
        make_sample("digits", "held-out", number)
        make_sample("digits", "train", number, several=True)
    assert len(drawn["held-out"]) > 340
    assert drawn["held-out"] <= set(range(digits.HELD_OUT))
    assert len(drawn["train"]) > 1000
    assert not drawn["train"] & set(range(digits.HELD_OUT))
    images, _ = digits._digits()
    known = {image.tobytes() for image in images[digits.HELD_OUT :]}
    assert not any(image.tobytes() in known for image in images[: digits.HELD_OUT])


def test_a_digit_is_the_one_that_it_is_called():
    images, labels = digits._digits()
    assert images.shape == (1797, 8, 8)
    for number in range(100):
        sample = make_sample("digits", "held-out", number)
        (picture,) = pictures_of(sample)
        small = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX), float)
        distance = np.square(images[: digits.HELD_OUT] - small).sum((1, 2))
        assert str(labels[int(distance.argmin())]) == sample.answer["content"]


def _pairs(task: str, split: str, several: bool, samples: int) -> set[tuple[int, int]]:
    found = set()
    for number in range(samples):
        for question, answer in turns_of(make_sample(task, split, number, several=several)):
            a, b = map(int, re.fullmatch(r"What is (\d\d) \+ (\d\d)\?", question).groups())
            assert answer == str(a + b)
            found.add((a, b))
    return found


def test_sums_of_training_are_others_than_those_held_out():
    names = ("sums", "sums, instant")
    train = set.union(*(_pairs(name, "train", True, 600) for name in names))
    asked = set.union(*(_pairs(name, "held-out", False, 400) for name in names))
    assert not train & asked
    assert not train & {(b, a) for a, b in asked}
    every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in every)
    assert 0.08 < sum(is_held_out(a, b) for a, b in every) / len(every) < 0.12


def test_the_steps_of_a_sum_are_right():
    for number in range(200):
        sample = make_sample("sums", "train", number)
        assert sample.thinking
        ((question, answer),) = turns_of(sample)
        a, b = map(int, re.findall(r"\d+", question))
        text = sample.answer["reasoning_content"]
        steps = re.fullmatch(r"ones (\S+)=(\d+), tens (\S+)=(\d+), so (\d+)\.", text).groups()
        ones, tens = ([int(n) for n in steps[i].split("+")] for i in (0, 2))
        assert (ones, tens[:2]) == ([a % 10, b % 10], [a // 10, b // 10])
        assert sum(ones) == int(steps[1])
        assert tens[2:] == [1] * (sum(ones) > 9)
        assert sum(tens) == int(steps[3])
        assert steps[4] == answer == str(a + b)


def _rank(thing: task_pictures.Seen, things: list[task_pictures.Seen]) -> tuple[int, int]:
    """Row and column of its cell, counted from the first: cells are further apart than shapes can
    be out of line."""
    y = min(other.top + other.bottom for other in things)
    x = min(other.left + other.right for other in things)
    return (
        round((thing.top + thing.bottom - y) / 2 / CELL),
        round((thing.left + thing.right - x) / 2 / CELL),
    )


def _thirds(thing: task_pictures.Seen, size: tuple[int, int]) -> set[str]:
    """Row and column of the third of the picture with its centre; two where an edge is near it."""
    width, height = size
    places = []
    for start, stop, side in (
        (thing.top, thing.bottom, height),
        (thing.left, thing.right, width),
    ):
        middles = ((start + stop) / 2 + off for off in (-1, 0, 1))
        places.append({sum(middle >= side * edge / 3 for edge in range(3)) for middle in middles})
    return {f"{row},{column}" for row, column in itertools.product(*places)}


def _answer_of(
    question: str, things: list[task_pictures.Seen], size: tuple[int, int]
) -> tuple[str, str | set[str]]:
    """The kind of a question, and the one answer that the picture has (places: within a pixel)."""
    if question == "How many shapes are there?":
        return "number", str(len(things))
    if question == "What is in the picture?":
        ordered = sorted(things, key=lambda thing: _rank(thing, things))
        return "all", ", ".join(map(str, ordered))
    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        (thing,) = [thing for thing in things if thing.shape == match[1]]
        return "colour", thing.colour
    if match := re.fullmatch(r"Which shape is (\w+)\?", question):
        (thing,) = [thing for thing in things if thing.colour == match[1]]
        return "shape", thing.shape
    if match := re.fullmatch(r"Where is the (\w+ \w+)\?", question):
        (thing,) = [thing for thing in things if str(thing) == match[1]]
        return "where", _thirds(thing, size)
    if match := re.fullmatch(r"Is there a (\w+ \w+)\?", question):
        return "there", "yes" if match[1] in map(str, things) else "no"
    match = re.fullmatch(r"What is at the (left|right|top|bottom)\?", question)
    side, end = match[1], {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    sign = 1 if side in ("left", "top") else -1
    first, second = sorted(things, key=lambda thing: sign * getattr(thing, side))[:2]
    # Beyond doubt: it ends before any other begins.
    assert sign * getattr(first, end[side]) < sign * getattr(second, side)
    return side, str(first)


def test_every_answer_about_a_scene_is_what_the_picture_shows():
    kinds: dict[str, set[str]] = {}
    counts, sizes = set(), set()
    for number in range(250):
        sample = make_sample("scenes", SPLITS[number % 2], number, several=True)
        (picture,) = media_of(sample)
        things = task_pictures.seen(picture)
        for question, answer in turns_of(sample):
            kind, expected = _answer_of(question, things, picture.size)
            assert answer in (expected if kind == "where" else (expected,)), (number, question)
            kinds.setdefault(kind, set()).add(answer)
        counts.add(len(things))
        sizes.add(picture.size)
    edges = {"left", "right", "top", "bottom"}
    assert set(kinds) == {"number", "all", "colour", "shape", "where", "there"} | edges
    assert kinds["there"] == {"yes", "no"}
    assert kinds["where"] == {f"{row},{column}" for row in (1, 2, 3) for column in (1, 2, 3)}
    assert counts == {1, 2, 3, 4}
    assert len(sizes) > 200
    assert max(w / h for w, h in sizes) > 2 > 0.5 > min(w / h for w, h in sizes)


DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows grow down


def test_clips_move_as_they_are_said_to():
    frames, rests, words = set(), 0, set()
    for number in range(120):
        sample = make_sample("clips", SPLITS[number % 2], number, several=True)
        (clip,) = media_of(sample)
        (question, word), (second, colour) = turns_of(sample)
        (shape,) = re.fullmatch(r"Which way does the (\w+) move\?", question).groups()
        assert second == f"What colour is the {shape}?"
        masks = {
            name: [task_pictures.mask_of(frame, name) for frame in clip.frames]
            for name in task_pictures.COLOURS
        }
        moving = [n for n, m in masks.items() if any((m[0] != later).any() for later in m[1:])]
        assert moving == [colour]
        path = np.array([np.argwhere(mask).mean(0) for mask in masks[colour]])
        steps, direction = np.diff(path, axis=0), np.array(DIRECTIONS[word])
        assert (steps @ direction > 1).all()
        assert np.abs(steps @ direction[::-1]).max() < 0.5
        for frame in clip.frames:
            things = task_pictures.seen(frame)  # nothing hides anything
            assert [t.shape for t in things if t.colour == colour] == [shape]
            assert all(t.shape != shape for t in things if t.colour != colour)
        rests += len(things) - 1
        frames.add(len(clip.frames))
        words.add(word)
    assert frames == set(range(5, 9))
    assert words == set(DIRECTIONS)
    assert 15 < rests < 60


def test_clips_are_followed_aloud_from_third_to_third():
    places = set()
    for number in range(60):
        sample = make_sample("clips, thinking", SPLITS[number % 2], number)
        assert sample.thinking
        (clip,) = media_of(sample)
        ((_, word),) = turns_of(sample)
        pattern = r"from (\d),(\d) to (\d),(\d)\."
        said = [int(n) for n in re.fullmatch(pattern, sample.answer["reasoning_content"]).groups()]
        first, last = (
            {thing.colour: thing for thing in task_pictures.seen(frame)}
            for frame in (clip.frames[0], clip.frames[-1])
        )
        (moved,) = [colour for colour in first if first[colour] != last[colour]]
        for place, thing in ((said[:2], first[moved]), (said[2:], last[moved])):
            assert "{},{}".format(*place) in _thirds(thing, clip.frames[0].size)
        direction = (said[2] - said[0], said[3] - said[1])
        assert np.dot(direction, DIRECTIONS[word]) >= 0
        places.add(tuple(said))
    assert len(places) > 10


def test_photographs_are_crops_of_the_named_one():
    import skimage.data

    folder = skimage.data.__path__[0]
    known = {}
    for file, name in PHOTOGRAPHS.items():
        image = Image.open(f"{folder}/{file}").convert("RGB")
        known[name] = np.asarray(image, float).mean((0, 1))
    right, names, sizes = 0, set(), set()
    for number in range(150):
        sample = make_sample("photographs", "held-out", number)
        (picture,) = pictures_of(sample)
        name = sample.answer["content"]
        mean = np.asarray(picture, float).mean((0, 1))
        nearest = min(known, key=lambda other: float(np.square(known[other] - mean).sum()))
        right += nearest == name
        names.add(name)
        sizes.add(picture.size)
    assert names == set(PHOTOGRAPHS.values())
    assert len(sizes) > 100
    assert right > 75  # the mean colour alone finds most, and of ten by chance 15


@pytest.mark.parametrize("split", SPLITS)
def test_calls_and_results_of_the_calculator_have_the_expression_s_value(split):
    signs = set()
    for number in range(200):
        call = make_sample("tool calls", split, number)
        result = make_sample("tool results", split, number)
        for sample in (call, result):
            question = sample.messages[0]["content"]
            a, sign, b = re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", question).groups()
            ((function,),) = [
                [one["function"] for one in message["tool_calls"]]
                for message in sample.messages
                if message.get("tool_calls")
            ]
            assert function["name"] == sample.tools[0]["function"]["name"] == "calculator"
            assert json.loads(function["arguments"]) == {"expression": f"{a} {sign} {b}"}
            signs.add(sign)
        _, _, returned, answer = result.messages
        assert returned["content"] == answer["content"] == str(CALCULATE[sign](int(a), int(b)))
    assert signs == set(CALCULATE)


def _message(content: str = "", *arguments: object, **fields: object) -> ParsedMessage:
    calls = [{"function": {"name": "calculator", "arguments": json.dumps(a)}} for a in arguments]
    reason = "tool_calls" if calls else "stop"
    return ParsedMessage(content=content, tool_calls=calls, **{"finish_reason": reason, **fields})


def test_an_answer_is_right_if_it_is_this_one_and_ended():
    sample = make_sample("sums, instant", "held-out", 0)
    right = sample.answer["content"]
    assert is_correct(sample, _message(right))
    assert is_correct(sample, _message(f" {right}\n", reasoning_content="whatever"))
    assert not is_correct(sample, _message(f"{right}0"))
    assert not is_correct(sample, _message(right, finish_reason="length"))
    assert not is_correct(sample, _message(right, errors=["text between tool calls"]))
    assert not is_correct(sample, _message(right, {"expression": "1 + 2"}))


def test_a_call_is_right_by_its_values_and_well_formed_by_its_form():
    sample = make_sample("tool calls", "held-out", 0)
    expression = json.loads(sample.answer["tool_calls"][0]["function"]["arguments"])
    wrong = {"expression": "1 + 1 + 1"}
    judged = [
        (_message("", expression), True, True),
        (_message("", wrong), False, True),
        (_message("so", expression), False, True),
        (_message("", expression, wrong), False, True),
        (_message("3"), False, False),
        (_message("", {}), False, False),
        (_message("", {"expression": 3}), False, False),
        (_message("", {**expression, "digits": "3"}), False, False),
        (_message("", expression, finish_reason="length"), False, False),
        (_message("", expression, errors=["text between tool calls"]), False, False),
    ]
    for message, right, well_formed in judged:
        assert is_correct(sample, message) is right, message
        assert is_well_formed(sample, message) is well_formed, message
    other = _message("", expression)
    other.tool_calls[0]["function"]["name"] = "look"
    assert not is_correct(sample, other)
    assert not is_well_formed(sample, other)
