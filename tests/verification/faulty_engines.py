"""Engines with one operation done wrong, what is named first for each and what it is said to be."""

import math

import numpy as np
import torch

from tests.verification.fake_engine import FakeEngine
from verification.rounding import to_bf16


class AdjacentPairs(FakeEngine):
    def rotary_embedding(self, x, positions):
        cos, sin = (t[:, None, :].float() for t in self.cos_sin(positions))
        heads = x.view(len(x), -1, self.config.head_dim).float()
        a, b = heads[..., 0::2], heads[..., 1::2]
        pair = (a * cos - b * sin, b * cos + a * sin)
        return to_bf16(torch.stack(pair, -1).flatten(-2)).reshape(x.shape)


class RopePositionPlusOne(FakeEngine):
    def rotary_embedding(self, x, positions):
        return super().rotary_embedding(x, positions + 1)


class RopeInFloat32(FakeEngine):
    def cos_sin(self, positions):
        angle = positions.float()[:, None] * torch.from_numpy(self.inverse_frequencies())
        return angle.cos(), angle.sin()

    def rope_table(self, num_positions):
        return FakeEngine.rope_table(_Rounded(self), num_positions)


class _Rounded:
    """The table as it would be if only the rotation forgot to round."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def cos_sin(self, positions):
        return FakeEngine.cos_sin(self._engine, positions)


class NoLlama3Scaling(FakeEngine):
    def inverse_frequencies(self):
        exponent = np.arange(0, self.config.head_dim, 2, dtype=np.float32) / self.config.head_dim
        return (1 / np.power(self.config.rope_theta, exponent)).astype(np.float32)


class AnglesInBfloat16(FakeEngine):
    def inverse_frequencies(self):
        exact = torch.from_numpy(super().inverse_frequencies())
        return exact.bfloat16().float().numpy()


class EpsOutsideTheRoot(FakeEngine):
    def rms_norm(self, x, weight):
        wide = x.double()
        root = wide.square().mean(-1, keepdim=True).sqrt() + self.config.rms_norm_eps
        return to_bf16(to_bf16(wide / root).float() * weight.float())


class MeanOverOneLess(FakeEngine):
    def rms_norm(self, x, weight):
        n = x.shape[-1]
        wide = x.double()
        mean = wide.square().sum(-1, keepdim=True) / (n - 1)
        inner = to_bf16(wide / (mean + self.config.rms_norm_eps).sqrt())
        return to_bf16(inner.float() * weight.float())


class NormRoundedOnce(FakeEngine):
    def rms_norm(self, x, weight):
        wide = x.double()
        mean = wide.square().mean(-1, keepdim=True)
        return to_bf16(wide / (mean + self.config.rms_norm_eps).sqrt() * weight.double())


class HeadsDealtInTurn(FakeEngine):
    def kv_head(self, head):
        return head % self.config.num_kv_heads


class SeesTheNextToken(FakeEngine):
    def num_keys(self, position):
        return position + 1 if self.is_decode else position + 2


class MissesItself(FakeEngine):
    def num_keys(self, position):
        return max(position, 1)


class MissesTheFirstKey(FakeEngine):
    def slots_of(self, table, num_keys):
        slots = super().slots_of(table, num_keys)
        return slots[1:] if num_keys > 1 else slots


class MissesTheNewestKeyInDecode(FakeEngine):
    def num_keys(self, position):
        return max(position, 1) if self.is_decode else position + 1


class OneSlotTooMany(FakeEngine):
    def slots_of(self, table, num_keys):
        slots = super().slots_of(table, num_keys)
        return torch.cat((slots, slots[-1:] ^ 1)) if self.is_decode else slots


class ScaleFivePercentOff(FakeEngine):
    def scale(self):
        return super().scale() * 1.05


class NoScale(FakeEngine):
    def scale(self):
        return math.log2(math.e)


class IgnoresTheBlockTable(FakeEngine):
    def slots_of(self, table, num_keys):
        return torch.arange(num_keys)


class Truncates(FakeEngine):
    def linear(self, tap, layer, x):
        wide = (x.double() @ self.weight(tap, layer).double().T).float()
        return (wide.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


class AccumulatesInBfloat16(FakeEngine):
    def linear(self, tap, layer, x):
        total = torch.zeros(len(x), len(self.weight(tap, layer)))
        for k in range(0, x.shape[1], 16):
            part = x[:, k : k + 16].float() @ self.weight(tap, layer)[:, k : k + 16].float().T
            total = to_bf16(total + part).float()
        return to_bf16(total)


class DropsTheTail(FakeEngine):
    def linear(self, tap, layer, x):
        x = x.clone()
        x[:, -8:] = 0
        return super().linear(tap, layer, x)


class DeadColumn(FakeEngine):
    def linear(self, tap, layer, x):
        out = super().linear(tap, layer, x)
        if (tap, layer) == ("down", 1):
            out[:, 77] = 0
        return out


class SwapsGateAndUp(FakeEngine):
    def silu_and_mul(self, gate, up):
        return super().silu_and_mul(up, gate)


class BiasedExponential(FakeEngine):
    def silu_and_mul(self, gate, up):
        wide = gate.double()
        silu = wide / (1 + (-wide).exp() * 1.004)
        return to_bf16(to_bf16(silu).float() * up.float())


class SiluNotRounded(FakeEngine):
    def silu_and_mul(self, gate, up):
        wide = gate.double()
        return to_bf16(wide * torch.sigmoid(wide) * up.double())


class NoResidual(FakeEngine):
    def residual_add(self, x, y):
        return y


class TruncatedResidual(FakeEngine):
    def residual_add(self, x, y):
        total = x.float() + y.float()
        return (total.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


class WrongSlotOnTheSecondBlock(FakeEngine):
    def write_kv_cache(self, layer, slots, k, v):
        if layer == 1:
            slots = slots ^ 1
        super().write_kv_cache(layer, slots, k, v)


class ValuesCachedInEightBits(FakeEngine):
    def write_kv_cache(self, layer, slots, k, v):
        super().write_kv_cache(layer, slots, k, v.to(torch.float8_e4m3fn).to(torch.bfloat16))


class WritesBesideTheTable(FakeEngine):
    def write_kv_cache(self, layer, slots, k, v):
        super().write_kv_cache(layer, slots, k, v)
        poisoned = self.k_cache[layer, :, 0, 0].isnan().nonzero()[:, 0]
        self.k_cache[layer, poisoned] = 0


class NextRowOfTheTable(FakeEngine):
    def embedding(self, ids):
        return super().embedding(ids + 1)


class RoundedLogits(FakeEngine):
    def logits(self, x):
        return to_bf16(super().logits(x)).float()


class SecondBest(FakeEngine):
    def argmax(self, logits):
        return logits.topk(2, -1).indices[:, 1].numpy().astype(np.int32)


class LayerZerosNormInLayerOne(FakeEngine):
    def weight(self, tap, layer):
        return super().weight(tap, 0 if tap == "mlp_norm" else layer)


class FinalNormSkipsTheWeight(FakeEngine):
    def weight(self, tap, layer):
        weight = super().weight(tap, layer)
        return torch.ones_like(weight) if tap == "final_norm" else weight


# Engine, operator, tap, layer, a part of the diagnosis; None: no known variant.
FAULTS = [
    (NoLlama3Scaling, "rope_table", "rope_table", 0, "no llama3 scaling"),
    (AnglesInBfloat16, "rope_table", "rope_table", 0, "frequencies in bfloat16"),
    (NextRowOfTheTable, "embedding", "embed", 0, "the row after each token's"),
    (EpsOutsideTheRoot, "rms_norm", "attn_norm", 0, "eps outside the root"),
    (MeanOverOneLess, "rms_norm", "attn_norm", 0, "the mean over n - 1"),
    (NormRoundedOnce, "rms_norm", "attn_norm", 0, "without the rounding before the weight"),
    (LayerZerosNormInLayerOne, "rms_norm", "mlp_norm", 1, "the weight of mlp_norm of layer 0"),
    (FinalNormSkipsTheWeight, "rms_norm", "final_norm", 0, "without its weight"),
    (Truncates, "linear", "q", 0, "truncated, not rounded"),
    (AccumulatesInBfloat16, "linear", "q", 0, "sums kept in bfloat16"),
    (DropsTheTail, "linear", "q", 0, "without the last 8 of K"),
    (DeadColumn, "linear", "down", 1, None),
    (AdjacentPairs, "rotary_embedding", "q_rope", 0, "adjacent-pair RoPE"),
    (RopePositionPlusOne, "rotary_embedding", "q_rope", 0, "position + 1"),
    (RopeInFloat32, "rotary_embedding", "q_rope", 0, "cos and sin not rounded"),
    (
        WrongSlotOnTheSecondBlock,
        "write_kv_cache",
        "write_kv_cache",
        1,
        "neighbouring slots exchanged",
    ),
    (ValuesCachedInEightBits, "write_kv_cache", "write_kv_cache", 0, "V stored in eight bits"),
    (WritesBesideTheTable, "write_kv_cache", "write_kv_cache", 0, None),
    (HeadsDealtInTurn, "attention", "attn", 0, "head % num_kv_heads"),
    (SeesTheNextToken, "attention", "attn", 0, "sees the next token"),
    (MissesItself, "attention", "attn", 0, "misses the newest key"),
    (MissesTheFirstKey, "attention", "attn", 0, "misses the first key"),
    (MissesTheNewestKeyInDecode, "attention", "attn", 0, "misses the newest key"),
    (OneSlotTooMany, "attention", "attn", 0, None),
    (ScaleFivePercentOff, "attention", "attn", 0, None),
    (NoScale, "attention", "attn", 0, "without 1 / sqrt(head_dim)"),
    (IgnoresTheBlockTable, "attention", "attn", 0, None),
    (NoResidual, "residual_add", "attn_residual", 0, "the branch alone"),
    (TruncatedResidual, "residual_add", "attn_residual", 0, "truncated, not rounded"),
    (SwapsGateAndUp, "silu_and_mul", "act", 0, "gate and up are swapped"),
    (BiasedExponential, "silu_and_mul", "act", 0, None),
    (SiluNotRounded, "silu_and_mul", "act", 0, "without the rounding between"),
    (RoundedLogits, "linear_f32", "logits", 0, "rounded to bfloat16"),
    (SecondBest, "argmax", "argmax", 0, "the second largest"),
]
