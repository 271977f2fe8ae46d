"""Changes to the weights whose effect on the bits is known without any reference."""

from dataclasses import replace

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Engine, Library, Tap, TapPoint
from engine.config import ModelConfig
from tests.system.weights import ROOM, TEXT, Weights, engine_of, load, logits_of
from tests.twin import contract
from tests.twin.bits import assert_same_bits, to_bf16


@pytest.fixture(scope="module")
def toy() -> tuple[ModelConfig, Weights]:
    return load("toy")


def times(values: np.ndarray, power: int) -> np.ndarray:
    """bf16 bits times 2^power, exact."""
    scaled = np.ldexp(contract.widen(values), power)
    result = to_bf16(scaled)
    assert (contract.widen(result) == scaled).all()
    return result


def changed(weights: Weights, layer: int, **powers: int) -> Weights:
    """Some projections of a layer times powers of two."""
    result = dict(weights)
    for name, power in powers.items():
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        key = f"model.layers.{layer}.{block}.{name}.weight"
        result[key] = times(weights[key], power)
    return result


@pytest.mark.parametrize("name", ["toy", "toy-untied", "toy-gqa3", "toy-wide"])
def test_every_weight_reads_back_as_it_was_loaded(library: Library, name: str):
    config, weights = load(name)

    with engine_of(library, config, weights) as engine:
        for key, values in weights.items():
            assert_same_bits(engine.read_weight(key), values)


def test_every_bit_pattern_survives_loading(library: Library, toy: tuple[ModelConfig, Weights]):
    config, weights = toy
    rng = np.random.default_rng(0)

    with Engine(library, config, ROOM) as engine:
        for key, values in weights.items():
            noise = rng.integers(0, 1 << 16, values.shape).astype(np.uint16)
            not_finite = engine.load_weight(key, noise)
            assert not_finite == ((noise & 0x7F80) == 0x7F80).sum()
            assert_same_bits(engine.read_weight(key), noise)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "powers",
    [{"v_proj": 1, "o_proj": -1}, {"up_proj": -2, "down_proj": 2}, {"q_proj": 1, "k_proj": -1}],
    ids=lambda powers: "-".join(powers),
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_power_of_two_may_move_between_two_projections(
    library: Library,
    toy: tuple[ModelConfig, Weights],
    layer: int,
    powers: dict[str, int],
    sign: int,
):
    config, weights = toy
    moved = changed(weights, layer, **{name: sign * power for name, power in powers.items()})

    assert_same_bits(logits_of(library, config, moved), logits_of(library, config, weights))


