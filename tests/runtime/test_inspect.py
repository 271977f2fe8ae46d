"""Looking into an engine: what is refused, and that a refusal changes nothing."""

from dataclasses import replace

import numpy as np
import pytest

from engine.bindings import Engine
from engine.config import EngineConfig
from engine.errors import InvalidArgument

NUM_BLOCKS, BLOCK_SIZE = 12, 16
ALL_SLOTS = np.arange(NUM_BLOCKS * BLOCK_SIZE, dtype=np.int32)


@pytest.mark.parametrize(
    ("layer", "slots", "message"),
    [
        (-1, [0], "layer is -1, must be 0 .. 1"),
        (2, [0], "layer is 2, must be 0 .. 1"),
        (0, [0, -1], r"slots\[1\] is -1, must be 0 .. 191"),
        (0, [192], r"slots\[0\] is 192, must be 0 .. 191"),
    ],
)
def test_reading_outside_the_cache_is_refused(make_runner, layer: int, slots: list[int], message):
    with pytest.raises(InvalidArgument, match=message):
        make_runner(num_blocks=12).read_kv(layer, np.array(slots, np.int32))


@pytest.mark.parametrize("bad", [-1, 12, 2**31 - 1])
def test_filling_outside_the_cache_is_refused_and_nothing_is_changed(make_runner, bad: int):
    runner = make_runner(num_blocks=12)
    runner.fill_blocks(range(12), 0x2222)

    with pytest.raises(InvalidArgument, match=rf"block_ids\[1\] is {bad}, must be 0 .. 11"):
        runner.fill_blocks([0, bad], 0x3333)

    for values in runner.read_kv(0, ALL_SLOTS):
        assert (values == 0x2222).all()


@pytest.mark.parametrize("function", ["engine_read_kv", "engine_fill_blocks"])
def test_a_negative_count_is_refused(make_runner, function: str):
    engine = make_runner(num_blocks=12).engine
    ffi = engine.library.ffi
    ids, k, v = ffi.new("int32_t[1]"), ffi.new("uint16_t[128]"), ffi.new("uint16_t[128]")

    with pytest.raises(InvalidArgument, match="-1"):
        if function == "engine_read_kv":
            engine._call(function, 0, ids, -1, k, v)
        else:
            engine._call(function, ids, -1, 0)


def test_null_pointers_are_refused(make_runner):
    engine = make_runner(num_blocks=12).engine
    ffi = engine.library.ffi
    slots, k, v = ffi.new("int32_t[1]"), ffi.new("uint16_t[128]"), ffi.new("uint16_t[128]")
    for arguments in (
        (0, ffi.NULL, 1, k, v),
        (0, slots, 1, ffi.NULL, v),
        (0, slots, 1, k, ffi.NULL),
    ):
        with pytest.raises(InvalidArgument, match="null"):
            engine._call("engine_read_kv", *arguments)
    with pytest.raises(InvalidArgument, match="null"):
        engine._call("engine_fill_blocks", ffi.NULL, 1, 0)
    count = ffi.new("int64_t *")
    with pytest.raises(InvalidArgument, match="null"):
        engine._call("engine_memory", count, ffi.NULL, count)
    with pytest.raises(InvalidArgument, match="null"):
        engine._call("engine_free_memory", ffi.NULL)


def test_free_memory_is_some_of_the_machines(make_runner):
    assert 1 << 20 < make_runner(num_blocks=12).engine.free_memory() < 1 << 45


def test_values_that_are_never_alive_together_share_memory(make_runner):
    # What one more token of a step takes: residual, normed, gate with act in its place, and up,
    # whose memory attention has before; and four index arrays. Logits lie where gate and up did.
    small, large = (make_runner(max_num_tokens=n) for n in (512, 1024))
    c = small.config
    attention = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.hidden_size
    values = 2 * c.hidden_size + c.intermediate_size + max(attention, c.intermediate_size)

    more = large.engine.memory()["workspace"] - small.engine.memory()["workspace"]

    assert more == 512 * (2 * values + 4 * 4)


def test_logits_lie_where_gate_and_up_did(library, make_runner):
    # What a larger vocabulary costs while its logits fit there, and from where they do not.
    config = make_runner().config
    room = EngineConfig(
        "cpu", num_blocks=4, block_size=16, max_seq_len=64, max_num_tokens=512, max_num_seqs=16
    )
    attention = (
        2 * config.num_heads + 2 * config.num_kv_heads
    ) * config.head_dim + config.hidden_size
    layer = 512 * 2 * (config.intermediate_size + max(attention, config.intermediate_size))
    fits = layer // (16 * 4)  # ids whose logits, of 16 rows, take as much

    def memory(vocab_size: int) -> int:
        with Engine(library, replace(config, vocab_size=vocab_size), room) as engine:
            return engine.memory()["workspace"]

    assert layer % (16 * 4) == 0
    others = memory(fits) - memory(fits - 64)  # the sampler's: 64 ids' of a slice
    assert 0 <= others < 64 * 16 * 4
    assert memory(fits + 64) - memory(fits) == 64 * 16 * 4 + others
