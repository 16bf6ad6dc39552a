"""The whole model: text, pictures and clips in, logits or generated tokens out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kimi_ops.model.cache import LatentCache, Step
from kimi_ops.model.checkpoint import load_parameters, open_checkpoint, save_checkpoint
from kimi_ops.model.checkpoint_writer import RANDOM_MARK
from kimi_ops.model.config import KimiK25Config
from kimi_ops.model.errors import KimiError, MediaError
from kimi_ops.model.generate import Generation, Sampling, checked_prompts, generate
from kimi_ops.model.language import LanguageModel
from kimi_ops.model.progress import Progress
from kimi_ops.model.projector import Projector
from kimi_ops.model.vision import VisionTower, merged_lengths
from kimi_ops.model.weight_map import check_layers, fused_parameters

# What stands beside the weights of a checkpoint and belongs to it.
SMALL_FILES = (
    "tiktoken.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "generation_config.json",
    RANDOM_MARK,
)


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


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
        self.config = config
        self.source: Path | None = None  # the folder it was loaded from
        self.decoder_layers = check_layers(config, layers)
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
        """
        checkpoint = open_checkpoint(path, layers=layers)
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
        model.source = Path(path)
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

    def new_cache(self, *, num_pages: int, page_size: int = 64) -> LatentCache:
        """A cache for this model's layers, dtype and device. Raises `KimiError`."""
        return LatentCache(
            self.config,
            num_pages=num_pages,
            page_size=page_size,
            dtype=self.dtype,
            device=self.device,
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
        for name, value in (("pixel_values", pixel_values), ("grid_thws", grid_thws)):
            if not isinstance(value, Tensor):
                raise MediaError(f"{name} must be a tensor, got {type(value).__name__}")
        if grid_thws.dim() != 2 or grid_thws.shape[1] != 3 or not _is_integer(grid_thws):
            raise MediaError(
                f"grid_thws must be [n, 3] integers, got {list(grid_thws.shape)} {grid_thws.dtype}"
            )
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
        if not isinstance(input_ids, Tensor):
            raise KimiError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
        if input_ids.dim() != 2 or not _is_integer(input_ids):
            raise KimiError(
                f"input_ids must be [B, T] integers, got {list(input_ids.shape)} {input_ids.dtype}"
            )
        batch, tokens = input_ids.shape
        vocabulary = self.config.text_config.vocab_size
        self._check_media(input_ids.tolist(), pixel_values, grid_thws)
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
        if (pixel_values is None) != (grid_thws is None):
            raise MediaError("pixel_values and grid_thws must be given together")
        if pixel_values is None or grid_thws is None:
            return None
        return self.encode_media(pixel_values, grid_thws)

    def _check_media(
        self,
        prompts: Sequence[Sequence[int]],
        pixel_values: Tensor | None,
        grid_thws: Tensor | None,
    ) -> None:
        """Each prompt's placeholders must be those of whole pictures and chunks.

        Says so before anything is computed; the total number is checked by `embed`.
        """
        if (pixel_values is None) != (grid_thws is None):
            raise MediaError("pixel_values and grid_thws must be given together")
        if not isinstance(grid_thws, Tensor) or grid_thws.dim() != 2 or grid_thws.shape[1] != 3:
            return
        ends = {0, *merged_lengths(grid_thws.to("cpu", torch.int64)).cumsum(0).tolist()}
        placeholder, count = self.config.media_placeholder_token_id, 0
        for number, prompt in enumerate(prompts):
            own = sum(token == placeholder for token in prompt)
            count += own
            if count not in ends and count <= max(ends):
                raise MediaError(
                    f"prompt {number} has {own} media placeholders, which ends amid a picture or "
                    "chunk of a clip; its media must have as many tokens"
                )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        pixel_values: Tensor | None = None,
        grid_thws: Tensor | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        prefill_chunk: int = 2048,
        page_size: int = 64,
    ) -> Generation:
        """Continues several prompts at once, without gradients.

        Args:
            prompts: token ids of each, of any lengths from 1.
            pixel_values, grid_thws: media of all prompts in order of appearance, as `forward`.
            max_new_tokens: at most so many per prompt; fewer where the context ends.
            sampling: temperature, top-p and seed; greedy if None.
            stop_ids: ids that end a continuation (not part of it); if None the end of text and
                the end of a turn, which is the id after it in every vocabulary of this family.
            on_token: called with (number of the prompt, token id) for each new token, at once.
            prefill_chunk: prompt tokens per step and prompt; bounds the memory of long prompts.
            page_size: of the cache.

        Returns:
            New tokens, why each continuation ended, and timings. Ctrl-C ends it cleanly with what
            there is. A prompt's greedy result does not depend on which others are beside it, up to
            the rounding of torch's matrix products; a sampled one depends on its number too.

        Raises:
            KimiError: an empty prompt, a prompt over the context limit, a bad number.
            MediaError: media and placeholders that do not match.
        """
        prompts = checked_prompts(prompts)
        self._check_media(prompts, pixel_values, grid_thws)
        eos = self.config.eos_token_id
        return generate(
            self,
            prompts,
            encode_media=lambda: self._media(pixel_values, grid_thws),
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(),
            stop_ids=[eos, eos + 1] if stop_ids is None else list(stop_ids),
            on_token=on_token,
            prefill_chunk=prefill_chunk,
            page_size=page_size,
        )
