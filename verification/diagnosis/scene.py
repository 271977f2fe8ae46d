"""What a failed operation read, and what a guess about it is.

Knows passes, taps and weights; knows no variant and judges nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from verification.expected import Bounded, RopeRows
from verification.passes import Pass
from verification.replay import Replayed
from verification.taps import POINT, source_key

# A result, or a tensor that the output must equal to the bit.
Result = Replayed | Bounded | Tensor


@dataclass(frozen=True)
class Guess:
    """What a variant would have given.

    Args:
        words: completes "your output equals ".
        result: bfloat16 or float32 values, or values in float64 with their budget.
        rows: those on which the variant is defined, bool [rows]; None: all.
    """

    words: str
    result: Result
    rows: Tensor | None = None


@dataclass(frozen=True)
class Scene:
    """One tap of one pass.

    Args:
        weight: the checkpoint's name -> its values, bfloat16.
        rope: cos and sin that the engine shows, or transformers'.
    """

    config: ModelConfig
    tap: str
    layer: int
    run: Pass
    rope: RopeRows
    weight: Callable[[str], Tensor]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.config.num_layers

    def inputs(self) -> list[Tensor]:
        """What the operation read, in the order of Point.inputs; final_norm: the wanted rows."""
        return [self.source(name) for name in POINT[self.tap].inputs]

    def source(self, name: str) -> Tensor:
        """A tap of this layer, or RESIDUAL_IN, with the rows of this tap."""
        values = self.run.inputs[source_key(name, self.layer, self.num_layers, self.tap)]
        return values[self.run.logit_rows] if self.tap == "final_norm" else values

    def own_weight(self, layer: int | None = None) -> Tensor:
        """The tap's weight, of this or of another layer."""
        return self.weight(POINT[self.tap].weight(self.layer if layer is None else layer))

    def other_layers(self) -> Iterable[int]:
        """Layers whose weight might have been taken: the neighbours, the first and the last."""
        near = (self.layer - 1, self.layer + 1, 0, self.num_layers - 1)
        return [
            layer
            for layer in dict.fromkeys(near)
            if 0 <= layer < self.num_layers and layer != self.layer
        ]


def truncated(wide: Tensor) -> Tensor:
    """Values cut to bfloat16, toward zero, by way of float32."""
    return (wide.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
