from pathlib import Path

import pytest

from engine.bindings import TapPoint
from engine.config import ModelConfig
from engine.models import resolve
from verification import taps
from verification.taps import LAYER_POINTS, OPERATIONS, POINT, POINTS, RESULT_ORDER

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_has_the_engines_points_in_the_engines_order():
    assert [point.name for point in POINTS] == [point.name for point in TapPoint]
    assert [point.tap_point for point in POINTS] == list(TapPoint)


def test_every_input_precedes_its_reader():
    for index, point in enumerate(POINTS):
        before = {p.name for p in POINTS[:index]} | {taps.RESIDUAL_IN}
        assert set(point.inputs) <= before, point.name


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_twins_function_is_in_the_named_file(name):
    operation = OPERATIONS[name]
    function = operation.c_function("cpu")

    assert function in (ROOT / operation.file("cpu")).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_cuda_function_is_in_the_named_file(name):
    operation = OPERATIONS[name]
    function = operation.c_function("cuda")

    assert function in (ROOT / operation.file("cuda")).read_text(encoding="utf-8")


def test_widths_are_those_of_the_engine(make_runner):
    runner = make_runner("toy-gqa3")
    for point in POINTS:
        assert point.width(runner.config) == runner.engine.tap_shape(point.tap_point)[0]


def test_weights_are_names_of_the_checkpoint():
    config = ModelConfig.from_directory(resolve("toy-untied"))
    named = {p.weight(layer) for p in POINTS if p.hf_weight for layer in range(config.num_layers)}

    assert named == set(config.weight_shapes())


def test_a_model_has_fifteen_taps_a_layer_and_three_more():
    keys = list(taps.all_keys(4))

    assert len(LAYER_POINTS) == 15
    assert len(keys) == len(set(keys)) == 3 + 4 * 15


def test_forward_order_sorts_all_keys_as_they_are_computed():
    keys = list(taps.all_keys(3))

    assert sorted(keys, key=lambda key: taps.forward_index(*key, 3)) == keys


def test_checks_that_are_no_taps_have_their_place():
    order = list(RESULT_ORDER)

    assert order.index("k_rope") < order.index("write_kv_cache") < order.index("attn")
    assert order[0] == "rope_table" and order[-1] == "argmax"
    assert len(order) == len(POINT) + 3


@pytest.mark.parametrize(
    ("reader", "source", "layer", "key"),
    [
        ("attn_norm", taps.RESIDUAL_IN, 0, ("embed", 0)),
        ("attn_norm", taps.RESIDUAL_IN, 2, ("mlp_residual", 1)),
        ("attn_residual", taps.RESIDUAL_IN, 0, ("embed", 0)),
        ("final_norm", "mlp_residual", 0, ("mlp_residual", 3)),
        ("down", "act", 2, ("act", 2)),
    ],
)
def test_a_source_is_found_in_the_right_layer(reader, source, layer, key):
    assert taps.source_key(source, layer, 4, reader) == key
