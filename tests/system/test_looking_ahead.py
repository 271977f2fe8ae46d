"""The next step prepared while one is computed: what it is given, and when it is forgotten."""

import numpy as np

from engine.scheduler import ScheduledStep, Scheduler
from tests.engine.test_scheduler import B, Driver, assert_as_alone, scheduler, sequence


def begun(scheduler: Scheduler) -> tuple[ScheduledStep, np.ndarray]:
    """The next step, and tokens that end nobody."""
    step = scheduler.schedule()
    return step, np.zeros(len(step.rows), np.int32)


def test_the_next_step_has_its_blocks_and_slots_before_this_one_has_ended():
    chosen = scheduler()
    chosen.add(sequence(0, B - 1, max_tokens=9))
    chosen.add(sequence(1, 3, max_tokens=9))
    step, tokens = begun(chosen)
    chosen.commit(step, tokens)
    step, tokens = begun(chosen)  # of the first, the last that its block holds

    chosen.prepare(step)

    assert chosen.blocks.num_free == 32 - 3
    chosen.commit(step, tokens)
    assert chosen.running.is_ahead
    ahead = chosen.schedule().batch
    computed = [B, 4]
    assert ahead.positions.tolist() == computed
    tables = [s.block_table for s in chosen.running.sequences]
    assert ahead.slot_mapping.tolist() == [tables[0][1] * B, tables[1][0] * B + 4]


def test_who_surely_ends_gets_no_block_for_a_step_that_never_comes():
    chosen = scheduler()
    chosen.add(sequence(0, B - 1, max_tokens=2))
    step, tokens = begun(chosen)
    chosen.commit(step, tokens)
    step, tokens = begun(chosen)

    chosen.prepare(step)

    assert chosen.blocks.num_free == 31
    (ended,) = chosen.commit(step, tokens).finished
    assert ended.finish_reason == "length" and chosen.schedule() is None


def test_nobody_loses_blocks_to_a_preparation():
    chosen = scheduler(num_blocks=2)
    for i in range(2):
        chosen.add(sequence(i, B, max_tokens=9))
    step, tokens = begun(chosen)

    chosen.prepare(step)

    assert chosen.running.num_seqs == 2 and chosen.blocks.num_free == 0
    chosen.commit(step, tokens)
    assert not chosen.running.is_ahead
    chosen.schedule()  # takes them
    assert [s.request_id for s in chosen.running.sequences] == ["r0"]


def test_a_preparation_whose_step_failed_is_forgotten():
    driver = Driver(scheduler())
    item = sequence(0, 3, max_tokens=9)
    driver.scheduler.add(item)
    driver.step()
    driver.scheduler.prepare(driver.scheduler.schedule())  # and the step never ends

    driver.run()

    assert_as_alone([item])
