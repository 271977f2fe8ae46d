"""Grades the operations of one layer: each tap of each pass, into cells, findings and counts.

Knows which rule of `compare` belongs to which operation. Holds what it found, to be collected by
`operators`; knows nothing of other layers.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from engine.config import ModelConfig
from verification import compare, measure
from verification.compare import Verdict
from verification.elements import (
    num_differing,
    position_of,
    segment_of,
    shifted,
    worst_element,
    worst_of_channel,
)
from verification.expected import Bounded, LayerTruth, expected_logits, logits_truths
from verification.localise import Finding
from verification.measure import Element, Measured
from verification.oracle import Reference
from verification.passes import LOCAL, Pass, Segment
from verification.replay import Replayed
from verification.results import Cell, no_histogram
from verification.taps import LAYER_POINTS, POINT, Point

OTHER_BITS = "the same tokens in prefill"


class LayerGrader:
    """Grades one layer; embed comes with the first, final_norm and logits with the last."""

    def __init__(
        self,
        reference: Reference,
        config: ModelConfig,
        truth: LayerTruth,
        layer: int,
        wants: Callable[[str, int], bool],
    ) -> None:
        self._reference = reference
        self._truth = truth
        self._layer = layer
        self._wants = wants
        self._is_last = layer == config.num_layers - 1
        self.cells: list[Cell] = []
        self.findings: list[Finding] = []
        self.histograms: dict[str, list[int]] = defaultdict(no_histogram)

    def grade(self, runs: Collection[Pass]) -> None:
        """Grades some passes, sharing the layer's upcast weights."""
        points = list(LAYER_POINTS)
        if self._layer == 0:
            points.insert(0, POINT["embed"])
        if self._is_last:
            points.append(POINT["final_norm"])
        for run in runs:
            for point in points:
                place = self._layer if point.in_layer else 0
                if self._wants(point.name, place):
                    self._grade_point(point, place, run)
        if self._is_last and self._wants("logits", 0):
            self._grade_logits(runs)

    def _grade_point(self, point: Point, layer: int, run: Pass) -> None:
        key = (point.name, layer)
        got = run.outputs[key]
        expected = self._truth.expect(point.name, run)
        if isinstance(expected, Replayed):
            measured = measure.replayed(expected, got)
        else:
            measured = measure.bounded(
                expected.value, expected.budget, got, num_blocks=expected.num_blocks
            )
        self._add_histogram(point.name, run, measured)
        for segment in run.segments:
            rows = segment.rows_of(point.name)
            verdict, numbers = self._judge(point, layer, run, expected, measured, rows)
            self._add_cell(point, layer, run, segment, verdict, numbers)
            if not verdict.passed:
                element = worst_element(expected, got, run, key, _guilty(measured, rows))
                self._report(point, layer, run, verdict, element)
        if isinstance(expected, Bounded):
            channel = int(measured.z_column.argmax())
            verdict = compare.judge_columns(float(measured.z_column[channel]), channel)
            if not verdict.passed:
                element = worst_of_channel(expected, got, channel)
                self._report(point, layer, run, verdict, element)

    def _judge(
        self,
        point: Point,
        layer: int,
        run: Pass,
        expected: Replayed | Bounded,
        measured: Measured,
        rows: slice,
    ) -> tuple[Verdict, "Numbers"]:
        key = (point.name, layer)
        got = run.outputs[key][rows]
        values = got.numel()
        differing = int(measured.differing[rows].sum())
        max_ulp = int(measured.max_ulp[rows].max())
        from_twin = None if run.twin is None else num_differing(got, run.twin[key][rows])
        ratio = z = None
        if isinstance(expected, Bounded):
            ratio = float(measured.ratio[rows].max())
            z = measured.z_sums.total(rows)
            z_row = float(measured.z_row[rows].max())
            verdict = compare.judge_bounded(ratio, z, z_row)
            max_ulp = None  # where terms cancel, ULPs are many and mean nothing; the budget knows
        else:
            verdict = _judge_exact(expected, differing, values, max_ulp, "the replay")
            if run.reference is not None:
                differing = num_differing(got, run.reference[key][rows])
            if run.reference is not None and differing:
                own = expected
                if point.operation == "rotary_embedding":
                    own = self._truth.expect_of_transformers(point.name, run)
                both = (run.outputs[key], run.reference[key])
                largest = max(measure.max_inner_ulp(own, each, rows) for each in both)
                as_theirs = _judge_exact(own, differing, values, largest, "transformers")
                verdict = compare.first_failure(verdict, as_theirs)
        if from_twin is not None:
            verdict = compare.first_failure(
                verdict, compare.judge_bits(from_twin, values, OTHER_BITS)
            )
            differing = from_twin
        return verdict, Numbers(ratio, differing, values, z, max_ulp)

    def _grade_logits(self, runs: Collection[Pass]) -> None:
        """All passes at once, so that each slice of the lm_head is upcast once."""
        ratios = [torch.zeros(len(run.outputs["logits", 0])) for run in runs]
        worst: dict[tuple[int, int], tuple[float, Element]] = {}  # (run, segment) -> ratio, where
        for ids, truth in logits_truths(self._reference):
            for number, run in enumerate(runs):
                expected = expected_logits(truth, run.inputs["final_norm", 0])
                part = run.outputs["logits", 0][:, ids]
                measured = measure.bounded(expected.value, expected.budget, part, is_signed=False)
                ratios[number] = torch.maximum(ratios[number], measured.ratio)
                for index, segment in enumerate(run.segments):
                    rows = segment.logit_rows
                    largest = float(measured.ratio[rows].max())
                    known = worst.get((number, index), (compare.MAX_RATIO, None))[0]
                    if not largest <= known:
                        budget = expected.budget(rows)
                        element = measure.worst_bounded(expected.value, budget, part, rows)
                        worst[number, index] = (largest, shifted(element, ids.start))
        for number, run in enumerate(runs):
            for index, segment in enumerate(run.segments):
                ratio = float(ratios[number][segment.logit_rows].max())
                _, element = worst.get((number, index), (0.0, None))
                self._judge_logits(run, segment, ratio, element)

    def _judge_logits(
        self, run: Pass, segment: Segment, ratio: float, element: Element | None
    ) -> None:
        rows, got = segment.logit_rows, run.outputs["logits", 0]
        values = got[rows].numel()
        verdict, differing = compare.judge_bounded(ratio), None
        if run.twin is not None:
            differing = num_differing(got[rows], run.twin["logits", 0][rows])
            bits = compare.judge_bits(differing, values, OTHER_BITS)
            verdict = compare.first_failure(verdict, bits)
        numbers = Numbers(ratio, differing, values, None, None)
        self._add_cell(POINT["logits"], 0, run, segment, verdict, numbers)
        if not verdict.passed:
            if element is None:  # within every budget: it is the bits of prefill that are missed
                element = measure.worst_replayed(run.twin["logits", 0], got, rows)
            self._report(POINT["logits"], 0, run, verdict, element)

    def _add_histogram(self, tap: str, run: Pass, measured: Measured) -> None:
        """Adds to the histogram, which is that of the main stage: known inputs."""
        if run.mode == LOCAL:
            total = self.histograms[tap]
            for index, count in enumerate(measured.histogram):
                total[index] += count

    def _add_cell(
        self,
        point: Point,
        layer: int,
        run: Pass,
        segment: Segment,
        verdict: Verdict,
        numbers: "Numbers",
    ) -> None:
        grade = "bits" if run.twin is not None else point.grade
        self.cells.append(
            Cell(
                run.mode,
                run.phase,
                segment.prompt,
                layer,
                point.name,
                grade,
                verdict.status,
                numbers.ratio,
                numbers.differing,
                numbers.values,
                numbers.z,
                numbers.max_ulp,
            )
        )

    def _report(
        self, point: Point, layer: int, run: Pass, verdict: Verdict, element: Element
    ) -> None:
        prompt = segment_of(run, point.name, element.row).prompt
        position = position_of(run, point.name, element.row)
        self.findings.append(
            Finding(
                run.mode,
                run.phase,
                prompt,
                layer,
                point.name,
                point.grade,
                verdict,
                element,
                position,
            )
        )


@dataclass(frozen=True)
class Numbers:
    """What a cell shows."""

    ratio: float | None
    differing: int | None
    values: int
    z: float | None
    max_ulp: int | None


def _guilty(measured: Measured, rows: slice) -> slice:
    """The rows to show a value of: that whose errors point one way, if every budget holds."""
    if measured.z_row is None or not float(measured.ratio[rows].max()) <= compare.MAX_RATIO:
        return rows
    row = rows.start + int(measured.z_row[rows].argmax())
    is_guilty = float(measured.z_row[row]) > compare.MAX_Z_ROW
    return slice(row, row + 1) if is_guilty else rows


def _judge_exact(
    expected: Replayed, differing: int, values: int, max_ulp: int, other: str
) -> Verdict:
    if expected.explain is None:
        return compare.judge_bits(differing, values, other)
    return compare.judge_replayed(differing, values, max_ulp, other)
