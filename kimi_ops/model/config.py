"""The configuration of a Kimi K2.5 model: the released `config.json`, checked.

Field names are those of the released file. A value that this package does not implement, a key it
does not know, or two values that contradict each other is a `ConfigError` that names the key: a
model that runs is a model that was understood. Reading and writing the file format is in
`config_format`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_ops.model.config_fields import (
    MAX_SIZE,
    check_fields,
    choice,
    flag,
    integer,
    number,
    text,
)
from kimi_ops.model.config_quantization import (
    INT4_GROUP,
    QuantizationConfig,
    check_ignore_patterns,
)
from kimi_ops.model.errors import ConfigError, checked_path

# Layers x routed experts: released 61 x 384 = 23,424. Bounds the tensor table a config can demand.
MAX_EXPERT_SLOTS = 131_072


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN parameters of the text model (`rope_scaling` of the released file; type yarn only).

    `mscale_all_dim` 0 means that the softmax scale is left alone, as in the DeepSeek-V3 family.
    """

    type: str = choice("yarn", default="yarn")
    factor: float = number(1.0)
    original_max_position_embeddings: int = integer(1, MAX_SIZE)
    beta_fast: float = number(0.0, above=True, default=32.0)
    beta_slow: float = number(0.0, above=True, default=1.0)
    mscale: float = number(0.0, above=True, default=1.0)
    mscale_all_dim: float = number(0.0, default=0.0)

    def __post_init__(self) -> None:
        check_fields(self, "text_config.rope_scaling.")
        if self.beta_fast < self.beta_slow:
            raise ConfigError(
                "text_config.rope_scaling.beta_fast must be at least beta_slow, "
                f"got {self.beta_fast} and {self.beta_slow}"
            )
        if self.mscale_all_dim == 0 and self.mscale != 1:
            raise ConfigError(
                "text_config.rope_scaling.mscale must be 1 where mscale_all_dim is 0 or absent "
                f"(known implementations disagree on other values), got {self.mscale}"
            )

    def magnitude(self, mscale: float) -> float:
        """YaRN's m(mscale) = 0.1 * mscale * ln(factor) + 1; 1 for a factor of 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder (`text_config`): DeepSeek-V3-shaped, with MLA attention and routed experts.

    Sizes are in elements. `rope_scaling` None is plain RoPE. `latent_norm_eps` is this package's
    own key: the eps of `q_a_layernorm` and `kv_a_layernorm`, which public implementations set to
    1e-6 or to `rms_norm_eps`; absent, it is `rms_norm_eps`.
    """

    model_type: str = choice("kimi_k2", "deepseek_v3", default="kimi_k2")
    vocab_size: int = integer(1, MAX_SIZE)
    hidden_size: int = integer(1, MAX_SIZE)
    intermediate_size: int = integer(1, MAX_SIZE)
    moe_intermediate_size: int = integer(1, MAX_SIZE)
    num_hidden_layers: int = integer(1, 1024)
    num_attention_heads: int = integer(1, 4096)
    num_key_value_heads: int = integer(1, 4096)
    n_shared_experts: int = integer(1, 64)
    n_routed_experts: int = integer(1, 4096)
    num_experts_per_tok: int = integer(1, 4096)
    n_group: int = integer(1, 4096)
    topk_group: int = integer(1, 4096)
    first_k_dense_replace: int = integer(0, 1024)
    q_lora_rank: int = integer(1, MAX_SIZE)
    kv_lora_rank: int = integer(1, MAX_SIZE)
    qk_nope_head_dim: int = integer(1, 4096)
    qk_rope_head_dim: int = integer(2, 4096)
    v_head_dim: int = integer(1, 4096)
    routed_scaling_factor: float = number(0.0, above=True)
    norm_topk_prob: bool = flag()
    rms_norm_eps: float = number(0.0, above=True)
    latent_norm_eps: float = number(0.0, above=True, default=None)
    rope_theta: float = number(1.0, above=True)
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = integer(1, MAX_SIZE)
    moe_layer_freq: int = choice(1, default=1)
    scoring_func: str = choice("sigmoid", default="sigmoid")
    topk_method: str = choice("noaux_tc", default="noaux_tc")
    hidden_act: str = choice("silu", default="silu")
    attention_bias: bool = choice(False, default=False)
    attention_dropout: float = choice(0.0, 0, default=0.0)
    tie_word_embeddings: bool = choice(False, default=False)
    num_nextn_predict_layers: int = choice(0, default=0)
    pretraining_tp: int = choice(1, default=1)
    initializer_range: float = number(0.0, default=0.02)
    aux_loss_alpha: float = number(0.0, default=0.001)
    seq_aux: bool = flag(default=True)
    dtype: str = choice("bfloat16", "float16", "float32", default="bfloat16")

    def __post_init__(self) -> None:
        if self.latent_norm_eps is None:
            object.__setattr__(self, "latent_norm_eps", self.rms_norm_eps)
        check_fields(self, "text_config.")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ConfigError(
                "text_config.num_key_value_heads must equal num_attention_heads (MLA), got "
                f"{self.num_key_value_heads} and {self.num_attention_heads}"
            )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"text_config.qk_rope_head_dim must be even, got {self.qk_rope_head_dim}"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ConfigError(
                "text_config.first_k_dense_replace must not exceed num_hidden_layers "
                f"({self.num_hidden_layers}), got {self.first_k_dense_replace}"
            )
        if self.num_hidden_layers * self.n_routed_experts > MAX_EXPERT_SLOTS:
            raise ConfigError(
                "text_config.num_hidden_layers x n_routed_experts must not exceed "
                f"{MAX_EXPERT_SLOTS}, got {self.num_hidden_layers} x {self.n_routed_experts}"
            )
        self._check_routing()
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ConfigError(
                "text_config.rope_scaling must be a RopeScaling or None, got "
                f"{type(self.rope_scaling).__name__}"
            )
        if self.rope_scaling is not None:
            self.rope_ramp()

    def _check_routing(self) -> None:
        experts, groups, kept = self.n_routed_experts, self.n_group, self.topk_group
        if experts % groups:
            raise ConfigError(
                f"text_config.n_group must divide n_routed_experts ({experts}), got {groups}"
            )
        if groups > 1 and experts // groups < 2:
            raise ConfigError(
                "text_config.n_group must leave at least 2 experts a group (a group is scored by "
                f"its best two), got {groups} groups of {experts} experts"
            )
        if kept > groups:
            raise ConfigError(
                f"text_config.topk_group must not exceed n_group ({groups}), got {kept}"
            )
        if self.num_experts_per_tok > kept * (experts // groups):
            raise ConfigError(
                "text_config.num_experts_per_tok must not exceed the experts in the kept groups "
                f"({kept} x {experts // groups}), got {self.num_experts_per_tok}"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without position plus the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor of the scores: qk_head_dim^-1/2 x m(mscale_all_dim)^2, at every length."""
        scaling = self.rope_scaling
        magnitude = 1.0 if scaling is None else scaling.magnitude(scaling.mscale_all_dim)
        return magnitude**2 / math.sqrt(self.qk_head_dim)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (0-based) has routed experts instead of a dense MLP."""
        return layer >= self.first_k_dense_replace

    def rope_ramp(self) -> tuple[float, float]:
        """The frequency indices (low, high) between which YaRN blends; see `rope.yarn_inv_freq`.

        `high` may exceed `low` by only 0.001, where both bounds round to the same index. Raises
        `ConfigError` for plain RoPE, and where the bounds are reversed: no blend is defined then.
        """
        scaling, dim = self.rope_scaling, self.qk_rope_head_dim
        if scaling is None:
            raise ConfigError("text_config.rope_scaling is null: plain RoPE has no YaRN ramp")

        def index_of(rotations: float) -> float:
            wavelengths = scaling.original_max_position_embeddings / (2 * math.pi * rotations)
            return dim * math.log(wavelengths) / (2 * math.log(self.rope_theta))

        low = max(math.floor(index_of(scaling.beta_fast)), 0)
        high = min(math.ceil(index_of(scaling.beta_slow)), dim - 1)
        if low > high:
            raise ConfigError(
                "text_config.rope_scaling: beta_fast, beta_slow, "
                "original_max_position_embeddings and rope_theta give an empty blend range, from "
                f"index {low} to {high}"
            )
        return low, high + 0.001 if low == high else high


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """MoonViT-3D and the projector (`vision_config`). Sizes are in elements, patches in pixels."""

    patch_size: int = integer(1, 4096)
    init_pos_emb_height: int = integer(1, 4096)
    init_pos_emb_width: int = integer(1, 4096)
    init_pos_emb_time: int = integer(1, 4096)
    vt_num_hidden_layers: int = integer(1, 1024)
    vt_hidden_size: int = integer(1, MAX_SIZE)
    vt_num_attention_heads: int = integer(1, 4096)
    vt_intermediate_size: int = integer(1, MAX_SIZE)
    mm_hidden_size: int = integer(1, MAX_SIZE)
    text_hidden_size: int = integer(1, MAX_SIZE)
    projector_ln_eps: float = number(0.0, above=True, default=1e-5)
    merge_kernel_size: tuple[int, int] = choice((2, 2), default=(2, 2))
    pos_emb_type: str = choice("divided_fixed", default="divided_fixed")
    merge_type: str = choice("sd2_tpool", default="sd2_tpool")
    video_attn_type: str = choice("spatial_temporal", default="spatial_temporal")
    mm_projector_type: str = choice("patchmerger", default="patchmerger")
    projector_hidden_act: str = choice("gelu", default="gelu")

    def __post_init__(self) -> None:
        check_fields(self, "vision_config.")
        if self.vt_hidden_size % self.vt_num_attention_heads:
            raise ConfigError(
                "vision_config.vt_num_attention_heads must divide vt_hidden_size "
                f"({self.vt_hidden_size}), got {self.vt_num_attention_heads}"
            )
        if self.head_dim % 4:
            raise ConfigError(
                "vision_config.vt_hidden_size / vt_num_attention_heads must be a multiple of 4 "
                f"(2-D RoPE), got {self.head_dim}"
            )
        if self.mm_hidden_size != self.vt_hidden_size:
            raise ConfigError(
                f"vision_config.mm_hidden_size must equal vt_hidden_size ({self.vt_hidden_size}), "
                f"got {self.mm_hidden_size}"
            )

    @property
    def head_dim(self) -> int:
        """Width of an attention head of the vision tower."""
        return self.vt_hidden_size // self.vt_num_attention_heads

    @property
    def merged_size(self) -> int:
        """Width of the projector's input: the channels of one 2 x 2 block of patches."""
        return self.merge_kernel_size[0] * self.merge_kernel_size[1] * self.vt_hidden_size


@dataclass(frozen=True, kw_only=True)
class KimiK25Config:
    """A whole model: decoder, vision tower, projector, token ids, and how experts are stored.

    `quantization_config` None means that the routed experts are stored unquantised. Construction
    checks everything, so an instance is always consistent. Raises `ConfigError`.
    """

    text_config: TextConfig
    vision_config: VisionConfig
    quantization_config: QuantizationConfig | None = None
    bos_token_id: int = integer(0, MAX_SIZE)
    eos_token_id: int = integer(0, MAX_SIZE)
    pad_token_id: int = integer(0, MAX_SIZE)
    media_placeholder_token_id: int = integer(0, MAX_SIZE)
    ignore_index: int = integer(-(2**31), -1, default=-100)
    video_placeholder: str = text(default="<|kimi_k25_video_placeholder|>")
    use_unified_vision_chunk: bool = choice(True, default=True)
    tie_word_embeddings: bool = choice(False, default=False)
    model_type: str = choice("kimi_k25", default="kimi_k25")

    def __post_init__(self) -> None:
        check_fields(self, "")
        language, vision = self.text_config, self.vision_config
        for key in ("bos", "eos", "pad", "media_placeholder"):
            token = getattr(self, f"{key}_token_id")
            if token >= language.vocab_size:
                raise ConfigError(
                    f"{key}_token_id must be below text_config.vocab_size "
                    f"({language.vocab_size}), got {token}"
                )
        if vision.text_hidden_size != language.hidden_size:
            raise ConfigError(
                "vision_config.text_hidden_size must equal text_config.hidden_size "
                f"({language.hidden_size}), got {vision.text_hidden_size}"
            )
        if self.quantization_config is not None:
            for key in ("hidden_size", "moe_intermediate_size"):
                if getattr(language, key) % INT4_GROUP:
                    raise ConfigError(
                        f"text_config.{key} must be a multiple of {INT4_GROUP} for int4 experts, "
                        f"got {getattr(language, key)}"
                    )
            check_ignore_patterns(self.quantization_config)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KimiK25Config:
        """Reads the content of a released-format `config.json`. Raises `ConfigError`."""
        from kimi_ops.model.config_format import config_from_dict

        return config_from_dict(values)

    @classmethod
    def from_file(cls, path: str | Path) -> KimiK25Config:
        """Reads a `config.json`, or the one in the directory `path`. Raises `ConfigError`."""
        from kimi_ops.model.config_format import config_from_file

        return config_from_file(checked_path(path, ConfigError))

    @classmethod
    def full_size(cls) -> KimiK25Config:
        """The released Kimi K2.5: 1.027 T parameters, 61 layers, 384 experts, int4."""
        return cls.from_file(Path(__file__).parent / "configs" / "kimi-k2.5.json")

    def to_dict(self) -> dict[str, Any]:
        """The content of a released-format `config.json`; `from_dict` gives this config back."""
        from kimi_ops.model.config_format import config_to_dict

        return config_to_dict(self)
