"""Wrong cache contents and wrong choices of the largest logit."""

from collections.abc import Iterator

import torch
from torch import Tensor

from verification.diagnosis.scene import Guess
from verification.passes import Pass
from verification.rounding import to_bf16


def write_kv_cache(run: Pass, layer: int, index: int) -> Iterator[Guess]:
    """What is known to go wrong in cached K beside V of one sequence, [positions, 2 * width]."""
    k, v = run.keys(layer, index)

    def beside(key: Tensor, value: Tensor) -> Tensor:
        return torch.cat((key, value), 1)

    yield Guess("K in the place of V", beside(k, k))
    yield Guess("V in the place of K", beside(v, v))
    yield Guess("K and V exchanged", beside(v, k))
    later = torch.arange(len(k)) > 0
    yield Guess("each token's K and V one slot late", beside(k.roll(1, 0), v.roll(1, 0)), later)
    pairs = torch.arange(len(k)) ^ 1
    known = pairs < len(k)
    pairs = pairs.clamp_max(len(k) - 1)
    yield Guess("neighbouring slots exchanged", beside(k[pairs], v[pairs]), known)
    eight = v.to(torch.float8_e4m3fn).to(torch.bfloat16)
    yield Guess("V stored in eight bits", beside(k, eight))
    yield Guess(
        "K and V stored in eight bits", beside(k.to(torch.float8_e4m3fn).to(torch.bfloat16), eight)
    )
    zero = torch.zeros_like(v)
    yield Guess("V never written: zeros", beside(k, zero))
    yield Guess("K never written: zeros", beside(zero, v))
    is_whole = ("k", layer) in run.inputs and len(run.inputs["k", layer]) >= len(k)
    if is_whole and run.phase == "prefill":
        raw = run.inputs["k", layer][run.segments[index].rows]
        yield Guess("K without its rotation", beside(raw, v))
    last = max(layer for tap, layer in run.inputs if tap == "v")
    for other in dict.fromkeys((0, layer - 1, layer + 1, last)):
        if 0 <= other <= last and other != layer:
            yield Guess(f"K and V of layer {other}", beside(*run.keys(other, index)))


def argmax(logits: Tensor) -> Iterator[Guess]:
    """What is known to go wrong in the choice of the largest, int64 [rows]; logits float32."""
    vocab_size = logits.shape[1]
    yield Guess("the last of a tie", vocab_size - 1 - logits.flip(-1).argmax(-1))
    yield Guess("the second largest", logits.topk(2, -1).indices[:, 1])
    yield Guess("the smallest logit", logits.argmin(-1))
    yield Guess("the largest magnitude", logits.abs().argmax(-1))
    yield Guess("the largest of all but the last id", logits[:, :-1].argmax(-1))
    yield Guess("the largest of the first half of the ids", logits[:, : vocab_size // 2].argmax(-1))
    yield Guess("the largest after rounding to bfloat16", to_bf16(logits).float().argmax(-1))
    yield Guess("the row before", logits.roll(1, 0).argmax(-1))
