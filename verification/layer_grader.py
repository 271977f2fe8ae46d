"""Grades the operations of one layer: each tap of each pass, into cells, findings and counts.

Knows which rule of `compare` belongs to which operation. Holds what it found, to be collected by
`operators`; knows nothing of other layers.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from verification import compare, measure
from verification.compare import Verdict
from verification.expected import Bounded, LayerTruth, expected_logits
from verification.localise import Finding
from verification.measure import Element, Measured
from verification.oracle import Reference
from verification.passes import LOCAL, Pass, Segment
from verification.replay import Replayed
from verification.results import Cell, no_histogram
from verification.rounding import same_bits
from verification.taps import LAYER_POINTS, POINT, Point

COPIES = ("embedding", "residual_add")  # no rounding is open: every bit must agree
OTHER_BITS = "the same tokens in prefill"

PoolKey = tuple[str, str, str, int]  # mode, phase, tap, layer


@dataclass
class Pool:
    """Counts of one tap and layer over all prompts of a run."""

    values: int = 0
    differing: int = 0  # from the replay
    from_reference: int = 0  # from transformers' own values

    def add(self, other: "Pool") -> None:
        """Takes in more values."""
        self.values += other.values
        self.differing += other.differing
        self.from_reference += other.from_reference


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
        self.pools: dict[PoolKey, Pool] = defaultdict(Pool)
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
            for run in runs:
                self._grade_logits(run)

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
            if rows.stop == rows.start:
                continue
            verdict, numbers = self._judge(point, layer, run, expected, measured, rows)
            self._add_cell(point, layer, run, segment, verdict, numbers)
            if not verdict.passed:
                element = _worst(expected, got, run, key, rows)
                self._report(point, layer, run, segment, verdict, element)
        if measured.z_column is not None:
            channel = int(measured.z_column.argmax())
            verdict = compare.judge_columns(float(measured.z_column[channel]), channel)
            if not verdict.passed:
                self._report(point, layer, run, None, verdict, None)

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
        from_twin = None if run.twin is None else _differing(got, run.twin[key][rows])
        ratio = z = None
        if isinstance(expected, Bounded):
            ratio = float(measured.ratio[rows].max())
            z = measured.z_sums.total(rows)
            z_row = float(measured.z_row[rows].max())
            verdict = compare.judge_bounded(ratio, z, z_row)
            max_ulp = None  # where terms cancel, ULPs are many and mean nothing; the budget knows
        else:
            from_reference = differing
            if run.reference is not None:
                from_reference = _differing(got, run.reference[key][rows])
            verdict = self._judge_exact(point, expected, values, differing, from_reference, max_ulp)
            if point.operation not in COPIES:
                key = (run.mode, run.phase, point.name, layer)
                self.pools[key].add(Pool(values, differing, from_reference))
            differing = from_reference
        if from_twin is not None:
            verdict = compare.first_failure(
                verdict, compare.judge_bits(from_twin, values, OTHER_BITS)
            )
            differing = from_twin
        return verdict, Numbers(ratio, differing, values, z, max_ulp)

    @staticmethod
    def _judge_exact(
        point: Point,
        expected: Replayed,
        values: int,
        differing: int,
        from_reference: int,
        max_ulp: int,
    ) -> Verdict:
        if point.operation in COPIES:
            as_reference = compare.judge_bits(from_reference, values, "transformers")
        else:
            as_reference = compare.judge_replayed(from_reference, values, 0, "transformers")
        if expected.explain is None:
            as_replay = compare.judge_bits(differing, values, "the replay")
        else:
            as_replay = compare.judge_replayed(differing, values, max_ulp, "the replay")
        return compare.first_failure(as_replay, as_reference)

    def _grade_logits(self, run: Pass) -> None:
        point, got = POINT["logits"], run.outputs["logits", 0]
        ratio = torch.zeros(len(got))
        worst: dict[int, tuple[float, Element]] = {}  # segment -> its worst failing element
        for ids, expected in expected_logits(self._reference, run.inputs["final_norm", 0]):
            part = got[:, ids]
            measured = measure.bounded(expected.value, expected.budget, part, is_signed=False)
            ratio = torch.maximum(ratio, measured.ratio)
            for index, segment in enumerate(run.segments):
                rows = segment.logit_rows
                largest = float(measured.ratio[rows].max()) if rows.stop > rows.start else 0.0
                if not largest <= max(compare.MAX_RATIO, worst.get(index, (0.0, None))[0]):
                    budget = expected.budget(rows)
                    element = measure.worst_bounded(expected.value, budget, part, rows)
                    worst[index] = (largest, _shifted(element, ids.start))
        for index, segment in enumerate(run.segments):
            rows = segment.logit_rows
            if rows.stop == rows.start:
                continue
            largest = float(ratio[rows].max())
            verdict, differing = compare.judge_bounded(largest), None
            if run.twin is not None:
                differing = _differing(got[rows], run.twin["logits", 0][rows])
                bits = compare.judge_bits(differing, got[rows].numel(), OTHER_BITS)
                verdict = compare.first_failure(verdict, bits)
            numbers = Numbers(largest, differing, got[rows].numel(), None, None)
            self._add_cell(point, 0, run, segment, verdict, numbers)
            if not verdict.passed:
                element = worst[index][1] if index in worst else None
                if element is None and run.twin is not None:
                    element = measure.worst_replayed(run.twin["logits", 0], got, rows)
                self._report(point, 0, run, segment, verdict, element)

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
        self,
        point: Point,
        layer: int,
        run: Pass,
        segment: Segment | None,
        verdict: Verdict,
        element: Element | None,
    ) -> None:
        self.findings.append(
            Finding(
                run.mode,
                run.phase,
                segment.prompt if segment else None,
                layer,
                point.name,
                point.grade,
                verdict,
                element,
                _position(run, segment, element, point),
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


def _differing(got: Tensor, other: Tensor) -> int:
    return int((~same_bits(got, other)).sum())


def _shifted(element: Element, columns: int) -> Element:
    return Element(
        element.row,
        element.column + columns,
        element.got,
        element.expected,
        element.ulps,
        element.budget,
    )


def _worst(
    expected: Replayed | Bounded, got: Tensor, run: Pass, key: tuple[str, int], rows: slice
) -> Element:
    """The element to show: worst against truth, else against what it should repeat."""
    if isinstance(expected, Bounded):
        element = measure.worst_bounded(expected.value, expected.budget(rows), got, rows)
        is_over = (
            element.budget is not None and not abs(element.got - element.expected) <= element.budget
        )
    else:
        element = measure.worst_replayed(expected.value, got, rows)
        is_over = element.ulps != 0
    if not is_over:
        for other in (run.reference, run.twin):
            if other is not None and _differing(got[rows], other[key][rows]):
                return measure.worst_replayed(other[key], got, rows)
    return element


def _position(
    run: Pass, segment: Segment | None, element: Element | None, point: Point
) -> int | None:
    if segment is None or element is None:
        return None
    row = element.row
    if point.name in ("final_norm", "logits"):
        row = int(run.logit_rows[row])
    return int(run.positions[row])
