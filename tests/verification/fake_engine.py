"""A small engine in torch: right to the last rounding, and open to any fault a test wants to plant.

Everything between two declared roundings is float64, so its bits depend on no shape and no order.
Each operation is a method: a fault is a subclass that overrides one.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.bindings import Tap
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.model_runner import StepOutput
from verification.rounding import to_bf16
from verification.taps import POINT

TILE = 128
LOG2_E = math.log2(math.e)


class FakeEngine:
    """What the harness needs of an engine."""

    def __init__(self, directory: Path, room: EngineConfig) -> None:
        self.config = ModelConfig.from_directory(directory)
        self.engine_config = room
        self.block_size = room.block_size
        with open_checkpoint(directory, self.config) as checkpoint:
            self.weights = {
                name: torch.from_numpy(checkpoint.tensor(name).copy()).view(torch.bfloat16)
                for name in checkpoint.names()
            }
        c = self.config
        slots = (c.num_layers, room.num_blocks * room.block_size, c.num_kv_heads, c.head_dim)
        self.k_cache = torch.zeros(slots, dtype=torch.bfloat16)
        self.v_cache = torch.zeros(slots, dtype=torch.bfloat16)
        self.is_forced = False
        self.is_decode = False

    def weight(self, tap: str, layer: int) -> Tensor:
        name = POINT[tap].weight(layer)
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        return self.weights[name]

    # The operations.

    def embedding(self, ids: Tensor) -> Tensor:
        return self.weight("embed", 0)[ids]

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.double()
        eps = float(np.float32(self.config.rms_norm_eps))
        inner = to_bf16(wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt())
        return to_bf16(inner.float() * weight.float())

    def linear(self, tap: str, layer: int, x: Tensor) -> Tensor:
        return to_bf16(x.double() @ self.weight(tap, layer).double().T)

    def logits(self, x: Tensor) -> Tensor:
        return (x.double() @ self.weight("logits", 0).double().T).float()

    def inverse_frequencies(self) -> np.ndarray:
        c, one = self.config, np.float32(1)
        exponent = np.arange(0, c.head_dim, 2, dtype=np.float32) / np.float32(c.head_dim)
        f = one / np.power(c.rope_theta, exponent.astype(np.float64)).astype(np.float32)
        if c.rope_scaling is None:
            return f
        s = c.rope_scaling
        original = np.float32(s.original_max_position_embeddings)
        low, high = np.float32(s.low_freq_factor), np.float32(s.high_freq_factor)
        wavelength = np.float32(2 * np.pi) / f
        smooth = (original / wavelength - low) / (high - low)
        between = (one - smooth) * f / np.float32(s.factor) + smooth * f
        scaled = np.where(wavelength > original / low, f / np.float32(s.factor), between)
        return np.where(wavelength < original / high, f, scaled).astype(np.float32)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions.numpy().astype(np.float32)[:, None] * self.inverse_frequencies()
        wide = torch.from_numpy(angle).double()
        return to_bf16(wide.cos()), to_bf16(wide.sin())

    def rope_table(self, num_positions: int) -> np.ndarray:
        table = torch.cat(self.cos_sin(torch.arange(num_positions)), 1)
        return table.view(torch.uint16).numpy()

    def rotary_embedding(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (t[:, None, :].float() for t in self.cos_sin(positions))
        heads = x.view(len(x), -1, self.config.head_dim).float()
        a, b = heads.chunk(2, -1)
        first = to_bf16(a * cos).float() - to_bf16(b * sin).float()
        second = to_bf16(b * cos).float() + to_bf16(a * sin).float()
        return to_bf16(torch.cat((first, second), -1)).reshape(x.shape)

    def write_kv_cache(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.k_cache[layer, slots] = k
        self.v_cache[layer, slots] = v

    def slots_of(self, table: Tensor, num_keys: int) -> Tensor:
        """Cache slots of a sequence's positions."""
        positions = torch.arange(num_keys)
        return table[positions // self.block_size] * self.block_size + positions % self.block_size

    def num_keys(self, position: int) -> int:
        return position + 1

    def kv_head(self, head: int) -> int:
        return head // (self.config.num_heads // self.config.num_kv_heads)

    def scale(self) -> float:
        return LOG2_E / math.sqrt(self.config.head_dim)

    def attention(self, q: Tensor, layer: int, position: int, table: Tensor) -> Tensor:
        """One token: q [num_heads, head_dim]."""
        slots = self.slots_of(table, self.num_keys(position))
        heads = [self.kv_head(head) for head in range(self.config.num_heads)]
        k = self.k_cache[layer, slots][:, heads].double()  # [keys, heads, head_dim]
        v = self.v_cache[layer, slots][:, heads].double()
        scores = torch.einsum("hd,khd->hk", q.double(), k) * self.scale()
        out, total, top = 0.0, 0.0, scores.new_full((len(heads), 1), -math.inf)
        for start in range(0, scores.shape[1], TILE):
            tile = scores[:, start : start + TILE]
            m = tile.amax(-1, keepdim=True)
            p = to_bf16((tile - m).exp2()).double()
            new = torch.maximum(top, m)
            a, b = (top - new).exp2(), (m - new).exp2()
            content = torch.einsum("hk,khd->hd", p, v[start : start + TILE])
            out, total, top = (
                out * a + content * b,
                total * a + p.sum(-1, keepdim=True) * b,
                new,
            )
        return to_bf16(out / total)

    def residual_add(self, x: Tensor, y: Tensor) -> Tensor:
        return to_bf16(x.float() + y.float())

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        wide = gate.double()
        return to_bf16(to_bf16(wide * torch.sigmoid(wide)).float() * up.float())

    def argmax(self, logits: Tensor) -> np.ndarray:
        return logits.numpy().argmax(-1).astype(np.int32)

    # The step.

    def forward(self, batch: Batch, taps: Sequence[Tap] = ()) -> StepOutput:
        wanted = {(tap.point.name, tap.layer): tap for tap in taps}
        self.is_forced = any(tap.force is not None for tap in taps)
        self.is_decode = len(batch.input_ids) == len(batch.seq_lens)

        def tapped(name: str, layer: int, value: Tensor) -> Tensor:
            tap = wanted.get((name, layer))
            if tap is None:
                return value
            if tap.out is not None:
                tap.out[:] = value.contiguous().view(torch.uint16).numpy()
            if tap.force is None:
                return value
            return torch.from_numpy(tap.force).view(torch.bfloat16)

        positions = torch.from_numpy(batch.positions).long()
        slots = torch.from_numpy(batch.slot_mapping).long()
        c = self.config
        x = tapped("embed", 0, self.embedding(torch.from_numpy(batch.input_ids).long()))
        for layer in range(c.num_layers):

            def linear(name: str, x: Tensor, layer: int = layer) -> Tensor:
                return tapped(name, layer, self.linear(name, layer, x))

            h = tapped("attn_norm", layer, self.rms_norm(x, self.weight("attn_norm", layer)))
            q, k, v = (linear(name, h) for name in ("q", "k", "v"))
            q = tapped("q_rope", layer, self.rotary_embedding(q, positions))
            k = tapped("k_rope", layer, self.rotary_embedding(k, positions))
            shape = (len(x), c.num_kv_heads, c.head_dim)
            self.write_kv_cache(layer, slots, k.view(shape), v.view(shape))
            attn = tapped("attn", layer, self._attend(batch, q, layer))
            o = linear("o", attn)
            x = tapped("attn_residual", layer, self.residual_add(x, o))
            h = tapped("mlp_norm", layer, self.rms_norm(x, self.weight("mlp_norm", layer)))
            gate, up = linear("gate", h), linear("up", h)
            act = tapped("act", layer, self.silu_and_mul(gate, up))
            x = tapped("mlp_residual", layer, self.residual_add(x, linear("down", act)))
        x = x[torch.from_numpy(batch.logits_indices).long()]
        x = tapped("final_norm", 0, self.rms_norm(x, self.weight("final_norm", 0)))
        logits = self.logits(x)
        return StepOutput(logits.numpy(), self.argmax(logits))

    def _attend(self, batch: Batch, q: Tensor, layer: int) -> Tensor:
        heads = q.view(len(q), self.config.num_heads, self.config.head_dim)
        out = torch.empty_like(heads)
        for sequence, table in enumerate(torch.from_numpy(batch.block_tables).long()):
            for row in range(*batch.cu_seqlens_q[sequence : sequence + 2]):
                position = int(batch.positions[row])
                out[row] = self.attention(heads[row], layer, position, table)
        return out.view(q.shape)

    def read_kv(self, layer: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = torch.from_numpy(slots).long()
        return tuple(
            cache[layer, at].view(torch.uint16).numpy() for cache in (self.k_cache, self.v_cache)
        )

    def fill_blocks(self, block_ids: Sequence[int], value: int) -> None:
        pattern = torch.tensor(value, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
        for block in block_ids:
            at = slice(block * self.block_size, (block + 1) * self.block_size)
            self.k_cache[:, at] = pattern
            self.v_cache[:, at] = pattern
