"""Wrong RMSNorms: eps, the mean, the weight, the rounding before it, the input."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from verification.diagnosis.scene import Guess, Scene
from verification.rounding import to_bf16
from verification.taps import POINT, RESIDUAL_IN

EPS = (1e-6, 1e-5, 0.0, 1e-8, 1e-12)  # those of other models, and forgetting
TAILS = (8, 16, 64)  # channels that a vector load or a warp leaves over


def guesses(scene: Scene) -> Iterator[Guess]:
    """What is known to go wrong in an RMSNorm."""
    (x,), weight, eps = scene.inputs(), scene.own_weight(), scene.config.rms_norm_eps
    yield Guess("RMSNorm without its weight", _norm(x, torch.ones_like(weight), eps))
    yield Guess("RMSNorm with weight 1 + w, as Gemma has it", _norm(x, weight.double() + 1, eps))
    yield Guess("RMSNorm with eps outside the root", _norm(x, weight, eps, is_outside=True))
    for other in EPS:
        if other != eps:
            yield Guess(f"RMSNorm with eps {other:g} for {eps:g}", _norm(x, weight, other))
    yield Guess("RMSNorm with the mean over n - 1", _norm(x, weight, eps, fewer=1))
    yield Guess("LayerNorm: the mean is subtracted", _norm(x, weight, eps, is_centred=True))
    yield Guess(
        "RMSNorm without the rounding before the weight", _norm(x, weight, eps, is_rounded=False)
    )
    yield Guess(
        "RMSNorm with the sum of squares in bfloat16", _norm(x, weight, eps, is_bf16_sum=True)
    )
    for tail in TAILS:
        if tail < x.shape[1]:
            words = f"RMSNorm whose sum of squares misses the last {tail} channels"
            yield Guess(words, _norm(x, weight, eps, tail=tail))
    yield Guess("RMSNorm left out: the input itself", x)
    yield from _other_weights(scene, x, weight, eps)
    yield from _other_inputs(scene, weight, eps)


def _norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    is_outside: bool = False,
    fewer: int = 0,
    is_centred: bool = False,
    is_rounded: bool = True,
    is_bf16_sum: bool = False,
    tail: int = 0,
) -> Tensor:
    wide, width = x.double(), x.shape[1]
    if is_centred:
        wide = wide - wide.mean(-1, keepdim=True)
    squares = wide[:, : width - tail].square()
    if is_bf16_sum:
        total = torch.zeros(len(x), 1, dtype=torch.float32)
        for column in squares.float().split(1, 1):
            total = to_bf16(total + column).float()
        mean = total.double() / width
    else:
        mean = squares.sum(-1, keepdim=True) / (width - fewer)
    eps = float(np.float32(eps))
    root = mean.sqrt() + eps if is_outside else (mean + eps).sqrt()
    inner = wide / root
    if not is_rounded:
        return to_bf16(inner * weight.double())
    return to_bf16(to_bf16(inner).double() * weight.double())


def _other_weights(scene: Scene, x: Tensor, weight: Tensor, eps: float) -> Iterator[Guess]:
    others = [("attn_norm", scene.layer), ("mlp_norm", scene.layer), ("final_norm", 0)]
    if scene.tap != "final_norm":
        others += [(scene.tap, layer) for layer in scene.other_layers()]
    else:
        others = [(name, scene.num_layers - 1) for name in ("attn_norm", "mlp_norm")]
    for tap, layer in others:
        if tap == scene.tap and layer == scene.layer:
            continue
        other = scene.weight(POINT[tap].weight(layer))
        if not torch.equal(other, weight):
            place = "" if tap == "final_norm" else f" of layer {layer}"
            yield Guess(f"RMSNorm with the weight of {tap}{place}", _norm(x, other, eps))


def _other_inputs(scene: Scene, weight: Tensor, eps: float) -> Iterator[Guess]:
    """Another tap of the residual stream, normalised."""
    names = {
        "mlp_norm": ("o", RESIDUAL_IN, "attn_norm"),
        "final_norm": ("down", "attn_residual"),
    }.get(scene.tap, ())
    for name in names:
        yield Guess(f"RMSNorm of {name}", _norm(scene.source(name), weight, eps))
    if scene.tap == "final_norm":
        last = scene.run.inputs["mlp_residual", scene.num_layers - 1]
        first = last[: len(scene.run.logit_rows)]
        yield Guess(
            "RMSNorm of the step's first rows, not of the wanted ones", _norm(first, weight, eps)
        )
