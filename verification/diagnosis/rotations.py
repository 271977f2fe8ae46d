"""Wrong rotary embeddings: pairs, signs, positions, roundings, and wrong tables of cos and sin."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig
from verification import replay
from verification.diagnosis.scene import Guess, Scene
from verification.replay import Replayed
from verification.rounding import to_bf16

ROPE_THETAS = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0)  # those of well-known models
FACTORS = (8.0, 32.0)  # Llama 3.1 and 3.2


def rotary_embedding(scene: Scene) -> Iterator[Guess]:
    """What is known to go wrong in the rotation of queries and keys."""
    (x,), positions, head_dim = scene.inputs(), scene.run.positions, scene.config.head_dim
    num_rows = len(scene.rope.table)
    cos, sin = scene.rope.of(positions)

    def rotated(cos: Tensor, sin: Tensor, x: Tensor = x) -> Tensor:
        return replay.rotary_embedding(x, cos, sin, head_dim).value

    yield Guess("transformers with adjacent-pair RoPE", _adjacent_pairs(x, cos, sin, head_dim))
    yield Guess("adjacent-pair RoPE, halves written", _pairs_to_halves(x, cos, sin, head_dim))
    in_place = _pairs_in_place(x, cos, sin, head_dim)
    yield Guess("adjacent-pair RoPE, halves written over its own input", in_place)
    once = _adjacent_pairs(x, cos, sin, head_dim, are_rounded=False)
    yield Guess("transformers with adjacent-pair RoPE, rounded once", once)
    yield Guess("RoPE with the sine negated", rotated(cos, -sin))
    yield Guess("RoPE with the sine product added in the first half", _added(x, cos, sin, head_dim))
    yield Guess("RoPE with cos and sin exchanged", rotated(sin, cos))
    for step, words in ((1, "position + 1"), (-1, "position - 1")):
        moved = positions + step
        is_known = (moved >= 0) & (moved < num_rows)
        at = scene.rope.of(moved.clamp(0, num_rows - 1))
        yield Guess(f"RoPE at {words}", rotated(*at), is_known)
    start = torch.cat([torch.full((s.num_rows,), s.first_position) for s in scene.run.segments])
    yield Guess("RoPE whose positions restart at 0", rotated(*scene.rope.of(positions - start)))
    rows = torch.arange(len(x)).clamp_max(num_rows - 1)
    yield Guess("RoPE at the row of the step for the position", rotated(*scene.rope.of(rows)))
    yield Guess("no rotation: a copy of the input", x)
    yield Guess("RoPE with the products not rounded", _products_not_rounded(x, cos, sin, head_dim))
    partly = rotated(cos, sin).clone()
    partly[:, -head_dim:] = x[:, -head_dim:]
    yield Guess("RoPE with the last head left out", partly)
    partly = rotated(cos, sin).clone()
    partly[:, head_dim:] = x[:, head_dim:]
    yield Guess("RoPE of the first head alone", partly)
    yield Guess("RoPE applied twice", rotated(cos, sin, rotated(cos, sin)))
    for words, table in tables(scene.config, positions):
        yield Guess(f"RoPE with {words}", rotated(*table.chunk(2, 1)))
    wide = Angles(scene.config).wide(positions)
    yield Guess("RoPE with cos and sin not rounded", _products_rounded(x, *wide, head_dim))


def _halves(x: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    return x.view(len(x), -1, head_dim).float().chunk(2, -1)


def _adjacent_pairs(
    x: Tensor, cos: Tensor, sin: Tensor, head_dim: int, are_rounded: bool = True
) -> Tensor:
    c, s = cos[:, None, :].double(), sin[:, None, :].double()
    heads = x.view(len(x), -1, head_dim).double()
    a, b = heads[..., 0::2], heads[..., 1::2]

    def product(x: Tensor, y: Tensor) -> Tensor:
        return to_bf16(x * y).double() if are_rounded else x * y

    first, second = product(a, c) - product(b, s), product(b, c) + product(a, s)
    return to_bf16(torch.stack((first, second), -1).reshape(x.shape))


def _pairs_to_halves(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    pairs = _adjacent_pairs(x, cos, sin, head_dim).view(len(x), -1, head_dim // 2, 2)
    return pairs.transpose(-1, -2).reshape(x.shape)


def _pairs_in_place(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Pair after pair, so that later pairs read what earlier ones wrote."""
    heads, half = x.clone().view(len(x), -1, head_dim), head_dim // 2

    def product(x: Tensor, y: Tensor) -> Tensor:
        return to_bf16(x.float() * y[:, None].float()).float()

    for i in range(half):
        a, b, c, s = heads[..., 2 * i].clone(), heads[..., 2 * i + 1].clone(), cos[:, i], sin[:, i]
        heads[..., i] = to_bf16(product(a, c) - product(b, s))
        heads[..., half + i] = to_bf16(product(b, c) + product(a, s))
    return heads.view(x.shape)


