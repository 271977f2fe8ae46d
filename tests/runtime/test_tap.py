"""Taps: their shapes, what is refused, and that a refused one leaves everything as it was."""

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Tap, TapPoint
from engine.errors import InvalidArgument
from engine.model_runner import ModelRunner
from tests.system.trace import tokens
from tests.twin.bits import assert_same_bits

TEXT = tokens(3, 20)


@pytest.fixture(scope="module")
def runner(make_runner) -> ModelRunner:
    return make_runner("toy-gqa4")


def batch(logits: str = "all"):
    return build_batch([SequenceSlice(TEXT, 0, [1, 0])], 16, logits)


def test_every_point_has_the_width_of_its_value(runner: ModelRunner):
    config = runner.config
    heads, kv_heads = config.num_heads * 64, config.num_kv_heads * 64
    widths = {
        **dict.fromkeys(("q", "q_rope", "attn"), heads),
        **dict.fromkeys(("k", "v", "k_rope"), kv_heads),
        **dict.fromkeys(("gate", "up", "act"), config.intermediate_size),
        "logits": config.vocab_size,
    }

    for point in TapPoint:
        width, dtype = runner.engine.tap_shape(point)
        assert width == widths.get(point.name, config.hidden_size), point.name
        assert dtype == (np.float32 if point is TapPoint.logits else np.uint16)


def test_the_names_are_those_of_the_header_in_its_order(runner: ModelRunner):
    values = runner.library.ffi.typeof("TapPoint").relements

    named = {name.removeprefix("TAP_").lower(): value for name, value in values.items()}

    assert named.pop("num_tap_points") == len(TapPoint)
    assert named == {point.name: int(point) for point in TapPoint}


@pytest.mark.parametrize(
    ("point", "layer", "message"),
    [
        (-1, 0, r"taps\[1\].point is -1, must be 0 .. 17"),
        (18, 0, r"taps\[1\].point is 18, must be 0 .. 17"),
        (TapPoint.q, -1, r"taps\[1\].layer is -1, must be 0 .. 1"),
        (TapPoint.mlp_residual, 2, r"taps\[1\].layer is 2, must be 0 .. 1"),
        (TapPoint.embed, 1, r"taps\[1\].layer is 1, must be 0 .. 0"),
        (TapPoint.final_norm, 1, r"taps\[1\].layer is 1, must be 0 .. 0"),
        (TapPoint.logits, 1, r"taps\[1\].layer is 1, must be 0 .. 0"),
    ],
)
def test_a_point_that_is_not_there_is_refused(runner: ModelRunner, point, layer, message):
    library = runner.library
    taps = library.ffi.new("EngineTap[2]", [{"point": 1}, {"point": int(point), "layer": layer}])
    step = batch()

    with pytest.raises(InvalidArgument, match=message):
        runner.engine._call("engine_forward", library.batch(step), taps, 2)


@pytest.mark.parametrize("count", [-1, 1])
def test_a_count_without_taps_is_refused(runner: ModelRunner, count: int):
    step = batch()

    with pytest.raises(InvalidArgument, match=f"num_taps is {count}"):
        runner.engine._call(
            "engine_forward", runner.library.batch(step), runner.library.ffi.NULL, count
        )


def test_logits_cannot_be_forced(runner: ModelRunner):
    force = np.zeros((20, runner.config.vocab_size), np.float32)

    with pytest.raises(InvalidArgument, match="logits cannot be forced"):
        runner.forward(batch(), [Tap(TapPoint.logits, 0, force=force)])


def test_logits_may_be_tapped_and_equal_the_output(runner: ModelRunner):
    step = batch()
    out = runner.tap_buffer(TapPoint.logits, step)

    output = runner.forward(step, [Tap(TapPoint.logits, 0, out=out)])

    assert_same_bits(out, output.logits)


def test_the_last_taps_have_a_row_for_each_wanted_logit(runner: ModelRunner):
    step = batch("last")
    out = runner.tap_buffer(TapPoint.final_norm, step)
    everything = runner.tap_buffer(TapPoint.final_norm, batch())
    runner.forward(batch(), [Tap(TapPoint.final_norm, 0, out=everything)])

    runner.forward(step, [Tap(TapPoint.final_norm, 0, out=out)])

    assert out.shape == (1, runner.config.hidden_size)
    assert_same_bits(out, everything[-1:])


def test_one_point_may_be_tapped_twice(runner: ModelRunner):
    step = batch()
    outs = [runner.tap_buffer(TapPoint.q, step) for _ in range(2)]

    runner.forward(step, [Tap(TapPoint.q, 1, out=out) for out in outs])

    assert_same_bits(outs[0], outs[1])


def test_a_tap_with_neither_out_nor_force_does_nothing(runner: ModelRunner):
    plain = runner.forward(batch()).logits

    assert_same_bits(runner.forward(batch(), [Tap(TapPoint.q, 0)]).logits, plain)


@pytest.mark.parametrize("field", ["out", "force"])
@pytest.mark.parametrize(
    "array",
    [
        np.zeros((19, 256), np.uint16),
        np.zeros((20, 255), np.uint16),
        np.zeros((20, 512), np.uint16),
        np.zeros((20, 256), np.int16),
        np.zeros((20, 512), np.uint16)[:, ::2],
    ],
    ids=["rows", "width", "wide", "dtype", "strided"],
)
def test_an_array_that_does_not_fit_is_refused_before_c_sees_it(
    runner: ModelRunner, field: str, array: np.ndarray
):
    with pytest.raises(InvalidArgument, match=f"tap o of layer 1, {field}"):
        runner.forward(batch(), [Tap(TapPoint.o, 1, **{field: array})])


def test_forced_rows_reach_logits_that_are_computed_in_slices(make_runner):
    # more wanted rows than are computed at a time (16): final_norm is forced for all of them
    runner = make_runner("toy", max_num_seqs=1)
    text = tokens(9, 50)
    step = build_batch([SequenceSlice(text, 0, [0, 1, 2, 3])], 16, "all")
    out, logits_out = (runner.tap_buffer(p, step) for p in (TapPoint.final_norm, TapPoint.logits))
    plain = runner.forward(
        step, [Tap(TapPoint.final_norm, 0, out=out), Tap(TapPoint.logits, 0, out=logits_out)]
    )
    assert_same_bits(logits_out, plain.logits)

    reversed_rows = np.ascontiguousarray(out[::-1])
    forced = runner.forward(step, [Tap(TapPoint.final_norm, 0, force=reversed_rows)])

    assert_same_bits(forced.logits, np.ascontiguousarray(plain.logits[::-1]))


def test_each_layer_has_a_tap_of_its_own(runner: ModelRunner):
    # layer 0 alone is what the first operations give; later layers pass the same points
    step = batch()
    taps = {
        (point, layer): Tap(point, layer, out=runner.tap_buffer(point, step))
        for point in (TapPoint.attn_norm, TapPoint.v, TapPoint.mlp_residual)
        for layer in (0, 1)
    }

    runner.forward(step, list(taps.values()))

    for point in (TapPoint.attn_norm, TapPoint.v, TapPoint.mlp_residual):
        assert (taps[point, 0].out != taps[point, 1].out).mean() > 0.5, point.name
