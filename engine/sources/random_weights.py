"""Seeded random weights with the statistics of trained ones, the same bytes on every machine.

Decides every value from (seed, tensor name, position) alone. Only operations that IEEE rounds
exactly are used: integers from the Philox generator, sums and products; no function of a math
library. The statistics matter because faults hide in tame data: norm weights of both signs, a few
outlier channels, and gains that differ per layer and per head, so that swapping two of them shows;
queries and keys large enough for a peaky attention. Knows nothing of files.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (Philox), SC 2011.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.config import ModelConfig

CHUNK_VALUES = 1 << 20  # values made at a time: bounds the memory
SUM_MEAN = 4 * 65535 // 2  # of the sum of four uniform 16-bit integers
SUM_STD = 65536 / math.sqrt(3.0)  # sqrt(4/12) * 65536; sqrt is correctly rounded by IEEE


@dataclass(frozen=True)
class WeightStatistics:
    """How large the weights of a random model are."""

    logit_std: float  # spread of logits; with tied embeddings it sets the size of the embedding too
    query_key_std: float  # of q and k values at unit input; scores have about its square
    branch_std: float  # of what attention and the feed-forward add to the residual stream


def weight_chunks(
    config: ModelConfig, statistics: WeightStatistics, seed: str, name: str
) -> Iterator[np.ndarray]:
    """One tensor of `config.weight_shapes()`, whole rows at a time.

    Yields:
        bfloat16 bits as uint16, [rows, cols]; for a vector one chunk [1, size].
    """
    shape = config.weight_shapes()[name]
    if len(shape) == 1:
        yield _norm_weight(seed, name, shape[0])[np.newaxis]
        return
    rows, cols = shape
    std, row_gain, col_gain = _gains(config, statistics, seed, name)
    source = _generator(f"{seed}/{name}")
    rows_per_chunk = max(1, CHUNK_VALUES // cols)
    row_scale = (row_gain * (std / SUM_STD)).astype(np.float32)[:, np.newaxis]
    col_scale = col_gain.astype(np.float32)[np.newaxis, :]
    for begin in range(0, rows, rows_per_chunk):
        end = min(rows, begin + rows_per_chunk)
        values = _bell(source, (end - begin) * cols).reshape(end - begin, cols)
        values *= row_scale[begin:end]
        values *= col_scale
        yield to_bf16(values)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Finite float32 values as bfloat16 bits (uint16), rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _gains(
    config: ModelConfig, statistics: WeightStatistics, seed: str, name: str
) -> tuple[float, np.ndarray, np.ndarray]:
    """Standard deviation at gain 1, gain per row and gain per column of one matrix."""
    rows, cols = config.weight_shapes()[name]
    even_rows, even_cols = np.ones(rows), np.ones(cols)
    unit = 1.0 / math.sqrt(cols)  # unit input gives unit output
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return unit * statistics.logit_std, even_rows, even_cols
    layer_gain = _spread(f"{seed}/{name}/layer", 1, 0.75, 1.5)[0]
    module = name.split(".")[-2]
    if module in ("q_proj", "k_proj"):
        heads = _spread(f"{seed}/{name}/heads", rows // config.head_dim, 0.625, 1.625)
        return unit * statistics.query_key_std, np.repeat(heads, config.head_dim), even_cols
    if module == "v_proj":
        heads = _spread(f"{seed}/{name}/heads", rows // config.head_dim, 0.5, 2.0)
        return unit * layer_gain, np.repeat(heads, config.head_dim), even_cols
    if module == "o_proj":
        heads = _spread(f"{seed}/{name}/heads", cols // config.head_dim, 0.5, 2.0)
        rows_gain = _outliers(f"{seed}/outliers", rows)  # the same channels in every layer
        return (
            unit * layer_gain * statistics.branch_std,
            rows_gain,
            np.repeat(heads, config.head_dim),
        )
    if module == "down_proj":
        # silu(gate) * up has about half of unit size
        rows_gain = _outliers(f"{seed}/outliers", rows)
        return 2.0 * unit * layer_gain * statistics.branch_std, rows_gain, even_cols
    return unit * layer_gain, _spread(f"{seed}/{name}/rows", rows, 0.5, 1.5), even_cols


def _norm_weight(seed: str, name: str, size: int) -> np.ndarray:
    """Norm weights: around 1, an eighth negative, small in the outlier channels."""
    key = f"{seed}/{name}"
    magnitude = _spread(f"{key}/magnitude", size, 0.375, 1.625) / _outliers(
        f"{seed}/outliers", size
    )
    sign = np.where(_spread(f"{key}/sign", size, 0.0, 1.0) < 0.125, -1.0, 1.0)
    return to_bf16((magnitude * sign).astype(np.float32))


def _outliers(key: str, size: int) -> np.ndarray:
    """Gain 1, but 6 to 12 for one channel in 64 (at least two of 128)."""
    draw = _spread(key, size, 0.0, 1.0)
    chosen = np.argsort(draw, kind="stable")[: max(1, size // 64)]
    gains = np.ones(size)
    gains[chosen] = _spread(f"{key}/gain", len(chosen), 6.0, 12.0)
    return gains


def _spread(key: str, size: int, low: float, high: float) -> np.ndarray:
    """Uniform float64 values in [low, high), in steps of (high - low) / 65536."""
    draw = _generator(key).random_raw(size) >> np.uint64(48)
    return low + draw.astype(np.float64) * ((high - low) / 65536.0)


def _bell(source: np.random.Philox, count: int) -> np.ndarray:
    """Bell-shaped float32 integers: sums of four uniform 16-bit integers, less their mean."""
    pairs = source.random_raw(count)
    mask = np.uint64(0x0000FFFF0000FFFF)
    sums = (pairs & mask) + ((pairs >> np.uint64(16)) & mask)
    sums = (sums + (sums >> np.uint64(32))) & np.uint64(0xFFFFFFFF)
    return (sums.astype(np.int32) - SUM_MEAN).astype(np.float32)


def _generator(key: str) -> np.random.Philox:
    """The stream of raw 64-bit integers that belongs to a key."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))
