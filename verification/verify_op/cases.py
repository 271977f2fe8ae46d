"""Inputs for one operation alone: boundary shapes, structured values, extremes.

Each case has its arguments and what they should give; knows no engine and judges nothing. Shapes
stand on either side of what launches are cut by: warps, vector loads, tiles, blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verification import budgets, replay
from verification.expected import Bounded
from verification.replay import Replayed
from verification.rounding import to_bf16
from verification.truth import LinearExpected, LinearTruth
from verification.verify_op.passes import bits_of

ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
WIDTHS = (64, 128, 192, 576, 1024, 2048, 2112)  # multiples of 64, as the engine takes them
SCALES = (1e-3, 3e-3, 0.02, 1.0, 1e3)
EPS = 1e-5
SEED = 29


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        name: what is special about it.
        arguments: as of the method of engine.ops.Ops.
        expected: a replay, float64 with budgets, or int64 ids; None: only memory and repetition
            are judged.
    """

    name: str
    arguments: tuple[object, ...]
    expected: Replayed | Bounded | Tensor


def cases_of(operation: str) -> Iterator[Case]:
    """The cases of an operation; none for those whose inputs come from models alone."""
    make = _CASES.get(operation)
    return iter(()) if make is None else make(torch.Generator().manual_seed(SEED))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return to_bf16(torch.randn(*shape, generator=generator))


def _shapes() -> Iterator[tuple[int, int]]:
    """Every number of rows at one odd width, every width at one odd number of rows."""
    yield from ((rows, 320) for rows in ROWS)
    yield from ((17, width) for width in WIDTHS)


def _rms_norm(generator: torch.Generator) -> Iterator[Case]:
    def case(name: str, x: Tensor, eps: float = EPS) -> Case:
        weight = _normal(generator, x.shape[1])
        expected = replay.rms_norm(x, weight, eps)
        return Case(name, (bits_of(x), bits_of(weight), eps), expected)

    for rows, width in _shapes():
        yield case(f"normal values, {rows} x {width}", _normal(generator, rows, width))
    for scale in SCALES:
        x = to_bf16(_normal(generator, 16, 576).float() * scale)
        yield case(f"rows of root mean square {scale:g}", x)
        massive = x.clone()
        massive[:, 5] = 300 * scale
        yield case(f"one massive channel, the rest {scale:g}", massive)
    yield case("eps 1e-6", _normal(generator, 16, 576), 1e-6)
    rows = _normal(generator, 8, 576)
    rows[::2] = 0
    yield case("rows of zeros", rows)


def _linear(generator: torch.Generator, is_f32: bool = False) -> Iterator[Case]:
    def exact(name: str, x: Tensor, weight: Tensor) -> Case:
        """Every partial sum is below 2^24 and exact: any order gives these bits."""
        wide = (x.double() @ weight.double().T).float()
        value = wide if is_f32 else to_bf16(wide)
        return Case(name, (bits_of(x), bits_of(weight)), Replayed(value))

    def bounded(name: str, x: Tensor, weight: Tensor) -> Case:
        (result,) = LinearTruth([weight])(x)
        rule = budgets.linear_f32 if is_f32 else budgets.linear

        def budget(rows: slice) -> Tensor:
            cut = (result.value[rows], result.condition[rows])
            return rule(LinearExpected(*cut, result.in_features))

        return Case(name, (bits_of(x), bits_of(weight)), Bounded(result.value, budget))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).to(torch.bfloat16)

    for rows, width in _shapes():
        x, weight = integers(rows, width), integers(48 + rows % 3 * 16, width)
        yield exact(f"integers, {rows} x {width}", x, weight)
    for outputs in (1, 7, 8, 15, 16, 17, 63, 64, 65, 127, 129):
        yield exact(f"integers, {outputs} outputs", integers(9, 192), integers(outputs, 192))
    for k in (16, 32, 48, 80, 496, 512, 528, 1040, 8192):
        yield exact(f"integers, K = {k}", integers(5, k), integers(24, k))
    for k in (64, 576):
        one_hot = torch.eye(k, dtype=torch.bfloat16)
        yield exact(
            f"one-hot rows, K = {k}: each reads a column", one_hot, _normal(generator, 33, k)
        )
    for rows in (1, 16, 33):
        x, weight = _normal(generator, rows, 1536), _normal(generator, 200, 1536)
        yield bounded(f"normal values, {rows} x 1536", x, weight)
    cancels = torch.cat((_normal(generator, 16, 256),) * 2, 1)
    weight = _normal(generator, 64, 256)
    yield bounded("sums that cancel", cancels, torch.cat((weight, -weight), 1))


