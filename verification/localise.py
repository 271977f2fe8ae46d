"""Finds the first failure: the one nearest to the cause.

Knows the order of levels and of the forward pass; knows nothing of tensors. A failure at one level
explains those at later levels, and within a level an operation explains those that read its result.
So the first is: lowest level, then earliest in the forward pass, then prefill before decode, then
the prompt that came first.
"""

from dataclasses import dataclass, field, replace

from engine.config import ModelConfig
from verification.compare import Verdict
from verification.measure import Element
from verification.results import Failure
from verification.taps import POINT, forward_index, hf_module_of, operation_of

# Known inputs; the same operations on their own inputs; whole layers; logits; tokens.
LEVELS = ("local", "accumulated", "layers", "logits", "tokens")
WITHOUT_TAPS = "step without taps"  # an operator of its own: what runs where nobody looks
STEP = ("model_forward", "csrc/model/forward.c")  # on every device
RESIDUAL = "residual"  # in counts: whole layers' failures at the residual stream after a layer


@dataclass(frozen=True)
class Finding:
    """One failed check.

    Args:
        mode: LOCAL or ACCUMULATED.
        tap: a tap, or rope_table, write_kv_cache, argmax.
        prompt: None where prompts are pooled.
        position: of the element's token in its prompt.
        level: one of LEVELS; that of the mode if not given.
    """

    mode: str
    phase: str
    prompt: str | None
    layer: int
    tap: str
    grade: str
    verdict: Verdict
    element: Element | None = None
    position: int | None = None
    level: str | None = None
    operator: str | None = None  # that of the tap if not given
    diagnosis: str | None = None  # the known wrong variant that the values are


@dataclass
class Findings:
    """All failed checks of a run."""

    config: ModelConfig
    device: str
    failed: list[Finding] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        """Takes note of a failure; passes are not findings."""
        assert not finding.verdict.passed
        self.failed.append(finding)

    def ordered(self) -> list[Finding]:
        """The findings, nearest to the cause first."""
        return sorted(self.failed, key=self._order)  # stable: prompts keep their order

    def explain(self, finding: Finding, diagnosis: str | None) -> None:
        """Adds what was done instead to a finding of this run."""
        self.failed[self.failed.index(finding)] = replace(finding, diagnosis=diagnosis)

    def first(self) -> Failure | None:
        """The first failure, written out."""
        ordered = self.ordered()
        return self.describe(ordered[0]) if ordered else None

    def count_by_level(self) -> dict[str, int]:
        """Failed checks of each level that has any, lowest first."""
        counts = dict.fromkeys(("local", "accumulated", "layers", RESIDUAL, "logits", "tokens"), 0)
        for finding in self.failed:
            level = finding.level or finding.mode
            is_residual = level == "layers" and finding.tap == "mlp_residual"
            counts[RESIDUAL if is_residual else level] += 1
        return {level: count for level, count in counts.items() if count}

    def describe(self, finding: Finding) -> Failure:
        """A finding with the places in both code bases and the value's coordinates."""
        element, operation = finding.element, operation_of(finding.tap)
        c_function, file = operation.c_function(self.device), operation.file(self.device)
        if finding.operator == WITHOUT_TAPS:
            c_function, file = STEP
        head, channel = self._head_and_channel(finding)
        return Failure(
            operator=finding.operator or operation.name,
            tap=finding.tap,
            layer=finding.layer,
            mode=finding.mode,
            phase=finding.phase,
            prompt=finding.prompt,
            hf_module=hf_module_of(finding.tap, finding.layer),
            c_function=c_function,
            file=file,
            token=finding.position,
            head=head,
            channel=channel,
            got=element.got if element else None,
            expected=element.expected if element else None,
            ulps=element.ulps if element else None,
            budget=element.budget if element else None,
            grade=finding.grade,
            message=finding.verdict.reason or "failed",
            diagnosis=finding.diagnosis,
        )

    def _order(self, finding: Finding) -> tuple[int, tuple[int, int], bool, bool]:
        level = LEVELS.index(finding.level or finding.mode)
        place = forward_index(finding.tap, finding.layer, self.config.num_layers)
        return (level, place, finding.phase == "decode", finding.prompt is None)

    def _head_and_channel(self, finding: Finding) -> tuple[int | None, int | None]:
        if finding.element is None:
            return None, None
        column = finding.element.column
        has_heads = finding.tap == "write_kv_cache" or (
            finding.tap in POINT and POINT[finding.tap].heads is not None
        )
        if not has_heads:
            return None, column
        return divmod(column, self.config.head_dim)
