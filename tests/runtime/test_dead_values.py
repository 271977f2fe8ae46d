"""The logits' memory is that of gate, up and attention's values: nobody reads one for the other.

In a library built for this, that memory is destroyed before the logits and before each step; every
result must stay as it is. On the GPU each operation's bits are held to this twin's by the steps in
tests/kernels and tests/system, whose engines share the memory likewise.
"""

from pathlib import Path

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Library
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.sampling import SequenceSampler, build_sampling
from engine.sampling_params import SamplingParams
from tests.runtime.wrapped_twin import build_wrapped_twin
from tests.system.trace import tokens

ROOMY, TIGHT = (
    40,
    4,
)  # tokens of a step: a prompt at once, its logits in three slices; in ten chunks


class Poisoning:
    """The library with an LM head that destroys what should be dead."""

    def __init__(self, path: Path) -> None:
        self.library = Library(path)
        ffi = type(self.library.ffi)()
        ffi.cdef("long dead_values_poisoned(void);void dead_values_poison_input(int does);")
        self._lib = ffi.dlopen(str(path))

    @property
    def poisoned(self) -> int:
        return self._lib.dead_values_poisoned()

    def poison_input(self, does: bool) -> None:
        self._lib.dead_values_poison_input(does)


@pytest.fixture(scope="module")
def poisoning(tmp_path_factory: pytest.TempPathFactory) -> Poisoning:
    path = tmp_path_factory.mktemp("poisoning") / "libpoisoning.so"
    build_wrapped_twin(path, "poison_dead_values.c", ["twin_kernels"])
    return Poisoning(path)


def answers(library: Library, max_num_tokens: int) -> list[np.ndarray]:
    """All that a prompt in chunks, drawn and scored tokens and greedy steps give back."""
    room = EngineConfig(
        "cpu",
        num_blocks=8,
        max_seq_len=64,
        max_num_tokens=max_num_tokens,
        max_num_seqs=2,
        block_size=16,
    )
    prompt, table, found = tokens(0, 40), [5, 2, 7], []
    state = SequenceSampler(SamplingParams(temperature=1.0, logprobs=5), prompt, 0)
    with ModelRunner(resolve("toy"), room, library) as runner:
        for start in range(0, 40, max_num_tokens):
            part = prompt[start : start + max_num_tokens]
            output = runner.forward(build_batch([SequenceSlice(part, start, table)], 16, "all"))
            found += [output.logits, output.next_ids]
        for step in range(4):
            ids = [int(found[-1][-1])]
            batch = build_batch([SequenceSlice(ids, 40 + step, table)], 16)
            output = runner.forward(batch, sampling=build_sampling([state]))
            found += [output.logits, *vars(output.logprobs).values(), output.next_ids]
        batch = build_batch([SequenceSlice([1], 44, table)], 16)
        found.append(runner.engine.decode(batch, 4))
    return found


def equal(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(
        np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("max_num_tokens", [ROOMY, TIGHT])
def test_nobody_reads_what_lay_where_the_logits_lie(
    poisoning: Poisoning, library: Library, max_num_tokens: int
):
    before = poisoning.poisoned
    assert equal(answers(poisoning.library, max_num_tokens), answers(library, max_num_tokens))

    steps = -(-40 // max_num_tokens) + 4 + 4
    assert poisoning.poisoned - before >= 2 * steps - 1


def test_a_value_that_is_read_is_missed(poisoning: Poisoning, library: Library):
    poisoning.poison_input(True)
    try:
        assert not equal(answers(poisoning.library, ROOMY), answers(library, ROOMY))
    finally:
        poisoning.poison_input(False)
