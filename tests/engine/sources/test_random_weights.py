from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sources import random_weights
from engine.sources.random_weights import to_bf16, weight_chunks
from engine.sources.toy import CONFIGS, STATISTICS

CONFIG = CONFIGS["toy"]


def tensor(name: str, seed: str = "seed") -> np.ndarray:
    """One tensor as float64, in its shape."""
    bits = np.concatenate(list(weight_chunks(CONFIG, STATISTICS, seed, name)))
    return bits.view(ml_dtypes.bfloat16).astype(np.float64).reshape(CONFIG.weight_shapes()[name])


@settings(derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_rounding_to_bf16_is_that_of_ml_dtypes(values):
    exact = np.array(values, np.float32)

    # ml_dtypes overflows to infinity beyond the largest bf16, and so does the rule.
    np.testing.assert_array_equal(to_bf16(exact), exact.astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x3F808000, 0x3F80),  # a tie goes to the even neighbour below
        (0x3F818000, 0x3F82),  # and above
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0x00000001, 0x0000),
        (0x80008001, 0x8001),
        (0x7F7FFFFF, 0x7F80),
    ],
)
def test_rounding_to_bf16_at_the_boundaries(bits, expected):
    assert to_bf16(np.array([bits], np.uint32).view(np.float32))[0] == expected


@pytest.mark.parametrize("chunk", [1, 128, 1000, 1 << 20])
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, chunk):
    name = "model.layers.1.mlp.down_proj.weight"
    expected = tensor(name)

    monkeypatch.setattr(random_weights, "CHUNK_VALUES", chunk)

    np.testing.assert_array_equal(tensor(name), expected)


def test_chunks_are_whole_rows_of_bounded_size(monkeypatch):
    monkeypatch.setattr(random_weights, "CHUNK_VALUES", 1000)

    chunks = list(weight_chunks(CONFIG, STATISTICS, "seed", "model.embed_tokens.weight"))

    assert {chunk.shape[1] for chunk in chunks} == {CONFIG.hidden_size}
    assert max(chunk.size for chunk in chunks) <= 1000
    assert sum(chunk.size for chunk in chunks) == CONFIG.vocab_size * CONFIG.hidden_size


def test_seed_and_name_decide_the_values():
    name, twin = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"

    assert (tensor(name) == tensor(name)).all()
    assert (tensor(name) != tensor(name, seed="other")).mean() > 0.9
    assert (tensor(name) != tensor(twin)).mean() > 0.9


def test_values_are_bell_shaped_with_the_size_asked_for():
    values = tensor("model.embed_tokens.weight")

    std = STATISTICS.logit_std / np.sqrt(CONFIG.hidden_size)
    assert values.std() == pytest.approx(std, rel=0.02)
    assert abs(values.mean()) < 0.02 * std
    within = (np.abs(values) < std).mean()
    assert 0.6 < within < 0.75  # 0.58 were it uniform, 0.68 normal


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_norm_weights_have_both_signs_and_are_not_one(layer, norm):
    weight = tensor(f"model.layers.{layer}.{norm}.weight")

    assert 0.02 < (weight < 0).mean() < 0.3
    assert (np.abs(weight) == 1).mean() < 0.05
    assert np.abs(weight).max() > 4 * np.abs(weight).min()


def test_no_two_heads_or_layers_could_be_swapped_unseen():
    for module, heads, axis in (
        ("q_proj", 4, 0),
        ("k_proj", 2, 0),
        ("v_proj", 2, 0),
        ("o_proj", 4, 1),
    ):
        sizes = [
            head.std()
            for layer in range(CONFIG.num_layers)
            for head in np.split(
                tensor(f"model.layers.{layer}.self_attn.{module}.weight"), heads, axis
            )
        ]
        gaps = np.diff(np.sort(sizes)) / np.mean(sizes)
        assert gaps.min() > 0.0005, module
        assert np.ptp(sizes) > 0.2 * np.mean(sizes), module


def test_a_few_channels_of_the_residual_stream_stand_out_in_every_layer():
    rows = [
        tensor(f"model.layers.{layer}.{module}.weight").std(axis=1)
        for layer in range(CONFIG.num_layers)
        for module in ("self_attn.o_proj", "mlp.down_proj")
    ]

    outliers = [set(np.flatnonzero(row > 4 * np.median(row))) for row in rows]
    assert len(outliers[0]) == CONFIG.hidden_size // 64
    assert all(found == outliers[0] for found in outliers)


def test_an_untied_lm_head_is_another_matrix():
    config = replace(CONFIG, tie_word_embeddings=False)
    head, embedding = (
        np.concatenate(list(weight_chunks(config, STATISTICS, "seed", name)))
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    )

    assert (head != embedding).mean() > 0.9
