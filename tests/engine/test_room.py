"""How much room an engine gets: what is said, what follows, and what is refused."""

import math

import pytest

from engine.config import EngineConfig
from engine.errors import InvalidArgument, OutOfMemory
from engine.room import CPU_CACHE_BYTES, Room, block_bytes, make_room
from engine.sources.toy import CONFIGS

TOY = CONFIGS["toy"]  # 2 layers, 2 KV heads of 64, context 16384
BLOCK = 2 * 2 * 64 * 2 * 128 * 2


def made(device: str = "cpu", free: int = 0, **wishes) -> EngineConfig:
    return make_room(Room(**wishes), TOY, device, lambda _: free)


def test_a_block_holds_k_and_v_of_every_layer_in_two_bytes():
    assert block_bytes(TOY, 128) == BLOCK


def test_a_cpu_gets_a_limit():
    room = made()

    assert room.num_blocks == CPU_CACHE_BYTES // BLOCK
    assert room.max_seq_len == 16384
    assert room.max_num_tokens >= room.max_num_seqs


def test_a_gpu_gets_a_share_of_what_is_free_beside_the_model():
    asked: list[EngineConfig] = []

    def free(config: EngineConfig) -> int:
        asked.append(config)
        return 100 * BLOCK

    room = make_room(Room(gpu_memory_utilization=0.5), TOY, "cuda", free)

    assert room.num_blocks == 50
    assert asked[0].num_blocks == 1
    assert asked[0].max_num_tokens == room.max_num_tokens


def test_bytes_that_are_said_are_taken_on_either_device():
    for device in ("cpu", "cuda"):
        assert made(device, free=9**9, kv_cache_memory_bytes=7 * BLOCK + 1).num_blocks == 7


def test_no_sequence_is_longer_than_the_cache_unless_that_is_said():
    assert made(kv_cache_memory_bytes=3 * BLOCK).max_seq_len == 3 * 128 + 1
    assert made(kv_cache_memory_bytes=3 * BLOCK, max_model_len=1000).max_seq_len == 1000


def test_slots_stay_within_an_int32():
    room = made("cuda", free=10**15)

    assert room.num_blocks * room.block_size <= 2**31 - 1


def test_the_budget_follows_a_large_number_of_sequences():
    assert made(max_num_seqs=3000).max_num_tokens == 3000


def test_one_block_is_a_cache():
    assert made(kv_cache_memory_bytes=BLOCK).num_blocks == 1


def test_a_cache_without_a_block_is_refused():
    with pytest.raises(OutOfMemory, match=f"one block needs {BLOCK} bytes, got 100"):
        made("cuda", free=112)


@pytest.mark.parametrize(
    "wish",
    [
        {"max_model_len": 0},
        {"max_model_len": 16385},
        {"max_model_len": 1.5},
        {"max_num_seqs": 0},
        {"max_num_seqs": -1},
        {"max_num_seqs": True},
        {"max_num_batched_tokens": 0},
        {"max_num_batched_tokens": 2**40},
        {"block_size": 17},
        {"num_threads": -1},
        {"enforce_eager": 1},
        {"gpu_memory_utilization": 0},
        {"gpu_memory_utilization": 1.01},
        {"gpu_memory_utilization": math.nan},
        {"gpu_memory_utilization": "1"},
        {"kv_cache_memory_bytes": 0},
        {"kv_cache_memory_bytes": 1e9},
    ],
    ids=str,
)
def test_an_illegal_wish_is_refused_by_name(wish: dict[str, object]):
    with pytest.raises(InvalidArgument, match="max_seq_len|" + next(iter(wish))):
        made(**wish)


def test_a_budget_of_less_than_a_token_for_each_is_refused_before_anything_is_loaded():
    with pytest.raises(
        InvalidArgument, match=r"max_num_batched_tokens .* max_num_seqs \(8\), got 4"
    ):
        made(max_num_seqs=8, max_num_batched_tokens=4)
