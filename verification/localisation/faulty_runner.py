"""An engine whose one operator is wrong while everything that follows is real.

Wraps a Runner: the step is run, the operator's result is damaged, and the step is run again with
the damaged result forced upon all that reads it. So the fault is in the engine's own values, cache
and logits as if its code had made it. Knows no verdict.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.bindings import Tap
from engine.model_runner import StepOutput
from verification.localisation.faults import Damage, Place
from verification.steps import LOGIT_TAPS, Runner, as_bf16
from verification.taps import POINT, TapKey


class FaultyRunner:
    """A Runner with one fault.

    Args:
        runner: the right engine.
        key: the tap whose operator is wrong.
        damage: what it does to its values.
        place: what the operator reads; only faults that look at it need more than the key.
    """

    def __init__(self, runner: Runner, key: TapKey, damage: Damage, place: Place) -> None:
        self.config, self.engine_config = runner.config, runner.engine_config
        self._runner, self._key, self._damage, self._place = runner, key, damage, place

    def forward(self, batch: Batch, taps: Sequence[Tap] = ()) -> StepOutput:
        """One step, wrong in one place."""
        if self._key[0] == "logits":
            return self._damaged_logits(self._runner.forward(batch, taps))
        name, layer = self._key
        rows = len(batch.logits_indices if name in LOGIT_TAPS else batch.input_ids)
        if rows == 0:
            return self._runner.forward(batch, taps)
        point = POINT[name].tap_point
        mine = next((t for t in taps if (t.point, t.layer) == (point, layer)), Tap(point, layer))
        others = [tap for tap in taps if tap is not mine]
        clean = np.empty((rows, POINT[name].width(self.config)), np.uint16)
        step = self._runner.forward(batch, [*others, replace(mine, out=clean)])
        damaged = self._damage(as_bf16(clean), self._place)
        bits = damaged.contiguous().view(torch.uint16).numpy()
        if mine.force is None:
            step = self._runner.forward(batch, [*others, replace(mine, out=clean, force=bits)])
        if mine.out is not None:
            mine.out[:] = bits
        return step

    def _damaged_logits(self, step: StepOutput) -> StepOutput:
        if not len(step.logits):
            return step
        logits: Tensor = self._damage(torch.from_numpy(step.logits), self._place)
        wrong = logits.numpy()
        return replace(step, logits=wrong, next_ids=wrong.argmax(-1).astype(np.int32))

    def read_kv(self, layer: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As the engine's."""
        return self._runner.read_kv(layer, slots)

    def fill_blocks(self, block_ids: Sequence[int], value: int) -> None:
        """As the engine's."""
        self._runner.fill_blocks(block_ids, value)
