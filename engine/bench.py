"""Measure serving: `python -m engine bench throughput|latency`, in vLLM's words.

Requests are random token ids, drawn from a seed, that arrive all at once or as a Poisson process.
Times are taken around each step of the model, so what the host adds is told apart. pp: prompt
tokens; tg: answer tokens; TTFT: arrival to first token; ITL: time between two tokens of one answer.
Judges nothing: figures only.
"""

import math
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.batch import Batch, SequenceSlice, build_batch
from engine.errors import InvalidArgument
from engine.llm_engine import LLMEngine
from engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Workload:
    """What arrives, and when.

    Args:
        num_prompts: requests.
        input_len, output_len: fewest and most tokens of prompts and of answers, drawn evenly.
        request_rate: arrivals per second, Poisson; infinite: all at once.
        seed: of lengths, tokens and arrivals.
        temperature: of the answers; 0: greedy.
    """

    num_prompts: int
    input_len: tuple[int, int] = (128, 1024)
    output_len: tuple[int, int] = (128, 128)
    request_rate: float = math.inf
    seed: int = 0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot arrive."""
        if self.num_prompts < 1:
            raise InvalidArgument(f"num_prompts must be at least 1, got {self.num_prompts}")
        for name in ("input_len", "output_len"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise InvalidArgument(f"{name} must be from 1 up and in order, got {low}:{high}")
        if self.seed < 0:
            raise InvalidArgument(f"seed must be at least 0, got {self.seed}")
        if not self.request_rate > 0:
            raise InvalidArgument(f"request_rate must be over 0, got {self.request_rate}")

    def requests(self, vocab_size: int) -> "list[Planned]":
        """The requests in order of arrival."""
        random = np.random.default_rng(self.seed)
        arrivals = np.zeros(self.num_prompts)
        if math.isfinite(self.request_rate):
            arrivals = np.cumsum(random.exponential(1 / self.request_rate, self.num_prompts))
        return [
            Planned(
                arrival=float(arrival),
                prompt_ids=random.integers(0, vocab_size, _between(random, self.input_len)),
                max_tokens=_between(random, self.output_len),
            )
            for arrival in arrivals
        ]


@dataclass(frozen=True)
class Planned:
    """One request: seconds after the start, and its size."""

    arrival: float
    prompt_ids: np.ndarray
    max_tokens: int


@dataclass
class Clock:
    """A runner around a runner: when each step began and ended, and who got a token."""

    runner: Any
    engine: LLMEngine
    steps: list[tuple[float, float, int, list]] = field(default_factory=list)

    def begin(self, batch: Batch, **options: Any) -> None:
        """Start one step; see `ModelRunner.begin`."""
        sequences = list(self.engine.scheduler.running.sequences)
        if len(batch.logits_indices) != len(sequences):
            rows = np.searchsorted(batch.cu_seqlens_q, batch.logits_indices, "right") - 1
            sequences = [sequences[row] for row in rows.tolist()]
        self._step = (time.perf_counter(), len(batch.input_ids), sequences)
        self.runner.begin(batch, **options)

    def end(self) -> Any:
        """Wait for it; see `ModelRunner.end`."""
        output = self.runner.end()
        began, num_tokens, sequences = self._step
        self.steps.append((began, time.perf_counter(), num_tokens, sequences))
        return output


def serve(
    engine: LLMEngine, requests: Items[Planned], temperature: float = 0.0, group: int | None = None
) -> dict[str, Any]:
    """Serve requests to the end and measure.

    Args:
        engine: idle; its runner is watched while this lasts.
        requests: in order of arrival.
        temperature: 0: greedy.
        group: static batching: so many at once, and the next only when all have ended.

    Returns:
        Figures by name: counts, seconds, tokens per second, percentiles in milliseconds.
    """
    clock = Clock(engine.runner, engine)
    engine.runner = clock
    arrived: dict[str, float] = {}
    began = time.perf_counter()
    try:
        waiting = list(enumerate(requests))[::-1]
        while waiting or engine.has_unfinished_requests():
            now = time.perf_counter() - began
            may_start = group is None or not engine.has_unfinished_requests()
            while waiting and may_start and waiting[-1][1].arrival <= now:
                index, planned = waiting.pop()
                arrived[str(index)] = began + planned.arrival
                params = SamplingParams(
                    temperature=temperature,
                    seed=index if temperature else None,
                    max_tokens=planned.max_tokens,
                    ignore_eos=True,
                )
                engine.add_request(str(index), planned.prompt_ids, params, stream=False)
                may_start = group is None or len(arrived) % group != 0
            if engine.has_unfinished_requests():
                engine.step()
            elif waiting:
                time.sleep(max(0.0, waiting[-1][1].arrival - (time.perf_counter() - began)))
        ended = time.perf_counter()
    finally:
        engine.runner = clock.runner
    return figures(clock, arrived, requests, ended - began)


def figures(
    clock: Clock, arrived: dict[str, float], requests: Items[Planned], seconds: float
) -> dict[str, Any]:
    """What the steps say, by name."""
    tokens_at: dict[str, list[float]] = {name: [] for name in arrived}
    for _, end, _, sequences in clock.steps:
        for sequence in sequences:
            tokens_at[sequence.request_id].append(end)
    first = np.array([times[0] - arrived[name] for name, times in tokens_at.items()])
    between = np.concatenate([np.diff(times) for times in tokens_at.values()])
    whole = np.array([times[-1] - arrived[name] for name, times in tokens_at.items()])
    num_pp = sum(len(planned.prompt_ids) for planned in requests)
    num_tg = sum(len(times) for times in tokens_at.values())
    in_model = sum(end - start for start, end, _, _ in clock.steps)
    num_steps = len(clock.steps)
    decode = [end - start for start, end, size, rows in clock.steps if size == len(rows)]
    return {
        "requests": len(requests),
        "pp_tokens": num_pp,
        "tg_tokens": num_tg,
        "steps": num_steps,
        "seconds": seconds,
        "requests_per_second": len(requests) / seconds,
        "tokens_per_second": (num_pp + num_tg) / seconds,
        "tg_tokens_per_second": num_tg / seconds,
        "ttft_ms": _percentiles(first),
        "itl_ms": _percentiles(between),
        "e2e_ms": _percentiles(whole),
        "decode_step_ms": _percentiles(np.array(decode)),
        "model_share": in_model / seconds,  # of the time; without it the host or arrivals rule
        "host_us_per_step": (seconds - in_model) / max(num_steps, 1) * 1e6,
        "preemptions": sum(s.num_preemptions for s in _sequences(clock)),
    }


@dataclass(frozen=True)
class PureSteps:
    """What the model's own steps take, with nothing between them: the measure of a throughput.

    A decode step with every seat taken at the workload's mean context, and a prefill step as full
    of prompts of the mean length as the budget allows.
    """

    num_seqs: int
    context: int  # tokens of each sequence of the decode step
    decode_seconds: float
    num_prompt_tokens: int  # of the prefill step
    prefill_seconds: float

    def seconds_for(self, requests: Items[Planned]) -> float:
        """For a workload: its prompts in such steps, then all later tokens in such steps."""
        num_pp = sum(len(planned.prompt_ids) for planned in requests)
        num_later = sum(planned.max_tokens - 1 for planned in requests)
        return (
            num_pp / self.num_prompt_tokens * self.prefill_seconds
            + num_later / self.num_seqs * self.decode_seconds
        )


def pure_steps(engine: LLMEngine, requests: Items[Planned]) -> PureSteps:
    """Time both steps on an idle engine; what its cache holds is overwritten.

    Args:
        engine: without a prefix cache, which would be told nothing of it.
        requests: of the workload.
    """
    config = engine.scheduler.config
    assert not engine.scheduler.blocks.enable_prefix_caching, "cached blocks would be overwritten"
    mean_in = round(np.mean([len(planned.prompt_ids) for planned in requests]))
    mean_out = np.mean([planned.max_tokens for planned in requests])
    context = min(round(mean_in + mean_out / 2), config.max_seq_len)
    width = -(-context // config.block_size)
    num_seqs = min(config.max_num_seqs, len(requests), config.num_blocks // width)
    tables = np.arange(num_seqs * width).reshape(num_seqs, width).tolist()
    length = min(mean_in, config.max_num_tokens, context)  # a prompt too long is refused later
    count = min(config.max_num_tokens // length, num_seqs)
    prompts = [SequenceSlice([1] * length, 0, table) for table in tables[:count]]
    rows = [SequenceSlice([1], context - 1, table) for table in tables]
    return PureSteps(
        num_seqs=num_seqs,
        context=context,
        decode_seconds=_step_seconds(engine, rows),
        num_prompt_tokens=count * length,
        prefill_seconds=_step_seconds(engine, prompts),
    )


def _step_seconds(engine: LLMEngine, slices: list[SequenceSlice]) -> float:
    """The median of as many steps as half a second holds, 3 to 20, after 3 to warm up."""
    batch = build_batch(slices, engine.scheduler.config.block_size)
    seconds: list[float] = []
    while len(seconds) < 6 or (len(seconds) < 23 and sum(seconds) < 0.5):
        began = time.perf_counter()
        engine.runner.begin(batch, sampling=None, wants_logits=False)
        engine.runner.end()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[3:]))


def report(title: str, found: dict[str, Any]) -> str:
    """The figures as a short text."""
    lines = [
        f"{title}: {_counted(found['requests'], 'request')}, pp {found['pp_tokens']} + "
        f"tg {found['tg_tokens']} tokens in {found['seconds']:.2f} s, "
        f"{_counted(found['steps'], 'step')}",
        f"  throughput    {found['requests_per_second']:.2f} requests/s, "
        f"{found['tokens_per_second']:.1f} tokens/s, tg {found['tg_tokens_per_second']:.1f}",
    ]
    for name in ("ttft", "itl", "e2e", "decode_step"):
        values = found[f"{name}_ms"]
        if values is not None:
            shown = ", ".join(f"{key} {value:.2f}" for key, value in values.items())
            lines.append(f"  {name.removesuffix('_step') + ' ms':<13} {shown}")
    lines.append(
        f"  in the model  {100 * found['model_share']:.1f} % of the time; beside it "
        f"{found['host_us_per_step']:.0f} us per step; "
        f"{_counted(found['preemptions'], 'preemption')}"
    )
    if "pure" in found:
        pure = found["pure"]
        lines += [
            f"  pure steps    {1e3 * pure['prefill_seconds']:.2f} ms for "
            f"{_counted(pure['num_prompt_tokens'], 'prompt token')}, "
            f"{1e3 * pure['decode_seconds']:.2f} ms for {_counted(pure['num_seqs'], 'sequence')} "
            f"at {pure['context']} tokens",
            f"                {100 * found['pure_share']:.1f} % of their throughput",
        ]
    return "\n".join(lines)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _sequences(clock: Clock) -> list:
    return list({id(s): s for _, _, _, rows in clock.steps for s in rows}.values())


def _percentiles(seconds: np.ndarray) -> dict[str, float] | None:
    """Milliseconds; None where nothing was measured."""
    if len(seconds) == 0:
        return None
    values = np.percentile(seconds * 1e3, [50, 90, 99])
    return {name: float(value) for name, value in zip(("p50", "p90", "p99"), values, strict=True)}


def _between(random: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(random.integers(bounds[0], bounds[1] + 1))
