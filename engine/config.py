"""What a model is (`ModelConfig`) and how much room the engine gets (`EngineConfig`).

Decides the ranges the engine can run. Which fields of `config.json` are understood, refused or
ignored is said in `config_fields`. Knows nothing of weights or devices.
Both classes are checked at birth, so a value that exists is a value the engine can run.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config_fields import (
    eos_token_ids,
    is_int,
    optional_int,
    refuse_other_architectures,
    required_int,
    required_number,
    rope_fields,
    without_null,
)
from engine.errors import CheckpointError, InvalidArgument
from engine.json_file import read_json_object

HEAD_DIM = 64  # the only one the kernels are compiled for
WIDTH_MULTIPLE = 64  # hidden_size and intermediate_size: weights are packed in tiles of 64 x 64
# Tokens per KV block; an attention tile of 128 holds a whole number of them.
BLOCK_SIZES = (16, 32, 64, 128)
MAX_INT32 = 2**31 - 1  # the C structs hold 32-bit dimensions

# Names that differ between this class and config.json, for messages that a user can act on.
_JSON_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "eos_token_ids": "eos_token_id",
}


@dataclass(frozen=True)
class RopeScaling:
    """The `llama3` stretching of long rotary wavelengths.

    Source: transformers `_compute_llama3_parameters`.
    """

    factor: float  # frequencies of the longest wavelengths are divided by it, >= 1
    low_freq_factor: float  # wavelengths over original / low are divided whole
    high_freq_factor: float  # wavelengths under original / high stay as they are
    original_max_position_embeddings: int  # tokens

    def __post_init__(self) -> None:
        """Refuse values outside the formula's domain."""
        _check_number("factor", self.factor, 1.0)
        _check_number("low_freq_factor", self.low_freq_factor, 0.0, exclusive=True)
        _check_number("high_freq_factor", self.high_freq_factor, 0.0, exclusive=True)
        if self.high_freq_factor <= self.low_freq_factor:
            raise InvalidArgument(
                f"high_freq_factor must be over low_freq_factor {self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )
        _check_int("original_max_position_embeddings", self.original_max_position_embeddings, 1)


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions and constants of one Llama-architecture model."""

    vocab_size: int
    hidden_size: int  # multiple of 64
    intermediate_size: int  # multiple of 64
    num_layers: int
    num_heads: int  # multiple of num_kv_heads; num_heads * head_dim may differ from hidden_size
    num_kv_heads: int
    head_dim: int  # 64
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int  # tokens
    tie_word_embeddings: bool  # the embedding table serves as lm_head
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # any of them ends an answer; empty: only a limit does

    def __post_init__(self) -> None:
        """Refuse what the engine cannot run."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            _check_int(name, getattr(self, name), 1)
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % WIDTH_MULTIPLE:
                raise InvalidArgument(
                    f"{name} must be a multiple of {WIDTH_MULTIPLE}, got {getattr(self, name)}"
                )
        if self.head_dim != HEAD_DIM:
            raise InvalidArgument(f"head_dim must be {HEAD_DIM}, got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"{_label('num_heads')} must be a multiple of {_label('num_kv_heads')} "
                f"{self.num_kv_heads}, got {self.num_heads}"
            )
        if self.num_heads * self.head_dim > MAX_INT32:
            raise InvalidArgument(
                f"{_label('num_heads')} * head_dim must be at most {MAX_INT32}, "
                f"got {self.num_heads * self.head_dim}"
            )
        _check_number("rms_norm_eps", self.rms_norm_eps, 0.0, exclusive=True)
        _check_number("rope_theta", self.rope_theta, 1.0)
        if not isinstance(self.tie_word_embeddings, bool):
            raise InvalidArgument(
                f"tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r}"
            )
        token_ids = [("bos_token_id", self.bos_token_id)] if self.bos_token_id is not None else []
        token_ids += [("eos_token_ids", token_id) for token_id in self.eos_token_ids]
        for name, token_id in token_ids:
            _check_int(name, token_id, 0)
            if token_id >= self.vocab_size:
                raise InvalidArgument(
                    f"{_label(name)} must be under vocab_size {self.vocab_size}, got {token_id}"
                )

    @classmethod
    def from_directory(cls, directory: str | Path) -> "ModelConfig":
        """The config of a model directory in Hugging Face form.

        Reads `config.json` and, where there is one, `generation_config.json` for the token ids that
        end an answer. Nothing in the directory is ever executed.

        Raises:
            CheckpointError: a file is missing or damaged, or the model needs what this engine does
                not implement; the message names file, field, limit and value.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such model directory")
        config = read_json_object(directory, "config.json")
        generation_config = None
        if (directory / "generation_config.json").exists():
            generation_config = read_json_object(directory, "generation_config.json")
        try:
            return cls.from_dict(config, generation_config)
        except CheckpointError as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error}") from error

    @classmethod
    def from_dict(
        cls, config: dict[str, Any], generation_config: dict[str, Any] | None = None
    ) -> "ModelConfig":
        """The config that a parsed `config.json` describes.

        Args:
            config: either spelling of the rotary fields is understood: `rope_theta` with
                `rope_scaling`, or `rope_parameters` of transformers 5.
            generation_config: its bos and eos ids win over those in `config`, as they do in
                transformers.

        Raises:
            CheckpointError: naming the field, the limit and the value.
        """
        refuse_other_architectures(config)
        num_heads = required_int(config, "num_attention_heads")
        hidden_size = required_int(config, "hidden_size")
        num_kv_heads = optional_int(config, "num_key_value_heads")
        head_dim = optional_int(config, "head_dim")
        theta, scaling = rope_fields(config)
        tied = config.get("tie_word_embeddings")
        token_ids = {**config, **without_null(generation_config or {})}
        try:
            return cls(
                vocab_size=required_int(config, "vocab_size"),
                hidden_size=hidden_size,
                intermediate_size=required_int(config, "intermediate_size"),
                num_layers=required_int(config, "num_hidden_layers"),
                num_heads=num_heads,
                num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
                head_dim=hidden_size // max(num_heads, 1) if head_dim is None else head_dim,
                rms_norm_eps=required_number(config, "rms_norm_eps"),
                rope_theta=theta,
                rope_scaling=None if scaling is None else RopeScaling(*scaling),
                max_position_embeddings=required_int(config, "max_position_embeddings"),
                tie_word_embeddings=False if tied is None else tied,
                bos_token_id=optional_int(token_ids, "bos_token_id"),
                eos_token_ids=eos_token_ids(token_ids.get("eos_token_id")),
            )
        except InvalidArgument as error:
            raise CheckpointError(str(error)) from error

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The exact set of tensors a checkpoint of this model holds, in order of use.

        Returns:
            Checkpoint name -> shape, a matrix being [rows (outputs), cols (inputs)]. No
            `lm_head.weight` when the embeddings are tied.
        """
        q_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.input_layernorm.weight": (self.hidden_size,),
                f"{prefix}.self_attn.q_proj.weight": (q_size, self.hidden_size),
                f"{prefix}.self_attn.k_proj.weight": (kv_size, self.hidden_size),
                f"{prefix}.self_attn.v_proj.weight": (kv_size, self.hidden_size),
                f"{prefix}.self_attn.o_proj.weight": (self.hidden_size, q_size),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden_size,),
                f"{prefix}.mlp.gate_proj.weight": (self.intermediate_size, self.hidden_size),
                f"{prefix}.mlp.up_proj.weight": (self.intermediate_size, self.hidden_size),
                f"{prefix}.mlp.down_proj.weight": (self.hidden_size, self.intermediate_size),
            }
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