def _silu_and_mul(generator: torch.Generator) -> Iterator[Case]:
    def case(name: str, gate: Tensor, up: Tensor) -> Case:
        return Case(name, (bits_of(gate), bits_of(up)), replay.silu_and_mul(gate, up))

    for rows, width in _shapes():
        gate, up = _normal(generator, rows, width), _normal(generator, rows, width)
        yield case(f"normal values, {rows} x {width}", gate, up)
    for scale in (1e-3, 4.0, 15.0):  # beyond 88 a float32 exp overflows
        gate = to_bf16(_normal(generator, 16, 576).float() * scale)
        yield case(f"gates of {scale:g}", gate, _normal(generator, 16, 576))
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    finite = every[every.isfinite() & (every.abs() < 80)][:32768].view(-1, 64)
    yield case("every gate below 80 in one half of bfloat16", finite, torch.ones_like(finite))


def _residual_add(generator: torch.Generator) -> Iterator[Case]:
    def case(name: str, x: Tensor, y: Tensor) -> Case:
        return Case(name, (bits_of(x), bits_of(y)), replay.residual_add(x, y))

    for rows, width in _shapes():
        x, y = _normal(generator, rows, width), _normal(generator, rows, width)
        yield case(f"normal values, {rows} x {width}", x, y)
    one = torch.full((4, 64), 1.0).bfloat16()
    for name, small in (
        ("half an ulp: ties to even", 2.0**-8),
        ("just above", 2.0**-8 * 1.0078125),
    ):
        yield case(name, one, torch.full_like(one, small))
        yield case(f"{name}, odd", one * 1.0078125, torch.full_like(one, small))
    x = _normal(generator, 16, 64)
    yield case("sums that cancel", x, -x)
    huge = torch.full((2, 64), 3e38).bfloat16()
    yield case("sums that overflow", huge, huge)


def _embedding(generator: torch.Generator) -> Iterator[Case]:
    for rows, width in _shapes():
        table = _normal(generator, 97, width)
        ids = torch.randint(0, 97, (rows,), generator=generator)
        ids[0], ids[-1] = 96, 0
        name = f"{rows} ids, width {width}, both ends of the table"
        arguments = (bits_of(table), ids.to(torch.int32).numpy())
        yield Case(name, arguments, replay.embedding(table, ids))


def _rotary_embedding(generator: torch.Generator) -> Iterator[Case]:
    positions = (0, 1, 2, 63, 64, 127, 128, 2047, 2048, 8191, 8192)
    frequency = 1.0 / 10000.0 ** (torch.arange(0, 64, 2).double() / 64)
    angle = torch.arange(8193).double()[:, None] * frequency
    cos, sin = to_bf16(angle.cos()), to_bf16(angle.sin())
    table = bits_of(torch.cat((cos, sin), 1))
    for heads in (1, 2, 3, 8, 32):
        for rows in (1, 3, 16, 33, 129):
            at = torch.tensor([positions[i % len(positions)] for i in range(rows)])
            x = _normal(generator, rows, heads * 64)
            expected = replay.rotary_embedding(x, cos[at], sin[at], 64)
            shaped = Replayed(expected.value.view(rows, heads, 64))
            arguments = (bits_of(x).reshape(rows, heads, 64), table, at.to(torch.int32).numpy())
            yield Case(f"{rows} tokens, {heads} heads, shuffled positions", arguments, shaped)


def _argmax(generator: torch.Generator) -> Iterator[Case]:
    def case(name: str, logits: Tensor) -> Case:
        best = torch.from_numpy(logits.numpy().argmax(-1))  # the lowest; a NaN before any number
        return Case(name, (logits.numpy(),), best)

    for rows in (1, 2, 17, 129):
        for width in (1, 2, 31, 32, 33, 1023, 1024, 1025, 49152):
            logits = torch.randn(rows, width, generator=generator)
            yield case(f"normal values, {rows} x {width}", logits)
    for width in (331, 4096):
        ties = torch.randint(0, 4, (33, width), generator=generator).float()
        yield case(f"ties among {width}: the lowest id", ties)
        yield case(f"all equal, {width}", torch.zeros(5, width))
        yield case(f"all negative, {width}", -1 - torch.rand(5, width, generator=generator))
        ends = torch.zeros(2, width)
        ends[0, 0] = ends[1, -1] = 1.0
        yield case(f"first and last of {width}", ends)
        odd = torch.randn(3, width, generator=generator)
        odd[0, 7], odd[1, width // 2], odd[2] = np.inf, np.nan, -np.inf
        yield case(f"infinity, NaN and nothing but -infinity among {width}", odd)


_CASES: dict[str, Callable[[torch.Generator], Iterator[Case]]] = {
    "rms_norm": _rms_norm,
    "linear": _linear,
    "linear_f32": lambda generator: _linear(generator, is_f32=True),
    "silu_and_mul": _silu_and_mul,
    "residual_add": _residual_add,
    "embedding": _embedding,
    "rotary_embedding": _rotary_embedding,
    "argmax": _argmax,
}
