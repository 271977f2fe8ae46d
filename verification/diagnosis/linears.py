"""Wrong linear layers: the weight, the input, the rounding, lost parts of the reduction."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from verification import budgets
from verification.diagnosis.scene import Guess, Scene, truncated
from verification.expected import Bounded
from verification.rounding import to_bf16
from verification.taps import LAYER_POINTS, POINT, RESIDUAL_IN
from verification.truth import LinearExpected, LinearTruth

CHUNK = 512  # docs/numerics.md: the reduction is cut into chunks of so many
STEP = 16  # values of K that a tensor-core step takes
TAILS = (8, 16, 32)  # values of K that a vector load or a step leaves over


def linear(scene: Scene) -> Iterator[Guess]:
    """What is known to go wrong in q, k, v, o, gate, up and down."""
    (x,), weight = scene.inputs(), scene.own_weight()
    yield from _lost_parts(x, weight, _bounded)
    yield Guess("the product truncated, not rounded", truncated(x.double() @ weight.double().T))
    yield Guess("sums kept in bfloat16", _bf16_sums(x, weight, 16))
    if x.shape[1] > CHUNK:
        yield Guess("sums of chunks kept in bfloat16", _bf16_sums(x, weight, CHUNK))
    for point in LAYER_POINTS:
        if point.hf_weight and point.operation == "linear" and point.name != scene.tap:
            other = scene.weight(point.weight(scene.layer))
            if other.shape == weight.shape:
                yield Guess(f"the product with the weight of {point.name}", _bounded(x, other))
    for layer in scene.other_layers():
        other = scene.own_weight(layer)
        yield Guess(f"the product with the weight of layer {layer}", _bounded(x, other))
    if weight.shape[0] == weight.shape[1]:
        yield Guess("the product with the weight transposed", _bounded(x, weight.T))
    for name in (RESIDUAL_IN, "attn_norm", "attn_residual", "mlp_norm", "gate", "up", "act"):
        is_own = name in POINT[scene.tap].inputs
        if not is_own and (name == RESIDUAL_IN or _precedes(name, scene.tap)):
            other = scene.source(name)
            if other.shape == x.shape:
                yield Guess(f"the product with {_words(name)} as input", _bounded(other, weight))


def linear_f32(scene: Scene) -> Iterator[Guess]:
    """What is known to go wrong in the logits."""
    (x,), weight = scene.inputs(), scene.own_weight()
    right = x.double() @ weight.double().T
    yield Guess("logits rounded to bfloat16", to_bf16(right).float())
    yield Guess("logits rounded to float16", right.half().float())
    yield from _lost_parts(x, weight, _bounded_f32)
    yield Guess("lm_head's rows one further on", _bounded_f32(x, weight.roll(-1, 0)))
    yield Guess("lm_head's rows one back", _bounded_f32(x, weight.roll(1, 0)))
    embedding = scene.weight("model.embed_tokens.weight")
    if not torch.equal(embedding, weight):
        yield Guess("the embedding table for the lm_head", _bounded_f32(x, embedding))
    residual = scene.run.inputs["mlp_residual", scene.num_layers - 1][scene.run.logit_rows]
    yield Guess(
        "logits of the residual: the final norm is left out", _bounded_f32(residual, weight)
    )


def _precedes(name: str, tap: str) -> bool:
    order = [point.name for point in LAYER_POINTS]
    return order.index(name) < order.index(tap)


def _words(name: str) -> str:
    return "the residual stream" if name == RESIDUAL_IN else name


def _lost_parts(
    x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Bounded]
) -> Iterator[Guess]:
    """Products whose reduction misses a part, each named by it."""
    in_features = x.shape[1]
    kept = torch.arange(in_features)
    for tail in TAILS:
        yield Guess(
            f"a product without the last {tail} of K",
            product(_only(x, kept < in_features - tail), weight),
        )
    is_kept = kept % STEP != STEP - 1
    yield Guess("a product without every sixteenth value of K", product(_only(x, is_kept), weight))
    if in_features > CHUNK:
        last = (in_features - 1) // CHUNK * CHUNK
        for tail in TAILS[:2]:
            is_kept = (kept % CHUNK < CHUNK - tail) & (kept < in_features - tail)
            words = f"a product without the last {tail} of each chunk of {CHUNK}"
            yield Guess(words, product(_only(x, is_kept), weight))
        yield Guess("a product without the last chunk of K", product(_only(x, kept < last), weight))
        yield Guess(
            "a product of the last chunk of K alone", product(_only(x, kept >= last), weight)
        )
        if last > CHUNK:
            first = product(_only(x, kept < CHUNK), weight)
            yield Guess("a product of the first chunk of K alone", first)


def _only(x: Tensor, is_kept: Tensor) -> Tensor:
    return torch.where(is_kept, x, 0)


def _bounded(x: Tensor, weight: Tensor) -> Bounded:
    (result,) = LinearTruth([weight])(x)
    return Bounded(result.value, lambda rows: budgets.linear(_rows(result, rows)))


def _bounded_f32(x: Tensor, weight: Tensor) -> Bounded:
    (result,) = LinearTruth([weight])(x)
    return Bounded(result.value, lambda rows: budgets.linear_f32(_rows(result, rows)))


def _rows(result: LinearExpected, rows: slice) -> LinearExpected:
    return replace(result, value=result.value[rows], condition=result.condition[rows])


def _bf16_sums(x: Tensor, weight: Tensor, step: int) -> Tensor:
    total = torch.zeros(len(x), len(weight))
    for k in range(0, x.shape[1], step):
        part = x[:, k : k + step].float() @ weight[:, k : k + step].float().T
        total = to_bf16(total + (to_bf16(part).float() if step == CHUNK else part)).float()
    return to_bf16(total)