@pytest.mark.parametrize(
    ("norm", "readers"),
    [
        ("model.layers.{}.input_layernorm.weight", ("q_proj", "k_proj", "v_proj")),
        ("model.layers.{}.post_attention_layernorm.weight", ("gate_proj", "up_proj")),
        ("model.norm.weight", ()),
    ],
    ids=["attn_norm", "mlp_norm", "final_norm"],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_power_of_two_may_move_from_a_norm_to_whatever_reads_it(
    library: Library, layer: int, norm: str, readers: tuple[str, ...]
):
    config, weights = load("toy-untied")
    moved = changed(weights, layer, **dict.fromkeys(readers, -1))
    moved[norm.format(layer)] = times(weights[norm.format(layer)], 1)
    if not readers:
        moved["lm_head.weight"] = times(weights["lm_head.weight"], -1)

    assert_same_bits(logits_of(library, config, moved), logits_of(library, config, weights))


@pytest.mark.parametrize(
    "name", ["v_proj", "o_proj", "up_proj", "down_proj", "gate_proj", "q_proj", "k_proj"]
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_power_of_two_in_one_projection_alone_shows(
    library: Library, toy: tuple[ModelConfig, Weights], layer: int, name: str
):
    config, weights = toy
    one = changed(weights, layer, **{name: 1})

    assert (logits_of(library, config, one) != logits_of(library, config, weights)).mean() > 0.5


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_layer_whose_outputs_are_zero_changes_nothing(
    library: Library, toy: tuple[ModelConfig, Weights], place: int
):
    config, weights = toy
    longer = {k: v for k, v in weights.items() if not k.startswith("model.layers.")}
    for layer in range(config.num_layers + 1):
        source = layer if layer < place else max(layer - 1, 0)
        prefix = f"model.layers.{source}."
        for key, values in weights.items():
            if key.startswith(prefix):
                dead = layer == place and ("o_proj" in key or "down_proj" in key)
                target = key.replace(prefix, f"model.layers.{layer}.")
                longer[target] = np.zeros_like(values) if dead else values

    result = logits_of(library, replace(config, num_layers=config.num_layers + 1), longer)

    assert_same_bits(result, logits_of(library, config, weights))


def test_a_permuted_vocabulary_permutes_the_logits(library: Library):
    config, weights = load("toy-untied")
    order = np.random.default_rng(0).permutation(config.vocab_size)
    permuted = weights | {"lm_head.weight": weights["lm_head.weight"][order]}

    result = logits_of(library, config, permuted)

    assert_same_bits(result, logits_of(library, config, weights)[:, order])


def test_equal_rows_of_the_head_get_equal_logits(
    library: Library, toy: tuple[ModelConfig, Weights]
):
    config, weights = load("toy-untied")
    head = weights["lm_head.weight"].copy()
    head[[5, 200, 330]] = head[100]

    logits = logits_of(library, config, weights | {"lm_head.weight": head})

    for column in (5, 200, 330):
        assert_same_bits(logits[:, column], logits[:, 100])


def test_an_untied_head_equal_to_the_embedding_is_a_tied_one(
    library: Library, toy: tuple[ModelConfig, Weights]
):
    config, weights = toy
    untied = replace(config, tie_word_embeddings=False)
    both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}

    assert_same_bits(logits_of(library, untied, both), logits_of(library, config, weights))


@pytest.mark.parametrize("name", ["toy", "toy-gqa3", "toy-gqa8"])
def test_repeating_the_kv_heads_gives_the_same_model(library: Library, name: str):
    config, weights = load(name)
    group = config.num_heads // config.num_kv_heads
    expanded = dict(weights)
    for key, values in weights.items():
        if "k_proj" in key or "v_proj" in key:
            heads = values.reshape(config.num_kv_heads, config.head_dim, -1)
            expanded[key] = np.repeat(heads, group, 0).reshape(-1, values.shape[1])

    result = logits_of(library, replace(config, num_kv_heads=config.num_heads), expanded)

    assert_same_bits(result, logits_of(library, config, weights))


def test_hidden_channels_may_be_permuted_within_what_one_step_adds_where_no_other_order_counts(
    library: Library, toy: tuple[ModelConfig, Weights]
):
    # intermediate channels: rows of gate and up, columns of down; inside aligned groups of sixteen
    config, weights = toy
    rng = np.random.default_rng(1)
    order = rng.permuted(np.arange(config.intermediate_size).reshape(-1, 16), axis=1).ravel()
    permuted = dict(weights)
    for layer in range(config.num_layers):
        for name in ("gate_proj", "up_proj"):
            key = f"model.layers.{layer}.mlp.{name}.weight"
            permuted[key] = weights[key][order]
        key = f"model.layers.{layer}.mlp.down_proj.weight"
        permuted[key] = weights[key][:, order]

    assert_same_bits(logits_of(library, config, permuted), logits_of(library, config, weights))


def test_layers_keep_their_own_weights_and_cache(
    library: Library, toy: tuple[ModelConfig, Weights]
):
    config, weights = toy
    swapped = {
        key.replace("layers.0", "layers.x")
        .replace("layers.1", "layers.0")
        .replace("layers.x", "layers.1"): v
        for key, v in weights.items()
    }

    assert (logits_of(library, config, swapped) != logits_of(library, config, weights)).mean() > 0.9


def test_a_fresh_engine_gives_the_same_bits(library: Library, toy: tuple[ModelConfig, Weights]):
    config, weights = toy
    first = logits_of(library, config, weights)

    for _ in range(3):
        assert_same_bits(logits_of(library, config, weights), first)


def test_two_engines_do_not_touch_each_other(library: Library, toy: tuple[ModelConfig, Weights]):
    config, weights = toy
    other_config, other_weights = load("toy-untied")
    alone = [logits_of(library, config, weights), logits_of(library, other_config, other_weights)]

    with (
        engine_of(library, config, weights) as one,
        engine_of(library, other_config, other_weights) as two,
    ):
        results = [np.empty_like(logits) for logits in alone]
        for start, end in ((0, 13), (13, 14), (14, 30)):  # in turns
            for engine, logits in zip((one, two), results, strict=True):
                part = build_batch([SequenceSlice(TEXT[start:end], start, [0, 1])], 16, "all")
                engine.forward(part, logits=logits[start:end])

    for result, expected in zip(results, alone, strict=True):
        assert_same_bits(result, expected)


def test_a_constructed_model_repeats_the_token_it_was_given(library: Library):
    # attention and MLP switched off: the logits are the norm of an embedding times the embeddings,
    # so with one-hot embeddings the largest is the token itself
    config, weights = load("toy")
    one_hot = np.zeros((config.vocab_size, config.hidden_size), np.uint16)
    one_hot[np.arange(128), np.arange(128)] = 0x3F80
    constructed = {
        key: np.full_like(values, 0x3F80) if values.ndim == 1 else np.zeros_like(values)
        for key, values in weights.items()
    } | {"model.embed_tokens.weight": one_hot}

    with engine_of(library, config, constructed) as engine:
        ids = np.empty(30, np.int32)
        text = [token % 128 for token in TEXT]
        engine.forward(build_batch([SequenceSlice(text, 0, [3, 1])], 16, "all"), next_ids=ids)

    assert ids.tolist() == text


def test_a_tap_outside_the_model_changes_nothing_when_it_is_refused(
    library: Library, toy: tuple[ModelConfig, Weights]
):
    config, weights = toy
    expected = logits_of(library, config, weights)
    buffer = np.zeros((len(TEXT), config.hidden_size), np.uint16)

    with engine_of(library, config, weights) as engine:
        logits = np.full_like(expected, 7)
        batch = build_batch([SequenceSlice(TEXT, 0, [3, 1])], 16, "all")
        with pytest.raises(ValueError, match=r"taps\[0\].layer is 2, must be 0 .. 1"):
            engine.forward(batch, [Tap(TapPoint.o, 2, out=buffer)], logits)
        assert (logits == 7).all() and not buffer.any()
        engine.forward(batch, logits=logits)

    assert_same_bits(logits, expected)
