"""Grades the operations of passes, layer by layer.

Keeps cells and ULP histograms of a run; knows nothing of how the engine was run, of single
operations (`layer_grader`) or of whole models.
"""

from collections import defaultdict
from collections.abc import Callable, Collection

from engine.config import ModelConfig
from verification.diagnosis.library import diagnosis_of, few_logits
from verification.diagnosis.scene import Scene
from verification.expected import Bounded, LayerTruth, RopeRows, expected_logits
from verification.layer_grader import LayerGrader
from verification.localise import Findings
from verification.oracle import Reference
from verification.passes import Pass
from verification.replay import Replayed
from verification.results import Cell, no_histogram
from verification.taps import POINT
from verification.truth import LinearTruth
from verification.workers import in_order


class OperatorGrader:
    """Grades passes; hold one for a whole run.

    Args:
        reference: the bfloat16 transformers model.
        config: the engine's view of the model.
        rope: cos and sin of every position that occurs.
        findings: where failures go.
        wants: (tap, layer) -> whether it is to be graded.
    """

    def __init__(
        self,
        reference: Reference,
        config: ModelConfig,
        rope: RopeRows,
        findings: Findings,
        wants: Callable[[str, int], bool],
    ) -> None:
        self._reference = reference
        self._config = config
        self._rope = rope
        self._findings = findings
        self._wants = wants
        self.cells: list[Cell] = []
        self.histograms: dict[str, list[int]] = defaultdict(no_histogram)

    def grade(self, runs: Collection[Pass], says: Callable[[int], None]) -> None:
        """Grades all layers of some passes.

        Args:
            says: told the layer after each one.
        """
        known = len(self._findings.failed)

        def work(layer: int) -> LayerGrader:
            truth = LayerTruth(self._reference, self._config, layer, self._rope)
            grader = LayerGrader(self._reference, self._config, truth, layer, self._wants)
            grader.grade(runs)
            return grader

        layers = range(self._config.num_layers)
        # The last layer brings the logits: as much work as several layers.
        for layer, graded in enumerate(in_order(work, layers, longest=layers[-1:])):
            self.cells += graded.cells
            for finding in graded.findings:
                self._findings.add(finding)
            for tap, counts in graded.histograms.items():
                total = self.histograms[tap]
                total[:] = [a + b for a, b in zip(total, counts, strict=True)]
            says(layer)
        self._diagnose(runs, known)

    def _diagnose(self, runs: Collection[Pass], known: int) -> None:
        """Explains the first failure if these passes brought it: others follow from it."""
        first = next(iter(self._findings.ordered()), None)
        if first is None or first not in self._findings.failed[known:]:
            return
        run = next(run for run in runs if (run.mode, run.phase) == (first.mode, first.phase))
        weight = self._reference.weight
        run = few_logits(run) if first.tap == "logits" else run
        scene = Scene(self._config, first.tap, first.layer, run, self._rope, weight)
        self._findings.explain(first, diagnosis_of(scene, self._expected(scene)))

    def _expected(self, scene: Scene) -> Replayed | Bounded:
        layer = scene.layer if POINT[scene.tap].in_layer else self._config.num_layers - 1
        if scene.tap == "logits":
            truth = LinearTruth([scene.own_weight()])
            return expected_logits(truth, *scene.inputs())
        truth = LayerTruth(self._reference, self._config, layer, self._rope)
        return truth.expect(scene.tap, scene.run)