def _added(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    c, s = cos[:, None, :].float(), sin[:, None, :].float()
    a, b = _halves(x, head_dim)
    first = to_bf16(a * c).float() + to_bf16(b * s).float()
    second = to_bf16(b * c).float() + to_bf16(a * s).float()
    return to_bf16(torch.cat((first, second), -1)).reshape(x.shape)


def _products_not_rounded(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    c, s = cos[:, None, :].double(), sin[:, None, :].double()
    a, b = (half.double() for half in _halves(x, head_dim))
    return to_bf16(torch.cat((a * c - b * s, b * c + a * s), -1)).reshape(x.shape)


def _products_rounded(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """As declared, but cos and sin come in float32."""
    c, s = cos[:, None, :], sin[:, None, :]
    a, b = _halves(x, head_dim)
    first = to_bf16(a * c).float() - to_bf16(b * s).float()
    second = to_bf16(b * c).float() + to_bf16(a * s).float()
    return to_bf16(torch.cat((first, second), -1)).reshape(x.shape)


@dataclass(frozen=True)
class Angles:
    """Rotary frequencies with one thing changed."""

    config: ModelConfig
    theta: float | None = None
    factor: float | None = None  # of llama3 scaling
    is_scaled: bool = True
    is_linear: bool = False  # every frequency divided by the factor
    is_smooth_swapped: bool = False
    has_smooth_band: bool = True
    is_sine_negated: bool = False
    has_two_pi: bool = True
    width: int | None = None  # for head_dim in the exponent
    kept: torch.dtype | None = None  # the precision frequencies pass through

    def frequencies(self) -> Tensor:
        """float32 [head_dim / 2], as transformers rounds them."""
        one = np.float32(1)
        exponent = np.arange(0, self.config.head_dim, 2, dtype=np.float32)
        exponent /= np.float32(self.width or self.config.head_dim)
        theta = self.theta or self.config.rope_theta
        f = one / np.power(theta, exponent.astype(np.float64)).astype(np.float32)
        scaling = self.config.rope_scaling
        if scaling is not None and self.is_scaled:
            f = self._scaled(f, scaling)
        found = torch.from_numpy(f.astype(np.float32))
        if self.is_sine_negated:
            found = -found
        return found if self.kept is None else found.to(self.kept).float()

    def _scaled(self, f: np.ndarray, scaling: object) -> np.ndarray:
        one, factor = np.float32(1), np.float32(self.factor or scaling.factor)
        if self.is_linear:
            return f / factor
        original = np.float32(scaling.original_max_position_embeddings)
        low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
        wavelength = (one / f) * (np.float32(2 * np.pi) if self.has_two_pi else one)
        smooth = ((one / wavelength) * original - low) / (high - low)
        ends = (smooth, one - smooth) if self.is_smooth_swapped else (one - smooth, smooth)
        between = ends[0] * f / factor + ends[1] * f if self.has_smooth_band else f / factor
        scaled = np.where(wavelength > original / low, f / factor, between)
        return np.where(wavelength < original / high, f, scaled)

    def wide(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin in float32 of float32 angles."""
        angle = (positions.float()[:, None] * self.frequencies()).double()
        return angle.cos().float(), angle.sin().float()

    def table(self, positions: Tensor) -> Tensor:
        """Cos beside sin, bfloat16 [positions, head_dim]."""
        return to_bf16(torch.cat(self.wide(positions), 1))


def _changes(config: ModelConfig) -> Iterator[tuple[str, Angles]]:
    for theta in ROPE_THETAS:
        if theta != config.rope_theta:
            words = f"rope_theta {theta:g} for {config.rope_theta:g}"
            yield words, Angles(config, theta=theta)
    scaling = config.rope_scaling
    if scaling is not None:
        yield "no llama3 scaling", Angles(config, is_scaled=False)
        for factor in FACTORS:
            if factor != scaling.factor:
                words = f"factor {factor:g} for {scaling.factor:g}"
                yield words, Angles(config, factor=factor)
        yield "every frequency divided by the factor", Angles(config, is_linear=True)
        yield "the smooth factor's ends swapped", Angles(config, is_smooth_swapped=True)
        yield "no smooth band: it is divided whole", Angles(config, has_smooth_band=False)
        yield "wavelengths without 2 pi", Angles(config, has_two_pi=False)
    yield "frequencies in bfloat16", Angles(config, kept=torch.bfloat16)
    yield "frequencies in float16", Angles(config, kept=torch.float16)
    yield "hidden_size for head_dim in the exponent", Angles(config, width=config.hidden_size)
    yield "head_dim / 2 in the exponent", Angles(config, width=config.head_dim // 2)


def tables(config: ModelConfig, positions: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Wrong tables in words, bfloat16 [positions, head_dim]: cos, then sin."""
    for words, angles in _changes(config):
        yield words, angles.table(positions)


def rope_table(config: ModelConfig, positions: Tensor) -> Iterator[Guess]:
    """What is known to go wrong in the table of cos and sin of some positions."""
    right = Angles(config)

    def table(angles: Angles, positions: Tensor = positions) -> Replayed:
        cos, sin = angles.table(positions).chunk(2, 1)
        return replay.rope_table(cos, sin, positions, angles.frequencies())

    for words, angles in _changes(config):
        yield Guess(f"transformers' table with {words}", table(angles))
    yield Guess("the table one position late", table(right, positions + 1))
    early = positions - 1
    yield Guess("the table one position early", table(right, early.clamp_min(0)), early >= 0)
    cos, sin = right.table(positions).chunk(2, 1)
    yield Guess("the table with the sine negated", table(Angles(config, is_sine_negated=True)))
    yield Guess("the table with sin before cos", torch.cat((sin, cos), 1))
    yield Guess("cos and sin interleaved", torch.stack((cos, sin), -1).flatten(1))
    angle = to_bf16(positions.float()[:, None] * right.frequencies()).double()
    yield Guess("the angle rounded to bfloat16", to_bf16(torch.cat((angle.cos(), angle.sin()), 1)))
