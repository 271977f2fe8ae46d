"""Random schedules of requests, and the run that holds each request to itself alone.

A schedule is plain data: it shrinks, and it is saved as JSON when a property fails.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from engine.batch import Batch
from engine.config import EngineConfig, ModelConfig
from engine.llm_engine import LLMEngine
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from engine.tap import Tap, TapPoint

SAVED = Path(__file__).parent / "saved_schedules"
MAX_SEQ_LEN = 128
POISON = 0x7FC1  # a NaN
Key = tuple[str, int, int]  # request, answer, position


@dataclass(frozen=True)
class Planned:
    """A request: when it comes, what it asks, and when somebody aborts it."""

    prefix: int  # tokens shared with every other request
    own: int  # tokens of its own
    arrives: int = 0  # step
    aborted: int | None = None  # step
    priority: int = 0
    stream: bool = False
    params: dict[str, Any] = field(default_factory=dict)

    def prompt(self, name: int) -> list[int]:
        return [i * 7 % 200 for i in range(self.prefix)] + [
            (name * 31 + i * 5) % 200 for i in range(self.own)
        ]


@dataclass(frozen=True)
class Schedule:
    """Requests, the engine's room, and which steps begin by taking somebody's blocks away."""

    requests: tuple[Planned, ...]
    num_blocks: int = 24
    max_num_seqs: int = 3
    max_num_tokens: int = 32
    caching: bool = True
    pages: int = 0  # seed of the order in which blocks are given out
    preempted: tuple[int, ...] = ()  # steps
    async_scheduling: bool = True  # the next step is prepared while one is computed
    eager: bool = False  # decode steps are launched, not replayed as graphs
    unfused: tuple[int, ...] = ()  # steps that are tapped, and so computed operation by operation

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Schedule":
        data = json.loads(path.read_text())
        requests = tuple(Planned(**planned) for planned in data.pop("requests"))
        return cls(requests, **{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def params() -> st.SearchStrategy[dict[str, Any]]:
    """Parameters of a request: greedy, or drawn by a seed."""
    always = {"max_tokens": st.integers(1, 12)}
    ends = {
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, 60), max_size=8).map(tuple),
        "stop": st.sampled_from([(), ("a",), ("ab", "0"), ("\x01", "\x02x")]),
    }
    ways = {
        "seed": st.integers(0, 3),
        "temperature": st.sampled_from([0.7, 1.5]),
    }
    more = {
        "n": st.integers(1, 3),
        "min_tokens": st.integers(0, 4),
        "top_k": st.sampled_from([0, 3]),
        "top_p": st.sampled_from([1.0, 0.6]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "presence_penalty": st.sampled_from([0.0, -0.5]),
        "logit_bias": st.just({5: 2.0, 7: -3.0}),
        "logprobs": st.integers(0, 3),
        "prompt_logprobs": st.integers(0, 2),
    }
    greedy = st.fixed_dictionaries(
        always | {"temperature": st.just(0.0)},
        optional=ends | {k: v for k, v in more.items() if k != "n"},
    )
    drawn = st.fixed_dictionaries(always | ways, optional=ends | more)
    return st.one_of(greedy, drawn).map(
        lambda p: p | {"min_tokens": min(p.get("min_tokens", 0), p["max_tokens"])}
    )


@st.composite
def schedules(
    draw: st.DrawFn, max_requests: int = 5, max_seats: int = 4, max_blocks: int = 14
) -> Schedule:
    planned = st.builds(
        Planned,
        prefix=st.integers(0, 40),
        own=st.integers(1, 30),
        arrives=st.integers(0, 12),
        aborted=st.none() | st.integers(0, 25),
        priority=st.integers(-1, 1),
        stream=st.booleans(),
        params=params(),
    )
    requests = tuple(draw(st.lists(planned, min_size=1, max_size=max_requests)))
    longest = max(p.prefix + p.own + p.params["max_tokens"] for p in requests)
    max_num_seqs = draw(st.integers(1, max_seats))
    return Schedule(
        requests,
        num_blocks=draw(st.integers(-(-longest // 16), max_blocks)),
        max_num_seqs=max_num_seqs,
        max_num_tokens=draw(st.integers(max_num_seqs, 64)),
        caching=draw(st.booleans()),
        pages=draw(st.integers(0, 3)),
        preempted=tuple(draw(st.lists(st.integers(1, 30), max_size=4))),
        async_scheduling=draw(st.booleans()),
        eager=draw(st.booleans()),
        unfused=tuple(draw(st.lists(st.integers(0, 30), max_size=4))),
    )


@dataclass
class Run:
    """What came of a schedule."""

    outputs: dict[str, RequestOutput]  # the last of each request
    logits: dict[Key, str]  # hash of the logits that each answer's token was taken from
    num_preemptions: int = 0
    num_cached: int = 0
    num_ahead: int = 0  # steps that were laid out before the one before had ended
    decoding: list[int] = field(default_factory=list)  # sequences of each step of decodes alone


class Recorder:
    """A runner around a runner: poisons what nobody may read, and hashes every row of logits."""

    def __init__(
        self, runner: Any, engine: Callable[[], LLMEngine], unfused: tuple[int, ...]
    ) -> None:
        self.runner = runner
        self.engine = engine
        self.unfused = unfused
        self.logits: dict[Key, str] = {}
        self.decoding: list[int] = []
        self.num_steps = 0

    def begin(self, batch: Batch, *, sampling: Any, wants_logits: bool) -> None:
        scheduler = self.engine().scheduler
        size, running = scheduler.config.block_size, scheduler.running
        dead = set(scheduler.blocks.dead_blocks())
        for sequence in running.sequences:
            computed = -(-int(running.num_computed[sequence.row]) // size)
            dead |= set(sequence.block_table[computed:])
        if dead:
            self.runner.fill_blocks(sorted(dead), POISON)
        if len(batch.input_ids) == len(batch.seq_lens):
            self.decoding.append(len(batch.seq_lens))
        ends = batch.cu_seqlens_q[1:]
        self._keys: list[Key] = []
        for index in batch.logits_indices.tolist():
            sequence = running.sequences[int(np.searchsorted(ends, index, "right"))]
            key = (sequence.request_id, sequence.index, int(batch.positions[index]))
            self._keys.append(key)
        self._output = None
        if self.num_steps in self.unfused and hasattr(self.runner, "tap_buffer"):
            tap = Tap(TapPoint.embed, 0, out=self.runner.tap_buffer(TapPoint.embed, batch))
            self._output = self.runner.forward(batch, [tap], sampling)
        else:
            self.runner.begin(batch, sampling=sampling, wants_logits=True)
        self.num_steps += 1

    def end(self) -> Any:
        output = self.runner.end() if self._output is None else self._output
        for key, row in zip(self._keys, output.logits, strict=True):
            found = blake2b(row.tobytes(), digest_size=8).hexdigest()
            assert self.logits.setdefault(key, found) == found, f"{key} has two sets of logits"
        return output


MakeRunner = Callable[[EngineConfig], Any]


class Server:
    """Runs schedules on runners of one kind."""

    def __init__(
        self, make_runner: MakeRunner, model_config: ModelConfig, tokenizer: Any, device: str
    ) -> None:
        self.make_runner = make_runner
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.device = device
        self._alone: dict[str, Run] = {}

    def run(self, schedule: Schedule) -> Run:
        """The schedule's requests, all together."""
        config = EngineConfig(
            device=self.device,
            block_size=16,
            num_blocks=schedule.num_blocks,
            max_seq_len=MAX_SEQ_LEN,
            max_num_tokens=schedule.max_num_tokens,
            max_num_seqs=schedule.max_num_seqs,
            enforce_eager=schedule.eager,
        )
        recorder = Recorder(self.make_runner(config), lambda: engine, schedule.unfused)
        engine = LLMEngine(
            recorder,
            self.model_config,
            config,
            self.tokenizer,
            schedule.caching,
            async_scheduling=schedule.async_scheduling,
        )
        scheduler = engine.scheduler
        order = np.random.default_rng(schedule.pages).permutation(schedule.num_blocks).tolist()
        if schedule.pages:
            for block in order:
                scheduler.blocks._free.move_to_end(block)
        run = Run({}, recorder.logits, decoding=recorder.decoding)
        texts: dict[tuple[str, int], str] = {}
        for now in range(3000):
            for i, planned in enumerate(schedule.requests):
                if planned.arrives == now:
                    add(engine, f"r{i}", i, planned)
                if planned.aborted == now:
                    self._note(run, texts, engine.abort(f"r{i}"))
            if now in schedule.preempted and scheduler.running.sequences:
                scheduler._preempt(max(scheduler.running.sequences, key=lambda s: s.order))
            run.num_ahead += scheduler.running.is_ahead
            self._note(run, texts, engine.step())
            scheduler.check_integrity()
            if now > 30 and not engine.has_unfinished_requests():
                break
        else:
            raise AssertionError("a request never ends")
        assert not scheduler.has_work
        assert scheduler.blocks.num_free == schedule.num_blocks, "a block leaked"
        run.num_preemptions = sum(o.usage.num_preemptions for o in run.outputs.values())
        run.num_cached = sum(o.usage.num_cached_tokens for o in run.outputs.values())
        return run

    def alone(self, name: int, planned: Planned) -> Run:
        """One request with the engine to itself: all room, no cache, no mates, no look ahead."""
        by_itself = replace(planned, arrives=0, aborted=None, priority=0, stream=True)
        key = json.dumps([name, asdict(by_itself)], sort_keys=True)
        if key not in self._alone:
            mates = (Planned(0, 1, arrives=10_000),) * name  # so that it has the same name
            schedule = Schedule(
                (*mates, by_itself), 40, 1, MAX_SEQ_LEN, caching=False, async_scheduling=False
            )
            self._alone[key] = self.run(schedule)
        return self._alone[key]

    def check(self, schedule: Schedule) -> Run:
        """Hold every request of a schedule to itself alone.

        Raises:
            AssertionError: anything a caller sees, or any logits, differ.
        """
        run = self.run(schedule)
        for i, planned in enumerate(schedule.requests):
            name = f"r{i}"
            alone = self.alone(i, planned)
            if name not in run.outputs:  # aborted before it came
                assert planned.aborted is not None
                continue
            same_output(run.outputs[name], alone.outputs[name])
            for key, value in run.logits.items():
                assert key[0] != name or alone.logits[key] == value, f"other logits at {key}"
        return run

    @staticmethod
    def _note(run: Run, texts: dict[tuple[str, int], str], outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert not (
                output.request_id in run.outputs and run.outputs[output.request_id].finished
            )
            run.outputs[output.request_id] = output
            for answer in output.outputs:
                key = (output.request_id, answer.index)
                texts[key] = texts.get(key, "") + answer.delta
                assert texts[key] == answer.text, "streamed text was taken back"


def add(engine: LLMEngine, request_id: str, name: int, planned: Planned) -> None:
    engine.add_request(
        request_id,
        planned.prompt(name),
        SamplingParams(**planned.params),
        planned.priority,
        planned.stream,
    )


def same_output(got: RequestOutput, alone: RequestOutput) -> None:
    """Equal in all that a caller sees; what was aborted is a beginning of what would have come."""
    assert got.finished
    for ours, theirs in zip(got.outputs, alone.outputs, strict=True):
        if ours.finish_reason == "abort":
            assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
            continue
        assert ours.token_ids == theirs.token_ids, "other tokens"
        assert ours.text == theirs.text, "other text"
        assert (ours.finish_reason, ours.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
        assert ours.logprobs == theirs.logprobs, "other logprobs"
        assert ours.cumulative_logprob == theirs.cumulative_logprob
    if not any(answer.finish_reason == "abort" for answer in got.outputs):
        assert got.prompt_logprobs == alone.prompt_logprobs, "other prompt logprobs"
