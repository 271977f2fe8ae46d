"""What the benchmark counts, over a cache of tokens and a clock that ticks by the step."""

import math

import numpy as np
import pytest

import engine.bench
from engine.bench import Workload, pure_steps, report, serve
from engine.config import EngineConfig
from engine.errors import InvalidArgument
from engine.llm_engine import LLMEngine
from engine.sources.toy import CONFIGS
from tests.engine.paged_token_model import AtOnce, Output, PagedTokenModel

ROOM = EngineConfig(
    device="cpu", block_size=16, num_blocks=64, max_seq_len=256, max_num_tokens=64, max_num_seqs=4
)
TICK = 0.010


class Ticking:
    """Stands in for the module time: each step of the model takes one tick, the host nothing."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + 1e-6  # a sleep is never too short


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    clock = Ticking()
    monkeypatch.setattr(engine.bench, "time", clock)
    return clock


def make(clock: Ticking) -> LLMEngine:
    def before(_) -> None:
        clock.now += TICK

    model = PagedTokenModel(ROOM.num_blocks, 16, 200, before)
    return LLMEngine(model, CONFIGS["toy"], ROOM)


def test_tokens_steps_and_times_of_one_batch(ticking: Ticking):
    workload = Workload(4, (10, 10), (5, 5))

    found = serve(make(ticking), workload.requests(200))

    assert (found["pp_tokens"], found["tg_tokens"], found["steps"]) == (40, 20, 5)
    assert found["seconds"] == pytest.approx(5 * TICK)
    assert found["ttft_ms"]["p50"] == pytest.approx(1000 * TICK)
    assert found["itl_ms"]["p99"] == pytest.approx(1000 * TICK)
    assert found["e2e_ms"]["p90"] == pytest.approx(5000 * TICK)
    assert found["decode_step_ms"]["p50"] == pytest.approx(1000 * TICK)
    assert found["tg_tokens_per_second"] == pytest.approx(20 / (5 * TICK))
    assert found["model_share"] == pytest.approx(1.0)
    assert found["host_us_per_step"] == pytest.approx(0.0, abs=1e-6)


def test_a_step_that_prefills_is_no_decode_step(ticking: Ticking):
    def before(batch) -> None:
        ticking.now += TICK * len(batch.input_ids)

    model = PagedTokenModel(ROOM.num_blocks, 16, 200, before)

    found = serve(
        LLMEngine(model, CONFIGS["toy"], ROOM), Workload(1, (10, 10), (3, 3)).requests(200)
    )

    assert found["decode_step_ms"]["p50"] == pytest.approx(1000 * TICK)
    assert found["decode_step_ms"]["p99"] == pytest.approx(1000 * TICK)
    assert found["ttft_ms"]["p50"] == pytest.approx(10_000 * TICK)


def test_a_chunk_without_a_token_counts_for_nobody(ticking: Ticking):
    found = serve(make(ticking), Workload(1, (100, 100), (2, 2)).requests(200))

    assert (found["steps"], found["tg_tokens"]) == (3, 2)
    assert found["ttft_ms"]["p50"] == pytest.approx(2000 * TICK)


def test_static_batching_waits_for_the_slowest_of_a_group(ticking: Ticking):
    requests = Workload(16, (4, 4), (2, 40), seed=3).requests(200)

    static = serve(make(ticking), requests, group=4)
    continuous = serve(make(ticking), requests)

    groups = [requests[i : i + 4] for i in range(0, 16, 4)]
    assert static["steps"] == sum(max(r.max_tokens for r in group) for group in groups)
    assert continuous["steps"] < static["steps"]
    assert static["tg_tokens"] == continuous["tg_tokens"]


def test_requests_arrive_when_they_are_due(ticking: Ticking):
    workload = Workload(200, (4, 4), (1, 1), request_rate=2.0)
    requests = workload.requests(200)

    found = serve(make(ticking), requests)

    assert np.diff([r.arrival for r in requests]).mean() == pytest.approx(0.5, rel=0.2)
    assert found["seconds"] >= requests[-1].arrival
    assert found["ttft_ms"]["p50"] < 2000 * TICK


def test_the_same_seed_is_the_same_workload():
    first, second = (Workload(9, request_rate=3.0).requests(100) for _ in range(2))

    for ours, theirs in zip(first, second, strict=True):
        assert ours.prompt_ids.tolist() == theirs.prompt_ids.tolist()
        assert (ours.arrival, ours.max_tokens) == (theirs.arrival, theirs.max_tokens)
        assert 128 <= len(ours.prompt_ids) <= 1024


class Costly(AtOnce):
    """Each step takes a tick, and another for every ten tokens."""

    def __init__(self, clock: Ticking) -> None:
        self.clock = clock
        self.sizes: list[int] = []

    def forward(self, batch, *, sampling, wants_logits) -> Output:
        self.sizes.append(len(batch.input_ids))
        self.clock.now += TICK * (1 + len(batch.input_ids) / 10)
        rows = len(batch.logits_indices)
        return Output(np.zeros((rows, 1)), np.zeros(rows, np.int32))


def test_the_pure_steps_are_those_of_the_full_engine_at_the_mean_lengths(ticking: Ticking):
    runner = Costly(ticking)
    engine = LLMEngine(runner, CONFIGS["toy"], ROOM, enable_prefix_caching=False)
    requests = Workload(40, (20, 20), (11, 11)).requests(200)

    pure = pure_steps(engine, requests)

    assert set(runner.sizes) == {4, 60}  # 4 seats; 3 prompts of 20 in a budget of 64
    assert (pure.num_seqs, pure.context, pure.num_prompt_tokens) == (4, 26, 60)
    assert pure.decode_seconds == pytest.approx(1.4 * TICK)
    assert pure.prefill_seconds == pytest.approx(7 * TICK)
    expected = 800 / 60 * 7 * TICK + 400 / 4 * 1.4 * TICK
    assert pure.seconds_for(requests) == pytest.approx(expected)


def test_pure_steps_never_overwrite_a_cache_that_is_believed(ticking: Ticking):
    engine = LLMEngine(Costly(ticking), CONFIGS["toy"], ROOM)

    with pytest.raises(AssertionError, match="overwritten"):
        pure_steps(engine, Workload(1, (4, 4), (1, 1)).requests(200))


def test_the_engine_gets_its_runner_back(ticking: Ticking):
    engine = make(ticking)
    runner = engine.runner

    serve(engine, Workload(1, (4, 4), (1, 1)).requests(200))

    assert engine.runner is runner


def test_the_report_names_what_the_field_names(ticking: Ticking):
    text = report("toy", serve(make(ticking), Workload(1, (4, 4), (1, 1)).requests(200)))

    for word in ("pp 4", "tg 1", "ttft", "tokens/s", "in the model"):
        assert word in text
    assert "itl" not in text  # one token has none


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be at least 1, got 0"),
        ({"num_prompts": 1, "input_len": (0, 4)}, "input_len must be from 1 up and in order"),
        ({"num_prompts": 1, "output_len": (5, 4)}, "output_len must be .* got 5:4"),
        ({"num_prompts": 1, "request_rate": 0}, "request_rate must be over 0"),
        ({"num_prompts": 1, "request_rate": math.nan}, "request_rate must be over 0"),
    ],
)
def test_an_impossible_workload_is_refused(fields, message):
    with pytest.raises(InvalidArgument, match=message):
        Workload(**fields)
