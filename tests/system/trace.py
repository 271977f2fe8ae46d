"""Run a text through an engine in any cuts, and keep every value that it computed."""

from collections.abc import Sequence

import numpy as np

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Tap, TapPoint
from engine.model_runner import ModelRunner
from tests.twin.bits import assert_same_bits

# Taps, "k_cache", "v_cache" (name and layer) and "logits", each [num_tokens, ...] by position.
Trace = dict[str, np.ndarray]
ONCE = (TapPoint.embed, TapPoint.final_norm)


def tokens(seed: int, count: int, vocab_size: int = 256) -> list[int]:
    return [int(x) for x in np.random.default_rng(seed).integers(0, vocab_size, count)]


def every_tap(runner: ModelRunner) -> list[tuple[TapPoint, int]]:
    """Every point of every layer but the logits, which each step returns anyway."""
    return [
        (point, layer)
        for point in TapPoint
        for layer in range(1 if point in ONCE else runner.config.num_layers)
        if point != TapPoint.logits
    ]


def run(
    runner: ModelRunner,
    token_ids: Sequence[int],
    cuts: Sequence[int],
    block_table: Sequence[int],
    tapped: bool = True,
) -> Trace:
    """The trace of one sequence whose prefill is cut into steps of these lengths."""
    assert sum(cuts) == len(token_ids)
    block_size = runner.engine_config.block_size
    points = every_tap(runner) if tapped else []
    steps: list[Trace] = []
    start = 0
    for cut in cuts:
        part = SequenceSlice(token_ids[start : start + cut], start, block_table)
        batch = build_batch([part], block_size, "all")
        taps = [Tap(p, layer, out=runner.tap_buffer(p, batch)) for p, layer in points]
        output = runner.forward(batch, taps)
        step = {f"{tap.point.name} {tap.layer}": tap.out for tap in taps}
        steps.append(step | {"logits": output.logits, "next_ids": output.next_ids})
        start += cut
    trace = {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}
    return trace | cache_of(runner, len(token_ids), block_table)


def cache_of(runner: ModelRunner, num_tokens: int, block_table: Sequence[int]) -> Trace:
    """The K and V that a sequence left in the cache, in position order."""
    block_size = runner.engine_config.block_size
    table = np.asarray(block_table, np.int32)
    positions = np.arange(num_tokens)
    slots = (table[positions // block_size] * block_size + positions % block_size).astype(np.int32)
    trace: Trace = {}
    for layer in range(runner.config.num_layers):
        trace[f"k_cache {layer}"], trace[f"v_cache {layer}"] = runner.read_kv(layer, slots)
    return trace


def assert_same_trace(actual: Trace, expected: Trace) -> None:
    """Every value bit for bit; the first tap that differs is named."""
    assert actual.keys() == expected.keys()
    for name, values in actual.items():
        try:
            assert_same_bits(values, expected[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def rows(trace: Trace, start: int, end: int) -> Trace:
    return {name: values[start:end] for name, values in trace.items()}
