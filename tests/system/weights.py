"""Engines with weights of a test's own making."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Engine, Library, Tap
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.models import resolve
from tests.system.trace import tokens

Weights = dict[str, np.ndarray]
TEXT = tokens(8, 30)
ROOM = EngineConfig(
    "cpu", num_blocks=4, max_seq_len=64, max_num_tokens=64, max_num_seqs=1, block_size=16
)


def load(name: str) -> tuple[ModelConfig, Weights]:
    directory = resolve(name)
    config = ModelConfig.from_directory(directory)
    with open_checkpoint(directory, config) as checkpoint:
        return config, {name: checkpoint.tensor(name).copy() for name in checkpoint.names()}


@contextmanager
def engine_of(library: Library, config: ModelConfig, weights: Weights) -> Iterator[Engine]:
    with Engine(library, config, ROOM) as engine:
        for name, values in weights.items():
            engine.load_weight(name, np.ascontiguousarray(values))
        engine.finish_loading()
        yield engine


def logits_of(
    library: Library, config: ModelConfig, weights: Weights, taps: tuple[Tap, ...] = ()
) -> np.ndarray:
    with engine_of(library, config, weights) as engine:
        logits = np.empty((len(TEXT), config.vocab_size), np.float32)
        batch = build_batch([SequenceSlice(TEXT, 0, [3, 1])], 16, "all")
        engine.forward(batch, taps, logits)
        return logits
