"""Samples as tokens and targets, against the chat template's own rendering of them."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from kimi_ops.model.chat import encode_chat
from kimi_ops.model.chat_parser import parse_output
from kimi_ops.model.conversation import PromptBuilder
from kimi_ops.model.make_checkpoint import make_checkpoint, tiny_config
from kimi_ops.model.media import expand_placeholders
from kimi_ops.model.random_files import random_checkpoint_files
from kimi_ops.tasks import SPLITS, TASKS, Sample, is_correct, make_sample
from kimi_ops.train.examples import IGNORED, Encoder, Example, Lessons, pack

SAMPLES = 25


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    directory: Path = tmp_path_factory.mktemp("examples") / "tiny"
    config = tiny_config()
    make_checkpoint(directory, config, tokenizer_files=random_checkpoint_files(config))
    return PromptBuilder(directory)


@pytest.fixture(scope="module")
def encoder(builder: PromptBuilder) -> Encoder:
    """One for all tests, with all that it remembers of earlier samples."""
    return Encoder(builder)


def samples_of(task: str) -> list[Sample]:
    return [
        make_sample(task, split, number, several=several)
        for split in SPLITS
        for several in (False, True)
        for number in range(SAMPLES)
    ]


def tokens_of(example: Example) -> list[int]:
    return [*example.ids.tolist(), int(example.targets[-1])]


def body_of(message: dict) -> str:
    """What the template writes of an assistant's message after its thoughts."""
    calls = "".join(
        f"<|tool_call_begin|>{call['id']}<|tool_call_argument_begin|>"
        f"{call['function']['arguments']}<|tool_call_end|>"
        for call in message.get("tool_calls", ())
    )
    section = f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>" if calls else ""
    return f"{message['content']}{section}<|im_end|>"


@pytest.mark.parametrize("task", TASKS)
def test_ids_are_the_prompt_and_then_the_answer(builder, encoder, task):
    """In instant mode that is the template's rendering of the whole; in thinking mode the template
    writes no reasoning of a finished turn, so that is put together here."""
    for sample in samples_of(task):
        tokens, prompt = tokens_of(encoder(sample)), encoder.prompt(sample)
        assert tokens[: len(prompt.ids)] == prompt.ids
        rest = body_of(sample.answer)
        if sample.thinking:
            rest = f"{sample.answer['reasoning_content']}</think>{rest}"
        else:
            whole = encode_chat(
                builder.tokenizer,
                sample.messages,
                tools=sample.tools,
                thinking=False,
                add_generation_prompt=False,
                template=builder.template,
                expand=partial(expand_placeholders, media=prompt.media.media),
            )
            assert tokens == whole
        assert builder.tokenizer.decode(tokens[len(prompt.ids) :]) == rest


@pytest.mark.parametrize("task", ["scenes", "sums", "tool results"])
def test_what_is_remembered_changes_nothing(builder, encoder, task):
    for sample in samples_of(task)[::5]:
        fresh, used = Encoder(builder)(sample), encoder(sample)
        assert torch.equal(fresh.ids, used.ids)
        assert torch.equal(fresh.targets, used.targets)


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_the_assistant_s_words_and_nothing_else(builder, encoder, task):
    for sample in samples_of(task):
        example = encoder(sample)
        ids, targets = example.ids.tolist(), example.targets.tolist()
        assert len(ids) == len(targets)
        assert all(t in (IGNORED, n) for t, n in zip(targets, ids[1:], strict=False))
        runs = itertools.groupby(targets, key=lambda target: target != IGNORED)
        written = [builder.tokenizer.decode(list(run)) for is_target, run in runs if is_target]
        if sample.thinking:
            thoughts = sample.answer["reasoning_content"]
            assert written == [f"{thoughts}</think>{body_of(sample.answer)}"]
        else:
            answers = [m for m in sample.messages if m["role"] == "assistant"]
            assert written == [body_of(message) for message in answers]


@pytest.mark.parametrize("task", TASKS)
def test_what_is_learned_is_judged_right(builder, encoder, task):
    for sample in samples_of(task):
        prompt = encoder.prompt(sample)
        *tokens, last = tokens_of(encoder(sample))[len(prompt.ids) :]
        assert last in builder.tokenizer.stop_ids
        message = parse_output(builder.tokenizer.decode(tokens), sample.thinking)
        assert is_correct(sample, message)


@pytest.mark.parametrize("task", ["digits", "scenes", "photographs", "clips"])
def test_there_are_as_many_placeholders_as_the_grids_say(builder, encoder, task):
    pad, merge = builder.tokenizer.media_pad_id, builder.media.config.merge_kernel_size
    grids = set()
    for sample in samples_of(task):
        example = encoder(sample)
        grid = example.media.grid_thws
        assert len(grid) >= 1
        pads = int((example.ids == pad).sum())
        assert pads == int((grid[:, 1] * grid[:, 2]).sum()) // merge**2
        assert len(example.media.pixel_values) == int(grid.prod(1).sum())
        assert not (example.targets == pad).any()
        prompt = encoder.prompt(sample)
        assert torch.equal(prompt.media.pixel_values, example.media.pixel_values)
        assert torch.equal(prompt.media.grid_thws, grid)
        grids |= set(map(tuple, grid.tolist()))
    assert len(grids) >= 4  # pictures of many sizes
    assert (max(t for t, _, _ in grids) > 1) == (task == "clips")


def test_a_batch_is_its_examples_one_after_the_other(encoder):
    examples = [encoder(make_sample(task, "train", 0, several=True)) for task in TASKS]
    batch = pack(examples)
    starts = batch.cu_seqlens.tolist()
    assert starts[0] == 0
    for example, start, stop in zip(examples, starts, starts[1:], strict=False):
        assert torch.equal(batch.ids[start:stop], example.ids)
        assert torch.equal(batch.targets[start:stop], example.targets)
    assert starts[-1] == len(batch.ids) == len(batch.targets)
    assert len(batch.pixel_values) == int(batch.grid_thws.prod(1).sum())


def test_lessons_repeat_by_number_and_use_no_sample_twice(builder):
    mixture = {"sums, instant": 3, "scenes": 2}
    lessons = Lessons(builder, mixture, 4, seed=1)
    batches = [lessons[number] for number in range(len(lessons))]
    again = Lessons(builder, mixture, 4, seed=1)[2]
    assert torch.equal(again.ids, batches[2].ids)
    assert torch.equal(again.pixel_values, batches[2].pixel_values)
    conversations = [
        tuple(batch.ids[start:stop].tolist())
        for batch in batches
        for start, stop in itertools.pairwise(batch.cu_seqlens.tolist())
    ]
    assert len(conversations) == len(set(conversations)) == 4 * 5
