"""The cache: exactly the new tokens' slots are written, and each is read back from its place."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model_runner import ModelRunner
from tests.system.trace import run, tokens
from tests.twin.bits import assert_same_bits

BLOCK_SIZES = (16, 32, 64, 128)


def all_slots(runner: ModelRunner) -> np.ndarray:
    room = runner.engine_config
    return np.arange(room.num_blocks * room.block_size, dtype=np.int32)


@pytest.mark.parametrize("name", ["toy", "toy-gqa3", "toy-gqa8"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_exactly_the_tokens_slots_are_written(make_runner, name: str, block_size: int):
    runner = make_runner(name, block_size=block_size, num_blocks=12)
    runner.fill_blocks(range(12), 0x7FC5)
    table = [7, 2, 11, 4, 0, 9][: -(-75 // block_size)]
    trace = run(runner, tokens(1, 75), [75], table)

    shape = (75, runner.config.num_kv_heads, 64)
    owned = [table[p // block_size] * block_size + p % block_size for p in range(75)]
    for layer in range(runner.config.num_layers):
        k, v = runner.read_kv(layer, all_slots(runner))
        assert_same_bits(k[owned], trace[f"k_rope {layer}"].reshape(shape))
        assert_same_bits(v[owned], trace[f"v {layer}"].reshape(shape))
        others = np.setdiff1d(all_slots(runner), owned)
        assert (k[others] == 0x7FC5).all() and (v[others] == 0x7FC5).all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_filling_a_block_fills_it_in_every_layer_and_no_other(make_runner, block_size: int):
    runner = make_runner(block_size=block_size, num_blocks=12)
    runner.fill_blocks(range(12), 0x1111)

    runner.fill_blocks([3, 11], 0xFFC2)

    for layer in range(2):
        for values in runner.read_kv(layer, all_slots(runner)):
            filled = (values.reshape(12, -1) == 0xFFC2).all(1)
            untouched = (values.reshape(12, -1) == 0x1111).all(1)
            assert filled.nonzero()[0].tolist() == [3, 11]
            assert (filled | untouched).all()


def test_filling_no_block_is_allowed(make_runner):
    make_runner().fill_blocks([], 0)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 12 * 16 - 1), max_size=30))
def test_slots_are_read_in_the_order_asked(make_runner, slots: list[int]):
    runner = make_runner(num_blocks=12)
    everything = runner.read_kv(1, all_slots(runner))

    some = runner.read_kv(1, np.array(slots, np.int32))

    for part, whole in zip(some, everything, strict=True):
        assert_same_bits(part, whole[slots])


@pytest.fixture(scope="module")
def value_offset(tmp_path_factory):
    """Of a slot's vector in the pool, without a pool: csrc/twin/kv_cache.h alone, compiled."""
    path = tmp_path_factory.mktemp("layout") / "kv_vectors.so"
    source = Path(__file__).resolve().parent / "layout" / "kv_vectors.c"
    subprocess.run(["cc", "-std=gnu11", "-O1", "-shared", "-fPIC", source, "-o", path], check=True)
    function = ctypes.CDLL(str(path)).value_offset
    function.restype = ctypes.c_int64
    return function


@pytest.mark.parametrize("slot", [0, 127, 128, 2**20 - 1, 2**22, 2**24 + 77, 2**26])
@pytest.mark.parametrize("is_value", [0, 1], ids=["k", "v"])
def test_a_slots_place_is_counted_in_more_than_32_bits(value_offset, slot: int, is_value: int):
    # the pool of a whole H200 holds some 2^36 values; 2^31 is where an int ends
    block, offset = divmod(slot, 128)
    expected = (((block * 8 + 5) * 2 + is_value) * 128 + offset) * 64

    assert value_offset(slot, 5, 128, 8, is_value) == expected
