"""Heads that change places, with their rows of Wq, Wk, Wv and columns of Wo.

Everything up to attention changes places with them, bit for bit; after that, o_proj adds in another
order. Where attention gives integers and Wo holds some, no order counts: the logits are the same.
"""

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Library, Tap, TapPoint
from engine.config import ModelConfig
from tests.system.weights import TEXT, Weights, engine_of, load, logits_of
from tests.twin.bits import assert_same_bits, to_bf16

POINTS = {"q": "num_heads", "q_rope": "num_heads", "attn": "num_heads"} | {
    name: "num_kv_heads" for name in ("k", "v", "k_rope")
}


def reversed_heads(config: ModelConfig, weights: Weights) -> Weights:
    """kv heads in reverse order, each with its group of query heads."""

    def rows(values: np.ndarray, heads: int) -> np.ndarray:
        return values.reshape(heads, config.head_dim, -1)[::-1].reshape(values.shape)

    result = dict(weights)
    for key, values in weights.items():
        if "q_proj" in key:
            result[key] = rows(values, config.num_heads)
        elif "k_proj" in key or "v_proj" in key:
            result[key] = rows(values, config.num_kv_heads)
        elif "o_proj" in key:
            result[key] = np.ascontiguousarray(rows(values.T, config.num_heads).T)
    return result


def taps_of(library: Library, config: ModelConfig, weights: Weights) -> dict[str, np.ndarray]:
    """The taps of layer 0 up to attention, [tokens, heads, head_dim]."""
    taps = {
        name: np.empty((len(TEXT), getattr(config, heads), config.head_dim), np.uint16)
        for name, heads in POINTS.items()
    }
    wanted = tuple(Tap(TapPoint[name], 0, out.reshape(len(TEXT), -1)) for name, out in taps.items())
    logits_of(library, config, weights, wanted)
    return taps


@pytest.mark.parametrize("name", ["toy", "toy-untied", "toy-gqa3"])
def test_heads_that_change_places_keep_their_bits(library: Library, name: str):
    config, weights = load(name)

    there = taps_of(library, config, reversed_heads(config, weights))

    for tap, values in taps_of(library, config, weights).items():
        assert_same_bits(there[tap], np.ascontiguousarray(values[:, ::-1]))


def test_with_integers_in_attention_and_wo_the_order_of_heads_does_not_reach_the_logits(
    library: Library,
):
    config, weights = load("toy-untied")
    rng = np.random.default_rng(3)
    for layer in range(config.num_layers):
        key = f"model.layers.{layer}.self_attn.o_proj.weight"
        weights[key] = to_bf16(rng.integers(-8, 9, weights[key].shape).astype(np.float32))
    swapped = reversed_heads(config, weights)
    shape = (len(TEXT), config.num_heads, config.head_dim)
    attn = to_bf16(rng.integers(-8, 9, shape).astype(np.float32))

    def logits(weights: Weights, attn: np.ndarray) -> np.ndarray:
        forced = [
            Tap(TapPoint.attn, layer, None, np.ascontiguousarray(attn.reshape(len(TEXT), -1)))
            for layer in range(config.num_layers)
        ]
        out = np.empty((len(TEXT), config.vocab_size), np.float32)
        with engine_of(library, config, weights) as engine:
            batch = build_batch([SequenceSlice(TEXT, 0, [3, 1])], 16, "all")
            engine.forward(batch, forced, out)
        return out

    right = logits(weights, attn)
    assert_same_bits(logits(swapped, attn[:, ::-1]), right)
    assert not np.array_equal(logits(swapped, attn), right)  # heads left where they were
