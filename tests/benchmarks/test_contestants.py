import time

import numpy as np
import pytest
import torch

from engine.bindings import Library
from engine.models import resolve
from tests.benchmarks import test_bench_gpu
from tests.benchmarks.contestants import Touchstone, agreement, prompts_of, room_for
from tests.benchmarks.peers.apart import PeerError
from tests.benchmarks.peers.hugging_face import CompiledTransformers, Transformers
from tests.benchmarks.peers.torch_graph import TorchGraph
from tests.benchmarks.points import Point
from tests.benchmarks.timing import Interleaved

MODEL = "toy-gqa4"
POINTS = (
    Point("decode", 1, 140, 1.0, 5),
    Point("decode", 3, 17, 1.0, 4),
    Point("prefill", 1, 150, 1.0),
)


@pytest.fixture(scope="module")
def ours(library: Library):
    made = Touchstone(resolve(MODEL), room_for(POINTS, "cpu"), library)
    yield made
    made.close()


def uncompiled(*arguments: object) -> CompiledTransformers:
    """The static cache and its bookkeeping, without the minutes of a compiler."""
    return CompiledTransformers(*arguments, compiled=lambda function, **_: function)


@pytest.fixture(scope="module", params=[TorchGraph, Transformers, uncompiled])
def peer(request):
    return request.param(resolve(MODEL), "cpu", torch.float32)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_peer_computes_what_the_engine_computes_and_twice_the_same(ours, peer, point: Point):
    prompts = prompts_of(point, 256)
    for contestant in (ours, peer):
        contestant.prepare(point, prompts)
        contestant.run()
    first = peer.token_ids().copy()

    peer.run()

    assert (peer.token_ids() == first).all()
    assert agreement(first, ours.token_ids()) == 1.0


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_what_was_timed_passes_its_check_and_a_wrong_token_does_not(ours, point: Point):
    prompts = prompts_of(point, 256)
    ours.prepare(point, prompts)
    ours.run()
    ours.run()

    assert ours.check(point, prompts)["equal"]

    ours.run()
    ours._ids.reshape(-1)[-1] += 1
    assert not ours.check(point, prompts)["equal"]


def test_a_check_notices_a_cache_that_was_not_what_the_ids_came_from(ours):
    point = POINTS[0]
    prompts = prompts_of(point, 256)
    ours.prepare(point, prompts)
    ours.run()
    ours.runner.fill_blocks(ours._batch.block_tables[0].tolist(), 0x3F80)

    assert not ours.check(point, prompts)["equal"]


def test_every_sequence_of_a_large_batch_gets_its_own_blocks(ours):
    point = POINTS[1]
    ours.prepare(point, prompts_of(point, 256))

    tables = ours._batch.block_tables

    assert len(np.unique(tables)) == tables.size


@pytest.mark.parametrize("point", [POINTS[0], POINTS[-1]], ids=lambda point: point.name)
def test_the_shortfall_of_the_engines_own_tokens_is_nothing_and_of_others_is_sigmas(ours, point):
    prompts = prompts_of(point, 256)
    ours.prepare(point, prompts)
    ours.run()
    own = ours.token_ids()[0].copy()

    assert ours.shortfall(own) == 0.0
    assert max(ours.shortfall((own + shift) % 320) for shift in range(1, 40)) > 2.0


def test_agreement_counts_first_tokens_alone():
    found, expected = np.array([[1, 2], [9, 9]]), np.array([[1, 3], [0, 0]])

    assert agreement(found, expected) == 0.5


def test_a_peer_that_fails_is_told_and_the_others_are_ready(monkeypatch):
    class Peer:
        def __init__(self, name: str, fails: bool = False) -> None:
            self.name, self.fails = name, fails

        def prepare(self, point: Point, prompts: np.ndarray) -> None:
            if self.fails:
                raise RuntimeError("no room\nand more")

        def run(self) -> None:
            pass

    monkeypatch.setattr(test_bench_gpu.gpu, "clock", time.perf_counter)
    point = Point("decode", 2, 17, 1.0)
    peers = [Peer("one"), Peer("two", fails=True)]

    ready, missing = test_bench_gpu._prepare(peers, point, prompts_of(point, 256))

    assert [peer.name for peer in ready] == ["one"] and all(s >= 0 for s in ready.values())
    assert missing == {"two": "RuntimeError: no room"}


def test_a_peer_apart_that_fails_while_it_is_timed_is_left_out_and_told():
    calls = []

    def dies() -> float:
        raise PeerError("its process ended, exit status -6")

    others = {
        name: Interleaved({name: call}, time.perf_counter)
        for name, call in {"dies": dies, "lives": lambda: calls.append(1)}.items()
    }
    missing: dict[str, str] = {}

    test_bench_gpu._turn(others, missing)
    test_bench_gpu._turn(others, missing)

    assert list(others) == ["lives"] and len(calls) == 2 * 2  # each untimed, then timed
    assert missing == {"dies": "failed while it was timed: its process ended, exit status -6"}


def test_a_peer_that_fails_without_a_word_is_told_and_stops_nobody(monkeypatch):
    class Silent:
        name = "silent"

        def prepare(self, point: Point, prompts: np.ndarray) -> None:
            raise AssertionError

    monkeypatch.setattr(test_bench_gpu.gpu, "clock", time.perf_counter)

    ready, missing = test_bench_gpu._prepare([Silent()], POINTS[0], np.zeros((1, 1), np.int32))

    assert (ready, missing) == ({}, {"silent": "AssertionError"})
