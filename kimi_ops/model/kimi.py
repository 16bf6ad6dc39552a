"""The whole model: text, pictures and clips in, logits or generated tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kimi_ops.model.cache import CacheFormat, LatentCache, Step
from kimi_ops.model.checkpoint import load_parameters, open_checkpoint, save_checkpoint
from kimi_ops.model.checkpoint_writer import RANDOM_MARK
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import KimiError, MediaError, check_count
from kimi_ops.model.generate import (
    Generation,
    Sampling,
    checked_prompts,
    checked_stop_ids,
    generate,
)
from kimi_ops.model.generation_config import CONFIG_FILE as GENERATION_CONFIG_FILE
from kimi_ops.model.generation_config import GenerationConfig
from kimi_ops.model.language import LanguageModel
from kimi_ops.model.progress import Progress
from kimi_ops.model.projector import Projector
from kimi_ops.model.settings import usable_device, usable_dtype
from kimi_ops.model.tensor_arguments import check_media_tensors, check_placeholders, check_tensor
from kimi_ops.model.vision import VisionTower
from kimi_ops.model.weight_map import check_layers, fused_parameters

# What stands beside the weights of a checkpoint and belongs to it.
SMALL_FILES = (
    "tiktoken.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    GENERATION_CONFIG_FILE,
    RANDOM_MARK,
)


DEFAULT_NEW_TOKENS = 256


class KimiK25(nn.Module):
    """Kimi K2.5. Build it with `from_pretrained`.

    Its parameters are those of `weight_map.fused_parameters`, under the same names; they take no
    gradient. Parallelism over devices is not part of this class.

    Args:
        config: sizes.
        dtype: of the float parameters.
        scale_dtype: of the int4 scales; ``dtype`` if None.
        device: of the parameters, which are uninitialised; "meta" makes none.
        layers: decoder layers present; all if None.

    Raises:
        ConfigError: what the ops do not implement.
        KimiError: a dtype or device that the model does not run in or on.
    """

    def __init__(
        self,
        config: KimiK25Config,
        *,
        dtype: torch.dtype = torch.bfloat16,
        scale_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        layers: range | None = None,
    ) -> None:
        super().__init__()
        self.decoder_layers = check_layers(config, layers)
        dtype = usable_dtype(dtype)
        scale_dtype = dtype if scale_dtype is None else usable_dtype(scale_dtype)
        if str(device) != "meta":
            device = usable_device(device)
        self.config = config
        self.source: Path | None = None  # the folder it was loaded from
        self.generation_config = GenerationConfig()
        specs = fused_parameters(config, self.decoder_layers, dtype=dtype, scale_dtype=scale_dtype)
        self.language = LanguageModel(config.text_config, self.decoder_layers, specs, device)
        self.vision = VisionTower(config.vision_config, specs, device)
        self.projector = Projector(specs, device)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        layers: range | None = None,
        progress: Progress = True,
    ) -> KimiK25:
        """Loads a checkpoint in the released format.

        Args:
            path: directory with config.json and safetensors files.
            device: where the parameters go.
            dtype: of the float parameters (bfloat16, float16 or float32); int4 experts stay int4.
            layers: only these decoder layers (a model for measuring, not for text).
            progress: a bar on stderr; True shows it on a terminal only.

        Raises:
            ConfigError, CheckpointError: what is wrong, with tensor and file; before any weight is
                read wherever the headers tell.
            KimiError: a device that is not there, or a dtype of another kind.
        """
        device, dtype = usable_device(device), usable_dtype(dtype)
        checkpoint = open_checkpoint(path, layers=layers)
        vocabulary = checkpoint.config.text_config.vocab_size
        generation_config = GenerationConfig.from_file(checkpoint.directory, vocabulary)
        # Parameters are made by the loader, in place of those that "meta" did not make.
        model = cls(
            checkpoint.config,
            dtype=dtype,
            scale_dtype=checkpoint.scale_dtype,
            device="meta",
            layers=layers,
        )
        parameters = load_parameters(
            checkpoint, dtype=dtype, device=device, layers=layers, progress=progress
        )
        frozen = {k: nn.Parameter(v, requires_grad=False) for k, v in parameters.items()}
        model.load_state_dict(frozen, strict=True, assign=True)
        model.language.to(device)  # what is not loaded but computed
        model.source = checkpoint.directory
        model.generation_config = generation_config
        return model

    def save_pretrained(
        self,
        path: str | Path,
        *,
        max_shard_bytes: int | None = None,
        overwrite: bool = False,
        progress: Progress = True,
    ) -> None:
        """Writes a checkpoint in the released format, complete with the small files of its source.

        Tokenizer, template, preprocessing and generation settings are copied from the folder that
        the model was loaded from, and so is the mark of random weights.

        Args:
            path: folder; empty or new unless ``overwrite``.
            max_shard_bytes: tensor data per shard; one decoder layer per shard if None.
            overwrite: replace the checkpoint in the folder.
            progress: as `from_pretrained`.

        Raises:
            CheckpointError: a folder that is not empty, or a write that fails.
        """
        layers = self.decoder_layers
        whole = len(layers) == self.config.text_config.num_hidden_layers
        beside = {}
        if self.source is not None:
            beside = {
                n: (self.source / n).read_bytes()
                for n in SMALL_FILES
                if (self.source / n).is_file()
            }
        save_checkpoint(
            path,
            self.config,
            dict(self.state_dict()),
            layers=None if whole else layers,
            max_shard_bytes=max_shard_bytes,
            extra_files=beside,
            overwrite=overwrite,
            progress=progress,
        )

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.language.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the float parameters."""
        return self.language.embed_tokens.dtype

    def new_cache(
        self,
        *,
        num_pages: int,
        max_pages: int | None = None,
        page_size: int = 64,
        max_sequences: int = 16,
        cache_format: CacheFormat = "plain",
    ) -> LatentCache:
        """A `LatentCache` for this model's layers, dtype and device. Raises `KimiError`."""
        return LatentCache(
            self.config,
            num_pages=num_pages,
            max_pages=max_pages,
            page_size=page_size,
            max_sequences=max_sequences,
            dtype=self.dtype,
            device=self.device,
            cache_format=cache_format,
            layers=self.decoder_layers,
        )

    def encode_media(self, pixel_values: Tensor, grid_thws: Tensor) -> Tensor:
        """Embeddings of pictures and clips, ``[M, D]``.

        Args:
            pixel_values: ``[L, 3, 14, 14]``, all patches, in order.
            grid_thws: ``[n, 3]`` integers, (t, h, w) of each picture or chunk of a clip.

        Raises:
            MediaError: sizes that do not belong together.
        """
        check_media_tensors(pixel_values, grid_thws)
        projector = self.projector
        grid_thws = grid_thws.to("cpu", torch.int64)
        merged = self.vision(
            pixel_values, grid_thws, projector.pre_norm_weight, projector.pre_norm_bias
        )
        features: Tensor = projector(merged)
        return features

    def embed(self, input_ids: Tensor, media: Tensor | None = None) -> Tensor:
        """Embeddings ``[T, D]`` of ``input_ids [T]``, media in place of their placeholders.

        Args:
            input_ids: ``[T]`` integers.
            media: ``[M, D]`` from `encode_media`, one row per placeholder, in order.

        Raises:
            KimiError: an id outside the vocabulary.
            MediaError: another number of placeholders than of rows.
        """
        check_tensor("input_ids", input_ids, "[T] integers")
        width = self.config.text_config.hidden_size
        if media is not None:
            check_tensor("media", media, f"[M, {width}] floats")
        vocabulary = self.config.text_config.vocab_size
        ids = input_ids.to("cpu", torch.int64)
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
            raise KimiError(
                f"input_ids must be in 0 .. {vocabulary - 1}, "
                f"got {int(ids.min())} .. {int(ids.max())}"
            )
        rows = (ids == self.config.media_placeholder_token_id).nonzero()[:, 0]
        count = 0 if media is None else len(media)
        if len(rows) != count:
            raise MediaError(
                f"the prompt has {len(rows)} media placeholders (id "
                f"{self.config.media_placeholder_token_id}), the media given have {count} tokens"
            )
        x = self.language.embed(ids.to(self.device))
        if media is not None:
            x[rows.to(self.device)] = media.to(x.dtype)
        return x

    def hidden_states(self, embeddings: Tensor, step: Step, cache: LatentCache) -> Tensor:
        """Hidden states after the final norm, ``[T, D]``, of packed new tokens.

        Args:
            embeddings: ``[T, D]`` from `embed`.
            step: from ``cache.extend``.
            cache: written.
        """
        hidden: Tensor = self.language(embeddings, step, cache)
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        grid_thws: Tensor | None = None,
    ) -> Tensor:
        """Logits of every position.

        Args:
            input_ids: ``[B, T]`` integers, without padding; a placeholder per vision token.
            pixel_values: ``[L, 3, 14, 14]``, media of all B rows in order of appearance.
            grid_thws: ``[n, 3]`` integers, (t, h, w) of each picture or chunk of a clip.

        Returns:
            ``[B, T, vocab]`` float32.

        Raises:
            KimiError: an id outside the vocabulary, or T over the context limit.
            MediaError: media and placeholders that do not match.
        """
        check_tensor("input_ids", input_ids, "[B, T] integers")
        batch, tokens = input_ids.shape
        vocabulary = self.config.text_config.vocab_size
        placeholder = self.config.media_placeholder_token_id
        check_placeholders(placeholder, input_ids.tolist(), pixel_values, grid_thws)
        media = self._media(pixel_values, grid_thws)
        x = self.embed(input_ids.flatten(), media)
        if input_ids.numel() == 0:
            return self.language.logits(x).view(batch, tokens, vocabulary)
        page_size = 64
        cache = self.new_cache(num_pages=batch * -(-tokens // page_size), page_size=page_size)
        sequences = [cache.add_sequence() for _ in range(batch)]
        step = cache.extend(sequences, [tokens] * batch, absorbed=False)
        hidden = self.hidden_states(x, step, cache)
        return self.language.logits(hidden).view(batch, tokens, vocabulary)

    def _media(self, pixel_values: Tensor | None, grid_thws: Tensor | None) -> Tensor | None:
        if pixel_values is None or grid_thws is None:
            return None
        return self.encode_media(pixel_values, grid_thws)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        pixel_values: Tensor | None = None,
        grid_thws: Tensor | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop_ids: Iterable[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        prefill_chunk: int = 2048,
        page_size: int = 64,
        cache_format: CacheFormat = "plain",
    ) -> Generation:
        """Continues several prompts at once, without gradients.

        Args:
            prompts: token ids of each, of any lengths from 1.
            pixel_values, grid_thws: media of all prompts in order of appearance, as `forward`.
            max_new_tokens: at most so many per prompt; fewer where the context ends. If None that
                of ``generation_config``, else 256.
            sampling: temperature, top-p and seed; if None those of ``generation_config``, else
                greedy.
            stop_ids: ids that end a continuation (not part of it); if None those of
                ``generation_config``, else the end of text and the end of a turn, which is the id
                after it in every vocabulary of this family.
            on_token: called with (number of the prompt, token id) for each new token, at once.
            prefill_chunk: prompt tokens per step and prompt; bounds the memory of long prompts.
            page_size: of the cache.
            cache_format: of the cache; "fp8" takes a little over half of bfloat16's memory.

        Returns:
            New tokens, why each continuation ended, and timings. Ctrl-C ends it cleanly with what
            there is. A prompt's greedy result does not depend on which others are beside it, up to
            the rounding of torch's matrix products; a sampled one depends on its number too.

        Raises:
            KimiError: an empty prompt, a prompt over the context limit, a bad number.
            MediaError: media and placeholders that do not match.
        """
        prompts = checked_prompts(prompts)
        defaults, eos = self.generation_config, self.config.eos_token_id
        if max_new_tokens is None:
            limits = defaults.limits([len(prompt) for prompt in prompts], DEFAULT_NEW_TOKENS)
        else:
            check_count("max_new_tokens", max_new_tokens)
            limits = [max_new_tokens] * len(prompts)
        if sampling is None:
            sampling = defaults.sampling(Sampling())
        if not isinstance(sampling, Sampling):
            raise KimiError(f"sampling must be a Sampling, got {sampling!r:.80}")
        if stop_ids is None:
            stop_ids = (eos, eos + 1) if defaults.stop_ids is None else defaults.stop_ids
        if on_token is not None and not callable(on_token):
            raise KimiError(f"on_token must be a function, got {on_token!r:.80}")
        placeholder = self.config.media_placeholder_token_id
        check_placeholders(placeholder, prompts, pixel_values, grid_thws)
        return generate(
            self,
            prompts,
            encode_media=lambda: self._media(pixel_values, grid_thws),
            max_new_tokens=limits,
            sampling=sampling,
            stop_ids=checked_stop_ids(stop_ids),
            on_token=on_token,
            prefill_chunk=prefill_chunk,
            page_size=page_size,
            cache_format=cache_format,
        )