@dataclass(frozen=True)
class EngineConfig:
    """How much room an engine gets, fixed for its life."""

    device: str  # "cpu" or "cuda"
    num_blocks: int  # KV blocks in the pool
    max_seq_len: int  # tokens of the longest sequence, prompt and answer
    max_num_tokens: int  # tokens of one step
    max_num_seqs: int  # sequences of one step
    num_threads: int = 0  # CPU threads; 0: every core
    block_size: int = 128  # tokens per KV block
    enforce_eager: bool = False  # decode steps are launched anew, not replayed as graphs: same bits

    def __post_init__(self) -> None:
        """Refuse what no engine can be made of."""
        if self.device not in ("cpu", "cuda"):
            raise InvalidArgument(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        _check_int("num_threads", self.num_threads, 0)
        if self.block_size not in BLOCK_SIZES:
            raise InvalidArgument(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")
        for name in ("num_blocks", "max_seq_len", "max_num_tokens", "max_num_seqs"):
            _check_int(name, getattr(self, name), 1)
        if not isinstance(self.enforce_eager, bool):
            raise InvalidArgument(
                f"enforce_eager must be True or False, got {self.enforce_eager!r}"
            )
        if self.num_blocks * self.block_size > MAX_INT32:
            raise InvalidArgument(
                f"num_blocks * block_size must be at most {MAX_INT32}, "
                f"got {self.num_blocks * self.block_size}"
            )


def _check_int(name: str, value: Any, minimum: int) -> None:
    if not is_int(value) or not minimum <= value <= MAX_INT32:
        raise InvalidArgument(
            f"{_label(name)} must be an integer from {minimum} to {MAX_INT32}, got {value!r}"
        )


def _check_number(name: str, value: Any, minimum: float, exclusive: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (
        not is_number
        or not math.isfinite(value)
        or value < minimum
        or (exclusive and value == minimum)
    ):
        bound = "over" if exclusive else "at least"
        raise InvalidArgument(
            f"{_label(name)} must be a finite number {bound} {minimum}, got {value!r}"
        )


def _label(name: str) -> str:
    """Our name of a field, with that of config.json where it differs."""
    return f"{name} ({_JSON_NAMES[name]})" if name in _JSON_NAMES else name
