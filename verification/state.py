"""Grades what is no tap: cached bytes, memory that nobody owns, arg-max, the rotary table.

Knows what a cache slot must hold after a run; knows nothing of how batches were made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.model_runner import StepOutput
from verification import compare, measure
from verification.compare import Verdict
from verification.diagnosis import caches, rotations
from verification.diagnosis.fit import diagnose
from verification.engine_runs import GroupRun, ModeRun
from verification.localise import WITHOUT_TAPS, Finding, Findings
from verification.measure import Element
from verification.oracle import Reference
from verification.passes import LOCAL, PREFILL, UNTAPPED, Pass, Segment
from verification.replay import Replayed, rope_table
from verification.results import Cell
from verification.rounding import same_bits, ulp_distance

# Past every band edge of Llama 3's scaling, block and tile edges, and the last of the usual limits.
EVERY_POSITION_BELOW = 2048
MORE_POSITIONS = (2048, 2049, 4095, 4096, 8191, 8192, 8193, 16383, 32767, 65535, 131070, 131071)
BOTH_PHASES = "both"


@dataclass
class StateGrader:
    """Grades state, run by run."""

    config: ModelConfig
    findings: Findings
    wants: Callable[[str, int], bool]
    cells: list[Cell] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)  # check -> why

    def grade(self, run: GroupRun, mode: ModeRun) -> None:
        """Cache bytes, spare memory and arg-max of one mode, before another mode runs."""
        for layer in range(self.config.num_layers):
            if self.wants("write_kv_cache", layer):
                for each in mode.passes:
                    self._grade_cache(run, mode, each, layer)
        if mode.spoiled is not None and self.wants("write_kv_cache", mode.spoiled[0]):
            layer, slot = mode.spoiled
            verdict = compare.failed(f"slot {slot}, which is in no block table, was written to")
            each = mode.passes[0]
            self.findings.add(
                Finding(each.mode, each.phase, None, layer, "write_kv_cache", "exact", verdict)
            )
        if self.wants("argmax", 0):
            for each in mode.passes:
                self._grade_argmax(each, mode.next_ids[each.phase])

    def grade_untapped(self, run: GroupRun, free: ModeRun) -> None:
        """The same prompts without taps: the bits of the tapped, free run, cached and as logits.

        What runs fused is held to the operations that it fuses, which the taps have graded.
        """
        layers = [
            layer for layer in range(self.config.num_layers) if self.wants("write_kv_cache", layer)
        ]
        if not layers and not self.wants("logits", 0):
            return
        steps = run.run_untapped(free.tables)
        each = replace(free.passes[0], phase=UNTAPPED)
        mode = replace(free, kv_slots={UNTAPPED: free.kv_slots[PREFILL]})
        for layer in layers:
            self._grade_cache(run, mode, each, layer)
        if self.wants("logits", 0):
            self._grade_untapped_logits(each, steps)

    def _grade_untapped_logits(self, each: Pass, steps: Sequence[StepOutput]) -> None:
        last = [segment.logit_rows.stop - 1 for segment in each.segments]
        known = each.outputs["logits", 0][last]  # [prompts, vocab_size]
        best = known.numpy().argmax(-1)
        for index, segment in enumerate(each.segments):
            row, differing, element = slice(index, index + 1), 0, None
            for step in steps:
                got = torch.from_numpy(step.logits)
                wrong = int((~same_bits(got[row], known[row])).sum())
                if wrong and element is None:
                    element = measure.worst_replayed(known, got, row)
                differing += wrong + int(step.next_ids[index] != best[index])
            values = len(steps) * known.shape[1]
            verdict = compare.judge_bits(differing, values, "the same step with taps")
            self._add_cell(each, segment, 0, "logits", verdict, differing, values)
            if not verdict.passed:
                position = segment.first_position + segment.num_rows - 1
                self.findings.add(
                    Finding(
                        each.mode,
                        each.phase,
                        segment.prompt,
                        0,
                        "logits",
                        "bits",
                        verdict,
                        element,
                        position,
                        operator=WITHOUT_TAPS,
                    )
                )

    def _grade_cache(self, run: GroupRun, mode: ModeRun, each: Pass, layer: int) -> None:
        for index, segment in enumerate(each.segments):
            got = run.read_kv(layer, mode.kv_slots[each.phase][index])
            expected = torch.cat(each.keys(layer, index), 1)
            differing = (~same_bits(got, expected)).sum()
            verdict = compare.judge_bits(int(differing), got.numel(), "k_rope and v, cached")
            self._add_cell(
                each, segment, layer, "write_kv_cache", verdict, int(differing), got.numel()
            )
            if not verdict.passed:
                element, side = _cache_element(expected, got)
                named = compare.failed(f"{side}: {verdict.reason}")
                diagnosis = self._cache_diagnosis(run, mode, each, layer)
                self.findings.add(
                    Finding(
                        each.mode,
                        each.phase,
                        segment.prompt,
                        layer,
                        "write_kv_cache",
                        "exact",
                        named,
                        element,
                        element.row,
                        diagnosis=diagnosis,
                    )
                )

    def _grade_argmax(self, each: Pass, next_ids: np.ndarray) -> None:
        # numpy gives the lowest index, and a NaN before any number.
        best = each.outputs["logits", 0].numpy().argmax(-1)
        for segment in each.segments:
            rows = segment.logit_rows
            wrong = np.flatnonzero(next_ids[rows] != best[rows])
            num_rows = rows.stop - rows.start
            verdict = compare.PASSED
            if len(wrong):
                verdict = compare.failed(
                    f"{len(wrong)} of {num_rows} ids are not the lowest of the largest logit"
                )
            self._add_cell(each, segment, 0, "argmax", verdict, len(wrong), num_rows)
            if not verdict.passed:
                row = rows.start + int(wrong[0])
                element = Element(row, 0, float(next_ids[row]), float(best[row]), None, None)
                position = int(each.positions[each.logit_rows[row]])
                ids, right = (torch.from_numpy(array).long() for array in (next_ids, best))
                diagnosis = diagnose(caches.argmax(each.outputs["logits", 0]), ids, right)
                self.findings.add(
                    Finding(
                        each.mode,
                        each.phase,
                        segment.prompt,
                        0,
                        "argmax",
                        "exact",
                        verdict,
                        element,
                        position,
                        diagnosis=diagnosis,
                    )
                )

    def grade_rope_table(
        self, table_of: Callable[[int], np.ndarray] | None, reference: Reference
    ) -> None:
        """The engine's table against transformers' own cos and sin."""
        if not self.wants("rope_table", 0):
            return
        if table_of is None:
            self.not_run["rope_table"] = "this engine does not show its table"
            return
        limit = self.config.max_position_embeddings
        positions = [p for p in (*range(EVERY_POSITION_BELOW), *MORE_POSITIONS) if p < limit]
        table = torch.from_numpy(table_of(positions[-1] + 1)).view(torch.bfloat16)
        got = table[positions]
        cos, sin = reference.rope_table(positions)
        expected = rope_table(cos, sin, torch.tensor(positions), reference.inv_freq())
        measured = measure.replayed(expected, got)
        differing, max_ulp = int(measured.differing.sum()), int(measured.max_ulp.max())
        verdict = compare.judge_replayed(differing, got.numel(), max_ulp, "transformers")
        status = verdict.status
        self.cells.append(
            Cell(
                LOCAL,
                BOTH_PHASES,
                f"positions up to {positions[-1]}",
                0,
                "rope_table",
                "exact",
                status,
                None,
                differing,
                got.numel(),
                None,
                max_ulp,
            )
        )
        if not verdict.passed:
            element = measure.worst_explained(expected, got, slice(0, len(got)))
            self.findings.add(
                Finding(
                    LOCAL,
                    BOTH_PHASES,
                    None,
                    0,
                    "rope_table",
                    "exact",
                    verdict,
                    element,
                    positions[element.row],
                    diagnosis=self._table_diagnosis(got, torch.tensor(positions), expected),
                )
            )

    def _table_diagnosis(self, got: Tensor, positions: Tensor, right: Replayed) -> str | None:
        return diagnose(rotations.rope_table(self.config, positions), got, right)

    def _cache_diagnosis(self, run: GroupRun, mode: ModeRun, each: Pass, layer: int) -> str | None:
        """What the longest sequence's slots hold instead; asked once in a run."""
        if any(finding.tap == "write_kv_cache" for finding in self.findings.failed):
            return None
        slots = mode.kv_slots[each.phase]
        index = max(range(len(slots)), key=lambda index: len(slots[index]))
        right = torch.cat(each.keys(layer, index), 1)
        guesses = caches.write_kv_cache(each, layer, index)
        return diagnose(guesses, run.read_kv(layer, slots[index]), right)

    def _add_cell(
        self,
        each: Pass,
        segment: Segment,
        layer: int,
        name: str,
        verdict: Verdict,
        differing: int,
        values: int,
    ) -> None:
        self.cells.append(
            Cell(
                each.mode,
                each.phase,
                segment.prompt,
                layer,
                name,
                "exact",
                verdict.status,
                None,
                differing,
                values,
                None,
                None,
            )
        )


def _cache_element(expected: Tensor, got: Tensor) -> tuple[Element, str]:
    """The first wrong value and whether it is of K or V; columns count within K or V."""
    wrong = (~same_bits(got, expected)).reshape(-1)
    row, column = divmod(int(wrong.to(torch.uint8).argmax()), expected.shape[1])
    width = expected.shape[1] // 2
    ulps = int(ulp_distance(got[row, column], expected[row, column]))
    element = Element(
        row, column % width, float(got[row, column]), float(expected[row, column]), ulps, None
    )
    return element, "K" if column < width else "V"
