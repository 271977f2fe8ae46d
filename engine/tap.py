"""The named points of the forward pass, and one look at, or replacement of, a value there.

Source: csrc/include/engine.h, whose order and meaning these keep.
"""

import enum
from dataclasses import dataclass

import numpy as np


class TapPoint(enum.IntEnum):
    """The named points of the forward pass, in engine.h's order."""

    embed = 0
    attn_norm = 1
    q = 2
    k = 3
    v = 4
    q_rope = 5
    k_rope = 6
    attn = 7
    o = 8
    attn_residual = 9
    mlp_norm = 10
    gate = 11
    up = 12
    act = 13
    down = 14
    mlp_residual = 15
    final_norm = 16
    logits = 17


@dataclass(frozen=True)
class Tap:
    """One look at, or replacement of, a value of the forward pass.

    Args:
        point: where.
        layer: 0 .. num_layers - 1; 0 for embed, final_norm and logits.
        out: written with what the operation computed, [rows, width] uint16 (logits: float32).
        force: takes the value's place for everything that follows, same shape.
    """

    point: TapPoint
    layer: int
    out: np.ndarray | None = None
    force: np.ndarray | None = None
