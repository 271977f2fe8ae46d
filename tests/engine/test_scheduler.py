"""The scheduler, driven over a cache of tokens: who runs, in which order, with how many tokens."""

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.errors import InvalidArgument, QueueFull
from engine.scheduler import Scheduler
from engine.sequence import PRIORITY_STEP, Sequence
from tests.engine.paged_token_model import PagedTokenModel, hash_of, next_id

VOCAB = 1000
EOS = 999
B = 16


def scheduler(num_blocks: int = 32, seqs: int = 4, tokens: int = 32, **options) -> Scheduler:
    config = EngineConfig(
        device="cpu",
        block_size=B,
        num_blocks=num_blocks,
        max_seq_len=512,
        max_num_tokens=tokens,
        max_num_seqs=seqs,
    )
    return Scheduler(config, [EOS], VOCAB, **options)


def sequence(name: int, length: int, max_tokens: int = 4, **fields) -> Sequence:
    tokens = [(name * 37 + i) % 900 for i in range(length)]
    return Sequence(f"r{name}", tokens, length + max_tokens, arrival=name, **fields)


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_id(tokens, VOCAB - 1))
    return tokens


class Driver:
    """Runs a scheduler step by step, checking it after each."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        config = scheduler.config
        self.model = PagedTokenModel(config.num_blocks, config.block_size, VOCAB - 1)
        self.sizes: list[list[int]] = []  # new tokens per row of each step
        self.finished: list[Sequence] = []

    def step(self) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            return False
        assert len(step.batch.input_ids) <= self.scheduler.config.max_num_tokens
        self.sizes.append(step.num_new.tolist())
        self.model.fill_blocks(self.scheduler.blocks.dead_blocks())
        output = self.model.forward(step.batch)
        committed = self.scheduler.commit(step, output.next_ids[step.logits_rows])
        self.finished += committed.finished
        self.scheduler.check_integrity()
        return True

    def run(self) -> None:
        for _ in range(2000):
            if not self.step():
                return
        raise AssertionError("it does not end")


def assert_as_alone(sequences: list[Sequence]) -> None:
    for item in sequences:
        length = item.num_prompt_tokens
        expected = alone(item.token_ids[:length], item.max_num_tokens - length)
        assert item.token_ids == expected, item.request_id


def test_each_sequence_gets_its_own_tokens_and_ends_by_length():
    driver = Driver(scheduler())
    sequences = [sequence(i, length) for i, length in enumerate([1, 15, 16, 17, 40, 100])]
    for item in sequences:
        driver.scheduler.add(item)

    driver.run()

    assert_as_alone(sequences)
    assert {item.finish_reason for item in sequences} == {"length"}
    assert driver.scheduler.blocks.num_free == 32


def test_a_long_prompt_is_cut_into_chunks_while_others_decode():
    driver = Driver(scheduler(tokens=8))
    driver.scheduler.add(sequence(0, 2, max_tokens=12))
    driver.step()
    driver.scheduler.add(sequence(1, 20, max_tokens=2))

    for _ in range(4):
        driver.step()

    assert driver.sizes == [[2], [1, 7], [1, 7], [1, 6], [1, 1]]


def test_one_token_for_each_before_more_for_the_earliest():
    driver = Driver(scheduler(tokens=10, seqs=3))
    for i in range(3):
        driver.scheduler.add(sequence(i, 9))

    driver.step()
    driver.step()

    assert driver.sizes == [[9, 1], [1, 8, 1]]


def test_the_budget_must_give_each_running_sequence_a_token():
    with pytest.raises(InvalidArgument, match=r"at least max_num_seqs \(4\), got 3"):
        scheduler(tokens=3, seqs=4)


def test_nobody_overtakes_the_head_of_the_queue():
    driver = Driver(scheduler(num_blocks=4))
    driver.scheduler.add(sequence(0, 40, max_tokens=8))  # 3 blocks
    driver.step()
    driver.scheduler.add(sequence(1, 30))  # needs 2, one is free
    driver.scheduler.add(sequence(2, 3))  # would fit

    driver.step()
    driver.step()

    assert [s.request_id for s in driver.scheduler.waiting] == ["r1", "r2"]


def test_priority_goes_first_and_arrival_decides_among_equals():
    driver = Driver(scheduler(seqs=1))
    for i, priority in enumerate([0, 1, -1, 0]):
        driver.scheduler.add(sequence(i, 4, priority=priority))

    driver.run()

    assert [s.request_id for s in driver.finished] == ["r2", "r0", "r3", "r1"]


def test_a_higher_priority_takes_the_seat_of_a_lower_one_that_runs():
    driver = Driver(scheduler(seqs=1))
    low = sequence(0, 4, max_tokens=20, priority=1)
    driver.scheduler.add(low)
    driver.step()
    driver.step()
    high = sequence(1, 4, priority=0)
    driver.scheduler.add(high)

    driver.run()

    assert driver.finished == [high, low]
    assert low.num_preemptions == 1
    assert_as_alone([low, high])


def test_a_low_priority_is_overtaken_only_so_often():
    old = sequence(0, 4, priority=3)
    later = [sequence(i, 4, priority=2) for i in (PRIORITY_STEP - 1, PRIORITY_STEP)]

    assert [later[0].order > old.order, later[1].order > old.order] == [False, True]


def test_when_the_pool_runs_dry_the_last_gives_way_and_comes_back_unchanged():
    driver = Driver(scheduler(num_blocks=4, tokens=64))
    sequences = [sequence(i, 14, max_tokens=30) for i in range(3)]
    for item in sequences:
        driver.scheduler.add(item)

    driver.run()

    assert_as_alone(sequences)
    assert sequences[0].num_preemptions == 0
    assert sum(s.num_preemptions for s in sequences) > 0
    assert driver.finished[0] is sequences[0]


@pytest.mark.parametrize("caching", [True, False])
def test_a_shared_prefix_is_computed_once(caching: bool):
    driver = Driver(scheduler(tokens=64, enable_prefix_caching=caching))
    first, second = sequence(0, 40), sequence(0, 40)
    driver.scheduler.add(first)
    driver.run()
    driver.scheduler.add(second)

    driver.run()

    assert second.token_ids == first.token_ids
    assert second.num_cached_tokens == (32 if caching else 0)
    assert driver.sizes[4] == [8 if caching else 40]


def test_a_prefix_evicted_while_its_reader_was_preempted_is_computed_again():
    # What was cached when a sequence first came says nothing about when it comes back.
    driver = Driver(scheduler(num_blocks=5, seqs=1, tokens=64))
    first, reader = sequence(0, 40), sequence(0, 40, max_tokens=20, priority=1)
    driver.scheduler.add(first)
    driver.run()
    driver.scheduler.add(reader)
    driver.step()
    usurper = sequence(7, 76)
    driver.scheduler.add(usurper)

    driver.run()

    assert (reader.num_cached_tokens, reader.num_preemptions) == (32, 1)
    assert driver.finished == [first, usurper, reader]
    assert_as_alone([first, usurper, reader])


def test_followers_wait_for_the_prompt_and_share_it():
    driver = Driver(scheduler(tokens=16))
    leader = sequence(0, 40)
    leader.followers = [sequence(0, 40, index=i) for i in (1, 2)]
    followers = list(leader.followers)
    driver.scheduler.add(leader)
    driver.step()
    assert driver.scheduler.waiting == [] and leader.followers == followers

    driver.run()

    assert [f.num_cached_tokens for f in followers] == [32, 32]
    assert all(f.token_ids == leader.token_ids for f in followers)


def test_without_a_leader_followers_still_run():
    driver = Driver(scheduler(tokens=16))
    leader = sequence(0, 40)
    follower = sequence(0, 40, index=1)
    leader.followers = [follower]
    driver.scheduler.add(leader)
    driver.step()

    driver.scheduler.finish(leader, "abort")
    driver.run()

    assert driver.finished == [follower]
    assert leader.finish_reason == "abort"


def test_a_follower_may_be_aborted_before_it_starts():
    driver = Driver(scheduler(tokens=16))
    leader, follower = sequence(0, 40), sequence(0, 40, index=1)
    leader.followers = [follower]
    driver.scheduler.add(leader)

    driver.scheduler.finish(follower, "abort")
    driver.run()

    assert driver.finished == [leader]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_an_abort_at_any_point_leaves_nothing_behind(steps: int):
    driver = Driver(scheduler(num_blocks=4, tokens=16, seqs=2))
    victim, other = sequence(0, 40, max_tokens=8), sequence(1, 20, max_tokens=8)
    driver.scheduler.add(victim)
    driver.scheduler.add(other)
    for _ in range(steps):
        driver.step()

    driver.scheduler.finish(victim, "abort")
    driver.scheduler.check_integrity()
    driver.run()

    assert driver.finished == [other]
    assert_as_alone([other])
    assert driver.scheduler.blocks.num_free == 4


class Script:
    """Next tokens as written down."""

    def __init__(self, *tokens: int) -> None:
        self.scheduler = scheduler()
        self.tokens = list(tokens)

    def run(self, item: Sequence) -> Sequence:
        self.scheduler.add(item)
        while (step := self.scheduler.schedule()) is not None:
            self.scheduler.commit(step, np.array([self.tokens.pop(0)], np.int32))
            self.scheduler.check_integrity()
        return item


@pytest.mark.parametrize(
    ("fields", "answer", "reason", "stop_reason"),
    [
        ({}, [5, EOS], "stop", None),
        ({"ignore_eos": True}, [5, EOS, 6, 7], "length", None),
        ({"stop_token_ids": frozenset([5]), "is_watched": True}, [5], "stop", 5),
        ({"stop_token_ids": frozenset([7]), "is_watched": True, "ignore_eos": True},
         [5, EOS, 6, 7], "stop", 7),
        ({"stop_token_ids": frozenset([EOS]), "is_watched": True}, [5, EOS], "stop", None),
        ({"min_num_tokens": 3 + 1}, [5, EOS], "stop", None),
        ({"min_num_tokens": 3 + 2}, [5, EOS, 6, 7], "length", None),
        ({"min_num_tokens": 3 + 1, "stop_token_ids": frozenset([5, 6]), "is_watched": True,
          "ignore_eos": True}, [5, EOS, 6], "stop", 6),
    ],
)  # fmt: skip
def test_what_ends_an_answer(fields, answer, reason, stop_reason):
    item = Script(5, EOS, 6, 7).run(sequence(0, 3, **fields))

    assert item.token_ids[3:] == answer
    assert (item.finish_reason, item.stop_reason) == (reason, stop_reason)


def test_the_last_allowed_token_may_be_the_one_that_stops():
    item = Script(5, 6, 7, EOS).run(sequence(0, 3))

    assert (item.finish_reason, item.token_ids[3:]) == ("stop", [5, 6, 7, EOS])


def test_what_could_not_run_alone_is_refused_at_once():
    queue = scheduler(num_blocks=4)

    with pytest.raises(InvalidArgument, match=r"at most 512 tokens .* got 513"):
        queue.add(sequence(0, 500, max_tokens=13))
    with pytest.raises(InvalidArgument, match=r"need 65 slots of the KV cache, which has 64"):
        queue.add(sequence(0, 60, max_tokens=6))
    queue.add(sequence(0, 60, max_tokens=5))
    assert len(queue.waiting) == 1


def test_what_exactly_fits_the_pool_runs():
    driver = Driver(scheduler(num_blocks=4, tokens=16))
    item = sequence(0, 60, max_tokens=5)
    driver.scheduler.add(item)

    driver.run()

    assert_as_alone([item])


def test_the_queue_is_bounded_and_followers_count():
    queue = scheduler(max_waiting=3)
    leader = sequence(0, 4)
    leader.followers = [sequence(0, 4, index=1)]
    queue.add(leader)
    queue.add(sequence(1, 4))

    with pytest.raises(QueueFull, match="at most 3 sequences may wait, got 4"):
        queue.add(sequence(2, 4))
    assert len(queue.waiting) == 2


def test_prompt_logits_are_wanted_for_each_token_of_the_prompt_and_once_more_for_the_last():
    driver = Driver(scheduler(tokens=8))
    other, reader = sequence(0, 3), sequence(1, 12, wants_prompt_logits=True)
    driver.scheduler.add(other)
    driver.scheduler.add(reader)
    seen = []
    while (step := driver.scheduler.schedule()) is not None:
        output = driver.model.forward(step.batch)
        for part in step.prompts:
            rows = output.logits[part.first_logits_row : part.first_logits_row + part.count, 0]
            seen += list(zip(range(part.start, part.start + part.count), rows, strict=True))
        driver.scheduler.commit(step, output.next_ids[step.logits_rows])

    assert seen == [(i, hash_of(reader.token_ids[: i + 1])) for i in range(12)]
    assert_as_alone([other, reader])


def test_prompt_logits_decline_the_cache():
    driver = Driver(scheduler(tokens=64))
    driver.scheduler.add(sequence(0, 40))
    driver.run()
    reader = sequence(0, 40, wants_prompt_logits=True)
    driver.scheduler.add(reader)

    driver.run()

    assert reader.num_cached_tokens == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.waiting.reverse(),
        lambda s: s.waiting.append(s.running.sequences[0]),
        lambda s: s.running.sequences.reverse(),
        lambda s: s.running.block_tables.__setitem__((0, 0), 31),
        lambda s: s.running.num_computed.__setitem__(0, 99),
        lambda s: s.waiting[0].block_table.append(3),
        lambda s: setattr(s.waiting[0], "finish_reason", "stop"),
        lambda s: s.running.sequences[0].block_table.pop(),
    ],
)
def test_the_integrity_check_notices_damage(damage):
    driver = Driver(scheduler(seqs=2))
    for i in range(4):
        driver.scheduler.add(sequence(i, 20))
    driver.step()
    driver.scheduler.check_integrity()

    damage(driver.scheduler)

    with pytest.raises(AssertionError):
        driver.scheduler.check_integrity()
