"""One fault in the result of one operator: what is done to its values.

Each takes what the operator gave, and gives what a faulty one would have; knows no engine and no
verdict. A fault is meant to be one that no rounding explains: a flipped bit is one of a value no
smaller than its row's median, and not among the lowest four.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig
from verification.rounding import to_bf16
from verification.taps import POINT, TapKey
from verification.truth import attention

LOWEST_BIT = 4  # of bfloat16: a change of 1/8 of the value
BLOCK = 64  # channels: a head, or as many
CHUNK = 512  # values of K, docs/numerics.md


@dataclass(frozen=True)
class Place:
    """Where a fault is planted, and what the operator there reads.

    Args:
        inputs: the values of its input taps, all rows of one sequence.
        weight: its weight, or None.
    """

    key: TapKey
    config: ModelConfig
    inputs: tuple[Tensor, ...]
    weight: Tensor | None


Damage = Callable[[Tensor, Place], Tensor]


def faults_of_values() -> dict[str, Damage]:
    """The faults that look at nothing but the values, whatever rows there are."""
    return {"bit flip": bit_flip, "swapped heads": swapped_heads, "scaled by 1.01": scaled}


def faults_at(tap: str) -> dict[str, Damage]:
    """The faults that a tap can have, by name."""
    every: dict[str, Damage] = {
        "bit flip": bit_flip,
        "wrong row": wrong_row,
        "swapped heads": swapped_heads,
        "scaled by 1.01": scaled,
        "dropped chunk": dropped_chunk,
    }
    return every | {"stale key": stale_key} if tap == "attn" else every


def _random(place: Place) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(place.key).encode()))


def bit_flip(clean: Tensor, place: Place) -> Tensor:
    """One bit of one value of the last row."""
    random, damaged = _random(place), clean.clone()
    row = damaged[-1]
    large = (row.abs() >= row.abs().median()).nonzero()[:, 0]
    column = int(large[random.integers(len(large))])
    bit = int(random.integers(LOWEST_BIT, 16))
    if clean.dtype == torch.float32:  # logits: the upper half is a bfloat16
        row.numpy().view(np.uint32)[column] ^= np.uint32(1 << (bit + 16))
    else:
        row.view(torch.uint16).numpy()[column] ^= np.uint16(1 << bit)
    return damaged


def wrong_row(clean: Tensor, place: Place) -> Tensor:
    """The last row is the one before."""
    damaged = clean.clone()
    damaged[-1] = clean[-2]
    return damaged


def swapped_heads(clean: Tensor, place: Place) -> Tensor:
    """The first and the last head, or as many channels, exchanged in every row."""
    damaged, block = clean.clone(), min(BLOCK, clean.shape[1] // 2)  # one head: its halves
    damaged[:, :block], damaged[:, -block:] = clean[:, -block:], clean[:, :block]
    return damaged


def scaled(clean: Tensor, place: Place) -> Tensor:
    """Every value times 1.01."""
    return (clean.float() * 1.01).to(clean.dtype)


def dropped_chunk(clean: Tensor, place: Place) -> Tensor:
    """A part of the work left out.

    Linear layers lack the last chunk of K, attention the first half of the keys, and the others do
    not write their last channels.
    """
    operation = POINT[place.key[0]].operation
    if operation in ("linear", "linear_f32"):
        (x,), weight = place.inputs, place.weight
        kept = (x.shape[1] - 1) // CHUNK * CHUNK or x.shape[1] - BLOCK
        value = x[:, :kept].double() @ weight[:, :kept].double().T
        return value.float() if operation == "linear_f32" else to_bf16(value)
    if operation == "attention":
        return _attention(place, first_key=len(clean) // 2)
    damaged = clean.clone()
    damaged[:, -BLOCK:] = 0
    return damaged


def stale_key(clean: Tensor, place: Place) -> Tensor:
    """Attention whose last key but one is that of the first token."""
    return _attention(place, stale=len(clean) - 2)


def _attention(place: Place, first_key: int = 0, stale: int | None = None) -> Tensor:
    q, k, v = place.inputs
    if stale is not None:
        k = k.clone()
        k[stale] = k[0]
    at, keys = torch.arange(len(q))[:, None], torch.arange(len(q))[None, :]
    visible = (keys <= at) & ((keys >= first_key) | (at < first_key))
    found = attention(q, k, v, 0, place.config.head_dim, visible=visible)
    return to_bf16(found.value)
