"""`generation_config.json`: a checkpoint's own defaults of generation, under transformers' names.

Read are ``eos_token_id``, ``do_sample``, ``temperature``, ``top_p``, ``max_new_tokens`` and
``max_length``. A key that would change what is generated in a way that this package does not
implement is an error unless its value is the one that changes nothing; so is an unknown key, which
may be a misspelt one.

Names and defaults: `transformers.GenerationConfig` 5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_ops.model.errors import ConfigError, KimiError, check_count, checked_path
from kimi_ops.model.generate import Sampling
from kimi_ops.model.json_file import printable, read_json_object

CONFIG_FILE = "generation_config.json"
MAX_BYTES = 2**20  # a released one has a few hundred

# What does not change which tokens come: names, and beginnings of names.
_WITHOUT_EFFECT = (
    "bos_token_id",
    "pad_token_id",
    "use_cache",
    "return_dict_in_generate",
    "renormalize_logits",
    "remove_invalid_values",
    "early_stopping",  # of beams, as the next
    "length_penalty",
    "transformers_version",
    "output_",
    "cache_",
    "_",
)
# What changes it, and the value beside null that does not.
_NEUTRAL: dict[str, Any] = {
    "top_k": 0,
    "top_h": 0,
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": [],
    "force_words_ids": [],
    "constraints": [],
    "sequence_bias": {},
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": [],
    "exponential_decay_length_penalty": None,
    "stop_strings": [],
    "token_healing": False,
    "watermarking_config": None,
    "dola_layers": None,
}
_READ = ("eos_token_id", "do_sample", "temperature", "top_p", "max_new_tokens", "max_length")


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of generation; None is for what the checkpoint does not say.

    Attributes:
        stop_ids: ids that end a continuation.
        do_sample: False asks for the most likely token, whatever the two after it say.
        temperature, top_p: as `Sampling`.
        max_new_tokens: of a continuation.
        max_length: of prompt and continuation together, in tokens; ``max_new_tokens`` goes before.

    Raises:
        KimiError: a value out of range.
    """

    stop_ids: tuple[int, ...] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.do_sample is not None and not isinstance(self.do_sample, bool):
            raise KimiError(f"do_sample must be true or false, got {self.do_sample!r:.80}")
        for name in ("max_new_tokens", "max_length"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)
        self.sampling(Sampling())

    @classmethod
    def from_file(cls, directory: str | Path, vocab_size: int) -> GenerationConfig:
        """Reads the file in a checkpoint's folder; without one nothing has a default.

        Raises:
            ConfigError: what is wrong with it, with file and key.
        """
        path = checked_path(directory, ConfigError) / CONFIG_FILE
        if not path.exists():
            return cls()
        found = read_json_object(path, MAX_BYTES, ConfigError)
        for key, value in found.items():
            if key in _READ or key.startswith(_WITHOUT_EFFECT):
                continue
            if key not in _NEUTRAL:
                raise ConfigError(f"{path}: unknown key {printable(key)}; delete or correct it")
            if value is not None and value != _NEUTRAL[key]:
                raise ConfigError(
                    f"{path}: {key} must be {_NEUTRAL[key]!r} or null, got {value!r:.80}: it is "
                    "not implemented; delete it to generate without"
                )
        given = {key: found[key] for key in _READ if found.get(key) is not None}
        try:
            stop_ids = _stop_ids(given.pop("eos_token_id", None), vocab_size)
            return cls(stop_ids=stop_ids, **given)
        except KimiError as error:
            raise ConfigError(f"{path}: {error}") from None

    def sampling(self, default: Sampling) -> Sampling:
        """``default`` with what the checkpoint says in its place; the seed stays."""
        if self.do_sample is False:
            return Sampling(seed=default.seed)
        if self.do_sample is None and self.temperature is None and self.top_p is None:
            return default
        # What `do_sample` alone leaves open is 1 in transformers, not greedy.
        temperature = default.temperature or 1.0 if self.temperature is None else self.temperature
        return Sampling(
            temperature=temperature,
            top_p=default.top_p if self.top_p is None else self.top_p,
            seed=default.seed,
        )

    def limits(self, prompt_tokens: Sequence[int], default: int) -> list[int]:
        """New tokens of each prompt of these lengths; ``default`` where nothing is said.

        Raises:
            KimiError: a prompt that leaves no room below ``max_length``.
        """
        if self.max_new_tokens is not None or self.max_length is None:
            limit = default if self.max_new_tokens is None else self.max_new_tokens
            return [limit] * len(prompt_tokens)
        for number, length in enumerate(prompt_tokens):
            if length >= self.max_length:
                raise KimiError(
                    f"prompt {number} has {length} tokens; max_length of {CONFIG_FILE} is "
                    f"{self.max_length}: give max_new_tokens, which goes before"
                )
        return [self.max_length - length for length in prompt_tokens]


def _stop_ids(value: Any, vocab_size: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise KimiError(
                f"eos_token_id must be an id in 0 .. {vocab_size - 1} or a list of them, "
                f"got {token!r:.80}"
            )
    return tuple(ids)
