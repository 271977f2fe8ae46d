"""The toy family: small random-weight Llama models with every shape the engine must get right.

Decides their configs and writes them, weights and byte-level tokenizer included, into the cache.
The bytes depend on nothing but this file and `random_weights`; a test pins their hashes. Knows
nothing of the engine.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.config import ModelConfig, RopeScaling
from engine.sources.model_directory import build_once, write_json, write_safetensors
from engine.sources.random_weights import WeightStatistics, weight_chunks

RECIPE = 1  # raised when the same config would give other bytes: caches then start anew
NUM_BYTES = 256  # token ids 0 .. 255 are the bytes themselves
BOS, EOS = 256, 257
STATISTICS = WeightStatistics(logit_std=2.75, query_key_std=2.0, branch_std=0.5)

_BASE = ModelConfig(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=320,  # not a power of two
    num_layers=2,
    num_heads=4,  # 4 * 64 differs from hidden_size
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    # Original context 64: wavelengths of 6 to 47000 tokens fall into all three bands, and prompts
    # reach past it.
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    max_position_embeddings=16384,
    tie_word_embeddings=True,
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
)

CONFIGS: dict[str, ModelConfig] = {
    "toy": _BASE,
    "toy-untied": replace(
        _BASE, tie_word_embeddings=False, vocab_size=331
    ),  # 331: no tile divides it
    "toy-mha": replace(_BASE, num_heads=3, num_kv_heads=3, hidden_size=192),
    "toy-gqa3": replace(_BASE, num_heads=9, num_kv_heads=3, hidden_size=576),
    "toy-gqa4": replace(_BASE, num_heads=8, num_kv_heads=2, hidden_size=256),
    "toy-gqa8": replace(_BASE, num_heads=8, num_kv_heads=1),
    "toy-plain-rope": replace(_BASE, rope_scaling=None),
    # Every reduction is longer than one chunk of 512 and none is a multiple of it: 704, 704 and
    # 832.
    "toy-wide": replace(
        _BASE, hidden_size=704, intermediate_size=832, num_heads=11, num_kv_heads=11
    ),
}


def resolve_toy(name: str, cache: Path) -> Path:
    """The directory of one toy, generated if the cache does not have it.

    Args:
        name: a key of `CONFIGS`.
        cache: where model directories are kept.
    """
    config = CONFIGS[name]
    return build_once(
        cache / f"{name}-{_recipe_hash(name, config)}", lambda to: _build(to, name, config)
    )


def config_json(config: ModelConfig) -> dict[str, Any]:
    """A config in the form of `config.json`, readable by any version of transformers."""
    rope_scaling = None
    if config.rope_scaling is not None:
        rope_scaling = {"rope_type": "llama3", **asdict(config.rope_scaling)}
    eos = list(config.eos_token_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "torch_dtype": "bfloat16",
    }


def generation_config_json(config: ModelConfig) -> dict[str, Any]:
    """What `generation_config.json` says of a model that is decoded greedily."""
    whole = config_json(config)
    return {
        "bos_token_id": whole["bos_token_id"],
        "eos_token_id": whole["eos_token_id"],
        "do_sample": False,
    }


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer whose first 256 ids are the bytes and the rest are special tokens."""
    byte_of = _byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={byte_of[i]: i for i in range(NUM_BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    names += [f"<|reserved_{i}|>" for i in range(vocab_size - NUM_BYTES - len(names))]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names]
    )
    return tokenizer


def _byte_characters() -> list[str]:
    """What byte-level BPE writes for each byte: its own character if printable, or a free one."""
    printable = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    free = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(free)) for byte in range(NUM_BYTES)]


def _build(directory: Path, name: str, config: ModelConfig) -> None:
    write_json(directory / "config.json", config_json(config))
    write_json(directory / "generation_config.json", generation_config_json(config))
    byte_tokenizer(config.vocab_size).save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "clean_up_tokenization_spaces": False,
        },
    )
    write_safetensors(
        directory / "model.safetensors",
        config.weight_shapes(),
        lambda tensor: weight_chunks(config, STATISTICS, name, tensor),
    )


def _recipe_hash(name: str, config: ModelConfig) -> str:
    text = json.dumps([RECIPE, name, asdict(config), asdict(STATISTICS)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
