"""Llama 3.2 1B's exact config with seeded random weights, for parity and benchmarks on a GPU.

Holds the published dimensions and writes the 2.5 GB into the cache as a stream. It has no text: no
tokenizer is written, and token ids are its only input. Knows nothing of the engine.

Source: the config.json of meta-llama/Llama-3.2-1B-Instruct.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from engine.config import ModelConfig, RopeScaling
from engine.sources.model_directory import build_once, write_json, write_safetensors
from engine.sources.random_weights import WeightStatistics, weight_chunks
from engine.sources.toy import config_json, generation_config_json

NAME = "llama-3.2-1b-shape"
RECIPE = 1  # raised when the same config would give other bytes
STATISTICS = WeightStatistics(logit_std=2.75, query_key_std=2.0, branch_std=0.125)

CONFIG = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
)


def resolve_shape(cache: Path, progress: Callable[[str, int, int], None]) -> Path:
    """The directory of the random-weight Llama 3.2 1B, generated if the cache does not have it.

    Args:
        cache: where model directories are kept.
        progress: told the bytes written and the bytes in all.
    """
    return resolve_random(NAME, CONFIG, cache, progress)


def resolve_random(
    name: str, config: ModelConfig, cache: Path, progress: Callable[[str, int, int], None]
) -> Path:
    """The directory of a large random-weight model of any config."""

    def build(directory: Path) -> None:
        shapes = config.weight_shapes()
        total = 2 * sum(_num_values(shape) for shape in shapes.values())  # bytes
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress(f"generating {name}", done, total)

        write_json(directory / "config.json", config_json(config))
        write_json(directory / "generation_config.json", generation_config_json(config))
        write_safetensors(
            directory / "model.safetensors",
            shapes,
            lambda tensor: weight_chunks(config, STATISTICS, name, tensor),
            on_bytes,
        )

    return build_once(random_directory(name, config, cache), build)


def random_directory(name: str, config: ModelConfig, cache: Path) -> Path:
    """Where `resolve_random` puts a model; another recipe has another place."""
    text = json.dumps([RECIPE, name, asdict(config), asdict(STATISTICS)], sort_keys=True)
    return cache / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _num_values(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
