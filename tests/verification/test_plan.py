import pytest

from engine.config import ModelConfig
from engine.errors import InvalidArgument
from engine.models import resolve
from verification.plan import Options, plan_groups, room_for


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_directory(resolve("toy"))


def prompts(*lengths: int) -> list[tuple[str, list[int]]]:
    return [(f"{index}-{length}", [1] * length) for index, length in enumerate(lengths)]


def test_prompts_are_grouped_in_order_and_by_room(config):
    groups = plan_groups(prompts(5, 4, 8, 1, 20, 2), config, Options(group_tokens=10))

    assert [[p.num_tokens for p in group] for group in groups] == [[5, 4], [8, 1], [20], [2]]


def test_a_group_has_no_more_prompts_than_it_may(config):
    groups = plan_groups(prompts(1, 1, 1, 1, 1), config, Options(max_group_prompts=2))

    assert [len(group) for group in groups] == [2, 2, 1]


@pytest.mark.parametrize(
    "given",
    [[], [("empty", [])], [("twice", [1]), ("twice", [2])], [("long", [1] * 16384)]],
    ids=["none", "empty", "twice", "too-long"],
)
def test_prompts_that_cannot_be_verified_are_refused(config, given):
    with pytest.raises(InvalidArgument):
        plan_groups(given, config, Options())


def test_the_room_is_that_of_the_largest_group(config):
    options = Options(group_tokens=40, continuation_tokens=16)
    groups = plan_groups(prompts(40, 10, 10, 10), config, options)
    room = room_for(groups, options)

    assert (room.max_num_tokens, room.max_num_seqs, room.max_seq_len) == (40, 3, 56)
    whole, again, spare = 3 * 2, 3 * 1, 5  # three prompts of 10 and 16 more; decoded; spare
    assert room.num_blocks >= whole + again + spare


@pytest.mark.parametrize(("device", "block_size"), [("cpu", 16), ("cuda", 128)])
def test_the_block_size_is_the_devices_unless_given(device, block_size):
    assert Options(device=device).kv_block_size == block_size
    assert Options(device=device, block_size=64).kv_block_size == 64


@pytest.mark.parametrize("name", ["decode_tokens", "continuation_tokens", "group_tokens"])
def test_a_count_of_zero_is_refused(name):
    with pytest.raises(InvalidArgument, match=name):
        Options(**{name: 0})
