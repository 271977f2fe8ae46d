"""What an engine does without taps is held to what it does with them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch import Batch
from engine.bindings import Tap
from engine.model_runner import StepOutput
from engine.models import resolve
from tests.verification.fake_engine import FakeEngine
from tests.verification.test_harness import OPTIONS, PROMPTS, verified
from verification.harness import Subject
from verification.oracle import Reference
from verification.selection import Selection


class WithoutTaps(FakeEngine):
    """Knows whether a step is tapped: wrong ones are wrong only where nobody looks."""

    is_tapped = True

    def forward(self, batch: Batch, taps: Sequence[Tap] = ()) -> StepOutput:
        self.is_tapped = bool(taps)
        return super().forward(batch, taps)


class OneLogitOfPrefill(WithoutTaps):
    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        if not self.is_tapped and not self.is_decode:
            logits[-1, 7] = logits[-1, 7].nextafter(torch.tensor(torch.inf))
        return logits


class OneLogitOfDecode(WithoutTaps):
    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        if not self.is_tapped and self.is_decode:
            logits[-1, 7] = logits[-1, 7].nextafter(torch.tensor(torch.inf))
        return logits


class OtherIds(WithoutTaps):
    def argmax(self, logits: Tensor) -> np.ndarray:
        ids = super().argmax(logits)
        return ids if self.is_tapped else (ids + 1) % logits.shape[1]


class OneCachedValue(WithoutTaps):
    def write_kv_cache(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        super().write_kv_cache(layer, slots, k, v)
        if not self.is_tapped and layer == 1:
            self.v_cache[layer, slots[0], 0, 3] *= 1.5


@pytest.fixture(scope="module")
def subject() -> Subject:
    directory = resolve("toy")
    oracle = Reference(directory, torch.float32)
    return Subject("toy", "0" * 64, Reference(directory, torch.bfloat16), oracle)


@pytest.mark.parametrize("wrong", [OneLogitOfPrefill, OneLogitOfDecode, OtherIds])
def test_a_fault_of_steps_without_taps_alone_is_found_and_said_to_be_theirs(subject, wrong):
    failure = verified(subject, wrong).first_failure

    assert (failure.operator, failure.tap, failure.phase) == (
        "step without taps",
        "logits",
        "untapped",
    )
    assert (failure.c_function, failure.file) == ("model_forward", "csrc/model/forward.c")
    assert "are not the bits of the same step with taps" in failure.message


def test_a_fault_in_what_such_a_step_caches_is_found_in_its_layer(subject):
    failure = verified(subject, OneCachedValue).first_failure

    assert (failure.tap, failure.layer, failure.phase) == ("write_kv_cache", 1, "untapped")
    assert failure.message.startswith("V: 1 of ")


def test_what_was_held_to_the_taps_is_counted(subject):
    results = verified(subject, FakeEngine)

    rows = {row.tap: row for row in results.summary if row.phase == "untapped"}
    vocab_size = 320
    assert set(rows) == {"logits", "write_kv_cache"}
    assert rows["logits"].values == 2 * vocab_size * len(PROMPTS)
    assert [row.status for row in rows.values()] == ["pass", "pass"]


def test_a_selection_without_cache_and_logits_runs_no_such_step(subject):
    only = replace(OPTIONS, selection=Selection(taps=frozenset({"q"})))

    results = verified(subject, OtherIds, only)

    assert results.verdict == "pass"
    assert "untapped" not in {row.phase for row in results.summary}
