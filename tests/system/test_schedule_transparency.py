"""A request's answer is its own, whatever the schedule: tokens, text, scores and logits.

Many schedules over a cache of token ids, where all that can go wrong is policy; some over the toy.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from engine.answer_text import AnswerText
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.running_batch import RunningBatch
from engine.scheduler import Scheduler
from engine.sources.toy import CONFIGS
from engine.tokenizer import Tokenizer
from tests.devices import skipped_without_device
from tests.engine.paged_token_model import PagedTokenModel
from tests.system.schedules import MAX_SEQ_LEN, SAVED, Planned, Schedule, Server, schedules

# The model of token ids answers with ids below 60, two of which are end tokens: all ends come up.
TOKENS = replace(CONFIGS["toy"], eos_token_ids=(57, 59))
CROWDED = Schedule.load(SAVED / "crowded.json")
TWELVE = Schedule.load(SAVED / "twelve_decode.json")


def token_model(config: EngineConfig) -> PagedTokenModel:
    return PagedTokenModel(config.num_blocks, config.block_size, 60)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(resolve("toy"))


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Server:
    return Server(token_model, TOKENS, tokenizer, "cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def toy(request: Any, make_runner: Callable[..., ModelRunner], tokenizer: Tokenizer) -> Server:
    room = {"num_blocks": 40, "max_seq_len": MAX_SEQ_LEN, "max_num_tokens": MAX_SEQ_LEN}
    with skipped_without_device():
        runners = [
            make_runner(device=request.param, max_num_seqs=16, enforce_eager=eager, **room)
            for eager in (False, True)
        ]
    # More end tokens than it has, so that answers do end.
    config = replace(CONFIGS["toy"], eos_token_ids=tuple(range(60)))
    return Server(lambda room: runners[room.enforce_eager], config, tokenizer, request.param)


def check(server: Server, schedule: Schedule) -> None:
    try:
        server.check(schedule)
    except BaseException:
        schedule.save(SAVED / "failing.json")  # the last one written is the smallest
        raise


@settings(max_examples=200)
@given(schedules())
def test_every_request_is_as_if_alone(server: Server, schedule: Schedule):
    check(server, schedule)


@pytest.mark.slow
@settings(max_examples=1000)
@given(schedules(max_requests=8))
def test_every_request_is_as_if_alone_in_many_more_schedules(server: Server, schedule: Schedule):
    check(server, schedule)


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.timeout(3600)
@settings(max_examples=20_000)
@given(schedules(max_requests=8))
def test_every_request_is_as_if_alone_in_ever_more_schedules(server: Server, schedule: Schedule):
    check(server, schedule)


@settings(max_examples=15)
@given(schedules())
def test_every_request_of_the_toy_is_as_if_alone(toy: Server, schedule: Schedule):
    check(toy, schedule)


# From nine sequences on a GPU's decode steps are recorded as graphs and replayed.
@settings(max_examples=5)
@given(schedules(max_requests=8, max_seats=16, max_blocks=40))
def test_every_request_of_the_toy_is_as_if_alone_in_a_crowd(toy: Server, schedule: Schedule):
    check(toy, schedule)


@pytest.mark.slow
@settings(max_examples=60)
@given(schedules(max_requests=8, max_seats=16, max_blocks=40))
def test_every_request_of_the_toy_is_as_if_alone_in_more_crowds(toy: Server, schedule: Schedule):
    check(toy, schedule)


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.timeout(3600)
@settings(max_examples=500)
@given(schedules() | schedules(max_requests=8, max_seats=16, max_blocks=40))
def test_every_request_of_the_toy_is_as_if_alone_more_often(toy: Server, schedule: Schedule):
    check(toy, schedule)


@pytest.mark.parametrize("is_async", [False, True], ids=["one by one", "prepared ahead"])
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_graphs_and_looking_ahead_change_nothing_of_the_toy(
    toy: Server, eager: bool, is_async: bool
):
    run = toy.check(replace(TWELVE, eager=eager, async_scheduling=is_async))

    # recorded at the second step of the bucket, replayed from the third on
    assert sum(count >= 9 for count in run.decoding) >= 4
    assert (run.num_ahead >= 4) == is_async


@pytest.mark.parametrize("path", sorted(SAVED.glob("*.json")), ids=lambda path: path.stem)
def test_a_saved_schedule(server: Server, toy: Server, path):
    server.check(Schedule.load(path))
    toy.check(Schedule.load(path))


def test_the_schedules_do_reach_preemption_and_the_cache(server: Server):
    run = server.check(CROWDED)

    assert run.num_preemptions > 0
    assert run.num_cached > 0
    assert run.num_ahead > 0


def test_a_schedule_survives_being_saved(tmp_path):
    CROWDED.save(tmp_path / "x.json")

    assert Schedule.load(tmp_path / "x.json") == CROWDED


class TestTheProperty:
    """It must fail where an answer is not the request's own."""

    def test_leaves_the_schedule_that_failed(self, server: Server, monkeypatch, tmp_path):
        monkeypatch.setattr(sys.modules[__name__], "SAVED", tmp_path)
        monkeypatch.setattr(RunningBatch, "is_ahead", property(lambda self: self._num_steps > 1))

        with pytest.raises(AssertionError):
            check(server, CROWDED)

        assert Schedule.load(tmp_path / "failing.json") == CROWDED

    def test_notices_tokens_in_the_wrong_rows(self, server: Server, monkeypatch):
        commit = Scheduler.commit
        server.check(CROWDED)
        monkeypatch.setattr(
            Scheduler, "commit", lambda self, step, ids: commit(self, step, ids[::-1])
        )

        with pytest.raises(AssertionError, match="other tokens|other logits"):
            server.check(CROWDED)

    def test_notices_a_block_of_somebody_else(self, server: Server, monkeypatch):
        strangers = tuple(
            Planned(0, 30, arrives=9 * i, params={"max_tokens": 4, "temperature": 0.0})
            for i in range(2)
        )
        server.check(Schedule(strangers))
        monkeypatch.setattr(
            BlockManager, "_match", lambda self, ids: list(self._cached.values())[: len(ids) // 17]
        )

        with pytest.raises(AssertionError):
            server.check(Schedule(strangers))

    def test_notices_text_that_is_taken_back(self, server: Server, monkeypatch):
        params = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
        streamed = Schedule((Planned(3, 5, stream=True, params=params),))
        released = iter(["a", "ab", "b"] * 9)
        monkeypatch.setattr(
            AnswerText, "push", lambda self, *_: setattr(self, "released", next(released))
        )

        with pytest.raises(AssertionError, match="taken back"):
            server.run(streamed)
