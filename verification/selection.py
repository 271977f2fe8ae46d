"""Which checks are wanted: the filters of the command line as one value.

Decides yes or no for a tap, a layer, an operation and a grade; knows nothing of how they are
checked.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import InvalidArgument
from verification.taps import OPERATIONS, POINT, RESULT_ORDER, operation_of

GRADES = ("exact", "bounded", "bits", "tokens")
IN_NO_LAYER = ("rope_table", "embed", "final_norm", "logits", "argmax")
PROBE_PREFIX = "probe-"  # of the prompt ids of structured inputs, which every run has


@dataclass(frozen=True)
class Selection:
    """The wanted checks; None means all.

    Args:
        taps: names of verification.taps.RESULT_ORDER.
        layers: layer numbers; taps that belong to no layer are wanted only if layers is None.
        operations: names of verification.taps.OPERATIONS.
        grades: names of GRADES; bits belongs to every tap in decode.
    """

    taps: frozenset[str] | None = None
    layers: frozenset[int] | None = None
    operations: frozenset[str] | None = None
    grades: frozenset[str] | None = None

    def __post_init__(self) -> None:
        """Refuse names that nothing has."""
        _check("tap", self.taps, RESULT_ORDER)
        _check("operation", self.operations, OPERATIONS)
        _check("grade", self.grades, GRADES)

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return self == Selection()

    def is_empty(self, num_layers: int) -> bool:
        """Whether no check at all of a model is wanted."""
        places = ((tap, layer) for tap in RESULT_ORDER for layer in range(num_layers))
        return not self.has_grade("tokens") and not any(self.wants(*place) for place in places)

    def wants(self, tap: str, layer: int) -> bool:
        """Whether a tap, or a check with a tap's place, is to be graded."""
        if self.taps is not None and tap not in self.taps:
            return False
        if self.layers is not None and (tap in IN_NO_LAYER or layer not in self.layers):
            return False
        if self.operations is not None and operation_of(tap).name not in self.operations:
            return False
        grade = POINT[tap].grade if tap in POINT else "exact"
        return self.grades is None or grade in self.grades or "bits" in self.grades

    def has_grade(self, grade: str) -> bool:
        """Whether whole-model checks of a grade are wanted; choosing taps or layers drops them."""
        if self.taps is not None or self.layers is not None or self.operations is not None:
            return False
        return self.grades is None or grade in self.grades


def _check(what: str, chosen: Iterable[str] | None, known: Iterable[str]) -> None:
    for name in sorted(chosen or ()):
        if name not in known:
            raise InvalidArgument(f"no {what} {name!r}; there are {', '.join(known)}")
