"""Small checkpoints, sound and damaged, written byte by byte."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.config import ModelConfig
from engine.errors import CheckpointError

# The smallest model there is: 11 tensors, 58 KB.
CONFIG = ModelConfig(
    vocab_size=5,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_ids=(),
)
SHAPES = CONFIG.weight_shapes()
NORM = "model.norm.weight"


def values_of(name: str) -> np.ndarray:
    """Different bits for every tensor, NaN and infinity patterns among them."""
    seed = list(SHAPES).index(name)
    shape = SHAPES[name]
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 2**16, shape).astype(np.uint16)


def parts_of(names: list[str]) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file with these tensors."""
    header: dict[str, Any] = {}
    data = b""
    for name in names:
        begin, data = len(data), data + values_of(name).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(SHAPES[name]),
            "data_offsets": [begin, len(data)],
        }
    return header, data


def write(
    path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None
) -> None:
    """A file with exactly this header, which may be any bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def sound_model(directory: Path) -> Path:
    """Makes it a model directory of one file, with nothing wrong."""
    write(directory / "model.safetensors", *parts_of(list(SHAPES)))
    return directory


def opened(directory: Path) -> Checkpoint:
    return open_checkpoint(directory, CONFIG)


def refusal(directory: Path) -> str:
    """The message with which a directory is refused; no descriptor stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError) as error:
        opened(directory)
    assert len(os.listdir("/proc/self/fd")) == before
    return str(error.value)
