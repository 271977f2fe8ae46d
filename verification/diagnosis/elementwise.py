"""Wrong embeddings, residual additions and SiLU products."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from verification.diagnosis.scene import Guess, Scene, truncated
from verification.rounding import to_bf16
from verification.taps import RESIDUAL_IN

LOG2_E = 1.4426950408889634


def embedding(scene: Scene) -> Iterator[Guess]:
    """What is known to go wrong in the look-up of rows."""
    table, ids = scene.own_weight(), scene.run.token_ids
    last = len(table) - 1
    yield Guess("the row after each token's", table[(ids + 1).clamp_max(last)], ids < last)
    yield Guess("the row before each token's", table[(ids - 1).clamp_min(0)], ids > 0)
    yield Guess("the step's first token everywhere", table[ids[:1].expand_as(ids)])
    yield Guess("the embedding times sqrt(hidden_size)", _scaled_embedding(table[ids]))
    yield Guess("the row of each token's position", table[scene.run.positions.clamp_max(last)])
    if scene.config.vocab_size > 1:
        yield Guess("the row of the previous token", table[ids.roll(1)], torch.arange(len(ids)) > 0)


def _scaled_embedding(rows: Tensor) -> Tensor:
    return to_bf16(rows.float() * to_bf16(torch.tensor(rows.shape[1] ** 0.5)).float())


def residual_add(scene: Scene) -> Iterator[Guess]:
    """What is known to go wrong where a branch joins the residual stream."""
    x, y = (t.float() for t in scene.inputs())
    yield Guess("the branch alone: the residual is missing", to_bf16(y))
    yield Guess("the residual alone: the branch is missing", to_bf16(x))
    yield Guess("the branch added twice", to_bf16(to_bf16(x + y).float() + y))
    yield Guess("the branch added twice, rounded once", to_bf16(x + 2 * y))
    yield Guess("the residual added twice", to_bf16(2 * x + y))
    yield Guess("the residual minus the branch", to_bf16(x - y))
    yield Guess("the sum truncated, not rounded", truncated(x + y))
    yield Guess("the sum rounded half away from zero", _half_away(x + y))
    others = {
        "attn_residual": (("attn_norm", "the normed value for the residual"),),
        "mlp_residual": (
            ("mlp_norm", "the normed value for the residual"),
            (RESIDUAL_IN, "the layer's input for the residual after attention"),
        ),
    }[scene.tap]
    for name, words in others:
        yield Guess(f"the sum with {words}", to_bf16(scene.source(name).float() + y))


def _half_away(total: Tensor) -> Tensor:
    bits = total.float().view(torch.int32)
    return ((bits + 0x8000) & -65536).view(torch.float32).to(torch.bfloat16)


def silu_and_mul(scene: Scene) -> Iterator[Guess]:
    """What is known to go wrong between gate and up."""
    gate, up = (t.double() for t in scene.inputs())

    def product(activated: Tensor, other: Tensor = up) -> Tensor:
        return to_bf16(to_bf16(activated).double() * other)

    silu = gate * torch.sigmoid(gate)
    yield Guess("SiLU(up) * gate: gate and up are swapped", product(up * torch.sigmoid(up), gate))
    yield Guess("SiLU * up without the rounding between", to_bf16(silu * up))
    yield Guess("GELU in place of SiLU", product(functional.gelu(gate)))
    yield Guess("GELU (tanh) in place of SiLU", product(functional.gelu(gate, approximate="tanh")))
    yield Guess("x sigmoid(1.702 x) in place of SiLU", product(gate * torch.sigmoid(1.702 * gate)))
    yield Guess("ReLU in place of SiLU", product(gate.relu()))
    yield Guess("sigmoid in place of SiLU", product(torch.sigmoid(gate)))
    yield Guess("SiLU with 2 for e", product(gate / (1 + (-gate).exp2())))
    yield Guess("SiLU with log2 e taken twice", product(gate / (1 + (-gate * LOG2_E).exp())))
    yield Guess("SiLU(gate) alone: up is missing", to_bf16(silu))
    yield Guess("gate * up: SiLU is missing", product(gate))
    yield Guess("SiLU * up truncated, not rounded", truncated(truncated(silu).double() * up))
