"""Asks the suite about one library: what it names first, against transformers and in bits.

Runs the suite as `make verify` does, only with another library; knows nothing of faults or of what
is expected of them. Verdicts of the unmutated library are made the same way: they are the control.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.utils import logging as transformers_logging

from engine.bindings import Library
from engine.config import ModelConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from verification.capture import capture_bit_hashes, engine_config_for
from verification.harness import Options, verify
from verification.prompts import Prompt, prompts_for
from verification.taps import TapKey, forward_index, operation_of

Setting = tuple[str, str]  # model, prompts: as on the command line
BitHashes = dict[str, dict[TapKey, str]]  # by prompt id

# Toys are so small that handing work to a second thread costs more than the work: 0.4 s a verdict
# with one thread, 6 to 28 s with two where other processes want the cores (measured on two cores).
NUM_THREADS = 1
BLOCK_SIZE = 64  # a divisor of every tile that a legal variant has


@dataclass(frozen=True)
class Named:
    """What the suite named first.

    Args:
        levels: those at which anything failed, lowest first; none where only bits were compared.
    """

    operator: str
    tap: str
    layer: int
    grade: str
    message: str
    levels: tuple[str, ...] = ()


@contextmanager
def quiet_torch() -> Iterator[None]:
    """One torch thread and no loading bars while the block runs."""
    threads = torch.get_num_threads()
    bars = transformers_logging.is_progress_bar_enabled()
    torch.set_num_threads(NUM_THREADS)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers_logging.enable_progress_bar()


class Judge:
    """Judges libraries against transformers and against the bits of the unmutated one.

    Args:
        pristine: the library without a fault.
    """

    def __init__(self, pristine: Library) -> None:
        self._pristine = pristine
        self._bits: dict[Setting, BitHashes] = {}

    def verify(self, library: Library | None, setting: Setting) -> Named | None:
        """The suite's first failure, or None if its verdict is pass.

        Args:
            library: None for the unmutated one.
        """
        model, selection = setting
        directory = resolve(model)
        prompts = [(prompt.id, prompt.token_ids) for prompt in self._prompts(setting)]
        options = Options(num_threads=NUM_THREADS)
        results = verify(directory, prompts, options, name=model, library=library or self._pristine)
        if results.passed:
            return None
        failure = results.first_failure
        if failure is None:  # failed without a word: found, but nothing is named
            return Named("", "", 0, "", "the verdict is fail and names nothing")
        place = (failure.operator, failure.tap, failure.layer)
        return Named(*place, failure.grade, failure.message, tuple(results.failed_checks))

    def bits(self, library: Library, setting: Setting) -> Named | None:
        """The first tap of the forward pass whose bits are not the unmutated library's."""
        if setting not in self._bits:
            self._bits[setting] = self._hashes(self._pristine, setting)
        expected, found = self._bits[setting], self._hashes(library, setting)
        num_layers = 1 + max(layer for taps in expected.values() for _, layer in taps)
        differing = [
            (forward_index(tap, layer, num_layers), tap, layer, prompt)
            for prompt, taps in expected.items()
            for (tap, layer), value in taps.items()
            if found[prompt][tap, layer] != value
        ]
        if not differing:
            return None
        _, tap, layer, prompt = min(differing)
        total = sum(len(taps) for taps in expected.values())
        message = f"{len(differing)} of {total} taps have other bits, first in prompt {prompt}"
        return Named(operation_of(tap).name, tap, layer, "bits", message)

    def _hashes(self, library: Library, setting: Setting) -> BitHashes:
        prompts = self._prompts(setting)
        config = engine_config_for(prompts, "cpu", NUM_THREADS, BLOCK_SIZE)
        with ModelRunner(resolve(setting[0]), config, library) as runner:
            return capture_bit_hashes(runner, prompts)

    @staticmethod
    def _prompts(setting: Setting) -> tuple[Prompt, ...]:
        model, selection = setting
        directory = resolve(model)
        vocab_size = ModelConfig.from_directory(directory).vocab_size
        return prompts_for(model, directory, vocab_size, selection)
