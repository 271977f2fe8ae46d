"""The results of a verification as data, and their form in verify.json.

Holds what the reports show; decides nothing. Invariant: `to_json` gives exactly the fields below,
with no NaN among them.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from verification.goldens import GoldenVerdict
from verification.rounding import HISTOGRAM_BINS

SCHEMA = 2  # of verify.json


@dataclass(frozen=True)
class Cell:
    """One tap of one layer for one prompt, in one mode and phase."""

    mode: str
    phase: str
    prompt: str
    layer: int
    tap: str
    grade: str
    status: str
    ratio: float | None  # largest error / budget of all that was checked here
    differing: int | None
    values: int
    z: float | None
    max_ulp: int | None


@dataclass(frozen=True)
class SummaryRow:
    """All cells of one tap in one mode and phase."""

    mode: str
    phase: str
    tap: str
    operator: str
    grade: str
    cells: int
    values: int
    differing: int | None
    max_ulp: int | None
    max_ratio: float | None
    max_z: float | None
    status: str
    reason: str | None


@dataclass(frozen=True)
class Failure:
    """One failure with everything needed to find its cause."""

    operator: str
    tap: str
    layer: int
    mode: str
    phase: str
    prompt: str | None
    hf_module: str
    c_function: str
    file: str
    token: int | None  # position in the prompt
    head: int | None
    channel: int | None  # within the head, if there is one
    got: float | None
    expected: float | None
    ulps: int | None
    budget: float | None
    grade: str
    message: str
    diagnosis: str | None = None  # the known wrong variant that the values are, in words


@dataclass(frozen=True)
class LogitsResult:
    """The logits of one prompt, engine against oracle, as shares of the yardstick's distance."""

    prompt: str
    centred_ratio: float | None
    kl_mean_ratio: float | None
    kl_max_ratio: float | None
    top1_agree: float | None
    status: str


@dataclass(frozen=True)
class TokenResult:
    """One greedy token along the oracle's text."""

    position: int
    oracle_id: int
    oracle_text: str
    engine_id: int
    engine_text: str
    gap: float  # oracle logits: how far the engine's token is below the best
    sigma: float  # the yardstick's error there
    lead: float  # oracle logits: how far the best is ahead of the second
    status: str  # equal, tie or fail


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of one prompt."""

    prompt: str
    tokens: tuple[TokenResult, ...]


@dataclass(frozen=True)
class ResidualGrowth:
    """RMS error of the residual stream after each layer against the oracle, channels scaled."""

    layers: tuple[int, ...] = ()
    engine: tuple[float, ...] = ()
    yardstick: tuple[float, ...] = ()


@dataclass(frozen=True)
class Results:
    """One run."""

    model: dict[str, Any]
    engine: dict[str, str]
    versions: dict[str, str]
    machine: dict[str, Any]
    started: str
    seconds: float
    verdict: str
    summary: tuple[SummaryRow, ...]
    cells: tuple[Cell, ...]
    ulp_histogram: dict[str, list[int]]
    residual_growth: ResidualGrowth
    logits: tuple[LogitsResult, ...]
    tokens: tuple[PromptTokens, ...]
    goldens: GoldenVerdict
    first_failure: Failure | None
    failed_checks: dict[str, int] = field(default_factory=dict)  # by level, lowest first
    schema: int = field(default=SCHEMA)

    @property
    def passed(self) -> bool:
        """Whether everything that was run passed and something was run."""
        return self.verdict == "pass"

    def to_json(self) -> dict[str, Any]:
        """The content of verify.json: plain values; an infinity is the number 1e308."""
        fields = asdict(self)
        return _plain({"schema": fields.pop("schema"), **fields})


def no_histogram() -> list[int]:
    """An empty ULP histogram."""
    return [0] * HISTOGRAM_BINS


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return math.copysign(1e308, value) if math.isinf(value) else None
    return value
