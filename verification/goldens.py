"""Reads recorded goldens and holds a run against them.

Knows the files of golden/<model>/, fingerprints and hashes; knows nothing of how an oracle or an
engine computes, and writes nothing: record.py is the only writer. Two things are compared, and only
these: the float32 oracle within a tolerance, as another CPU or torch may sum in another order, and
the engine's bits exactly. bfloat16 results of transformers change with the CPU and are never
compared.
Invariant: a set is used only if every file's SHA-256 is the one in its manifest.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from engine.errors import EngineError
from verification.taps import TapKey

SCHEMA = 1
GOLDEN_ROOT = Path(__file__).resolve().parent.parent / "golden"
FILES = ("tokens.json", "fingerprints.safetensors", "bits.json")

NUM_PROJECTIONS = 64  # their norm tells an error's size to 9 %
PROJECTION_SEED = 20  # of the signs; in every manifest
# Relative to the tap's own size. Measured: float32 against float64 at most 1.1e-5, bfloat16 at
# least 1.1e-3 (every tap of toy and smollm2-135m, 18 prompts); this is the middle of the decades.
FINGERPRINT_TOLERANCE = 1e-4

# Taps of which only the last row counts: a run may ask for the logits of one token or of all.
LAST_ROW_TAPS = ("final_norm", "logits")
MAX_DETAILS = 20


class GoldenError(EngineError):
    """A golden set is damaged, incomplete or of another schema; the message names the file."""


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of one tap of the oracle.

    The last row stands for all: through attention it depends on every row before it.
    """

    projections: np.ndarray  # [NUM_PROJECTIONS] float32: signed sums of the last row's values
    rms: float  # of all rows


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt's record."""

    prompt_sha256: str
    tokens: tuple[int, ...]  # greedy, by the oracle
    gaps: tuple[float, ...]  # lead of each over the second choice, in logits
    fingerprints: Mapping[TapKey, Fingerprint]
    yardstick_error: Mapping[TapKey, float]  # relative RMS error of transformers in bfloat16
    bits: Mapping[TapKey, str]  # SHA-256 of the engine's bytes


@dataclass(frozen=True)
class Golden:
    """One model's record."""

    manifest: Mapping[str, object]
    prompts: Mapping[str, GoldenPrompt]


@dataclass(frozen=True)
class GoldenVerdict:
    """The outcome in the form of verify.json's `goldens`."""

    status: str  # "pass", "fail" or "not run"
    reason: str | None
    details: tuple[str, ...] = ()


def fingerprint(values: np.ndarray) -> Fingerprint:
    """The fingerprint of one tap.

    Args:
        values: [rows, width] of any float type.
    """
    values = np.asarray(values, dtype=np.float64)
    projections = _signs(values.shape[-1]) @ values[-1]
    rms = float(np.sqrt(np.mean(np.square(values))))
    return Fingerprint(projections.astype(np.float32), rms)


def distance(found: Fingerprint, recorded: Fingerprint) -> float:
    """How far two fingerprints are apart, relative to the recorded one; inf if that one is zero."""
    last_row = _relative(
        np.linalg.norm(found.projections - recorded.projections),
        np.linalg.norm(recorded.projections),
    )
    return max(last_row, _relative(abs(found.rms - recorded.rms), recorded.rms))


def bit_hash(tap: str, values: np.ndarray) -> str:
    """SHA-256 of a tap's bytes as the engine left them; of LAST_ROW_TAPS only the last row."""
    rows = values[-1:] if tap in LAST_ROW_TAPS else values
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(model_name: str, roots: Iterable[Path]) -> Path | None:
    """The directory of a model's goldens: the first of the roots that has one."""
    return next(
        (r / model_name for r in roots if (r / model_name / "manifest.json").exists()), None
    )


def load(directory: Path) -> Golden:
    """Reads one set, after checking every file against the manifest.

    Raises:
        GoldenError: a file is missing, changed, or of another schema.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        schema = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GoldenError(f"{directory / 'manifest.json'} is not a manifest: {error}") from error
    if schema != SCHEMA:
        raise GoldenError(f"{directory}: schema {schema}, this program reads {SCHEMA}")
    if sorted(files) != sorted(FILES):
        raise GoldenError(f"{directory}: the manifest lists {sorted(files)}, not {sorted(FILES)}")
    for name, expected in files.items():
        path = directory / name
        if not path.exists():
            raise GoldenError(f"{path} is missing")
        if file_sha256(path) != expected:
            raise GoldenError(f"{path} is not the file that was recorded: its SHA-256 differs")
    return Golden(manifest, _prompts(directory, manifest))


def _prompts(directory: Path, manifest: Mapping) -> dict[str, GoldenPrompt]:
    taps: list[TapKey] = [(tap, layer) for tap, layer in manifest["taps"]]
    tokens = json.loads((directory / "tokens.json").read_text(encoding="utf-8"))
    bits = json.loads((directory / "bits.json").read_text(encoding="utf-8"))
    arrays = load_file(directory / "fingerprints.safetensors")
    prompts = {}
    for name, record in tokens.items():
        projections, rms = arrays[f"{name}.projections"], arrays[f"{name}.rms"]
        yardstick = arrays[f"{name}.yardstick_error"]
        prompts[name] = GoldenPrompt(
            prompt_sha256=record["prompt_sha256"],
            tokens=tuple(record["tokens"]),
            gaps=tuple(record["gaps"]),
            fingerprints={
                key: Fingerprint(projections[i], float(rms[i])) for i, key in enumerate(taps)
            },
            yardstick_error={key: float(yardstick[i]) for i, key in enumerate(taps)},
            bits={(tap, layer): bits[name][tap][layer] for tap, layer in taps},
        )
    return prompts


@dataclass
class GoldenCheck:
    """Holds a run against a golden set, tap by tap, as the run goes on.

    Invariant: what was not added was not checked, and a check of nothing is "not run".
    """

    golden: Golden
    num_oracle: int = 0  # taps compared
    num_bits: int = 0
    num_tokens: int = 0
    oracle_failures: list[str] = field(default_factory=list)
    bit_failures: list[tuple[int, int, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    worst_distance: float = 0.0
    _order: dict[TapKey, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Remembers the forward order of the taps."""
        self._order = {
            (tap, layer): i for i, (tap, layer) in enumerate(self.golden.manifest["taps"])
        }

    def same_subject(self, **expected: str) -> bool:
        """Checks facts of the manifest, e.g. weights_sha256; False if one differs."""
        before = len(self.problems)
        for name, value in expected.items():
            if (recorded := self.golden.manifest.get(name)) != value:
                now, then = _short(value), _short(recorded)
                self.problems.append(f"{name} is {now}, recorded was {then}; see make golden")
        return len(self.problems) == before

    def same_prompt(self, prompt_id: str, prompt_sha256: str) -> bool:
        """Whether a prompt was recorded with these token ids; only then may its taps be added."""
        recorded = self.golden.prompts.get(prompt_id)
        if recorded is not None and recorded.prompt_sha256 == prompt_sha256:
            return True
        what = "was never recorded" if recorded is None else "had other token ids when recorded"
        self.problems.append(f"prompt {prompt_id} {what}; see make golden")
        return False

    def add_fingerprint(self, prompt_id: str, tap: str, layer: int, live: Fingerprint) -> None:
        """Compares one tap of the live float32 oracle with its recorded fingerprint."""
        recorded = self.golden.prompts[prompt_id].fingerprints[(tap, layer)]
        found = distance(live, recorded)
        self.num_oracle += 1
        self.worst_distance = max(self.worst_distance, found)
        if not found <= FINGERPRINT_TOLERANCE:
            self.oracle_failures.append(
                f"oracle, prompt {prompt_id}, {tap}, layer {layer}: {found:.1e} from the record, "
                f"allowed {FINGERPRINT_TOLERANCE:.0e}"
            )

    def add_engine_hash(self, prompt_id: str, tap: str, layer: int, found: str) -> None:
        """Compares one tap of the engine's free-running prefill with its recorded hash."""
        self.num_bits += 1
        if found != self.golden.prompts[prompt_id].bits[(tap, layer)]:
            self.bit_failures.append((self._order[(tap, layer)], self.num_bits, prompt_id))

    def add_tokens(self, prompt_id: str, tokens: Sequence[int]) -> None:
        """Compares the live oracle's greedy text with the recorded one, up to where they part.

        They may part where the recorded choice led by no more than the oracle's tolerance: from
        there on the texts are two.
        """
        recorded = self.golden.prompts[prompt_id]
        tie = 2 * FINGERPRINT_TOLERANCE * recorded.fingerprints["logits", 0].rms
        pairs = zip(tokens, recorded.tokens, strict=False)  # a run may look less far
        for index, (found, token) in enumerate(pairs):
            if found != token:
                if (lead := recorded.gaps[index]) > tie:
                    self.oracle_failures.append(
                        f"oracle, prompt {prompt_id}, greedy token {index} is {found}, recorded "
                        f"was {token} with a lead of {lead:.2g}"
                    )
                return
            self.num_tokens += 1

    def verdict(self, operator_of: Callable[[str], str] = str) -> GoldenVerdict:
        """The outcome of everything added so far.

        Args:
            operator_of: a tap's operator, for the message.
        """
        details = [*self.problems]
        if self.bit_failures:
            details.append(self._first_differing(operator_of))
        details += self.oracle_failures
        if details:
            return GoldenVerdict("fail", details[0], tuple(details[1 : MAX_DETAILS + 1]))
        if not self.num_bits and not self.num_oracle:
            return GoldenVerdict("not run", "nothing that was recorded was run")
        recorded = self.golden.manifest["numerics_version"]
        return GoldenVerdict(
            "pass",
            None,
            (
                f"engine: {self.num_bits} taps, bits equal to those recorded for {recorded}",
                f"oracle: {self.num_oracle} taps within {self.worst_distance:.1e} of the record "
                f"(allowed {FINGERPRINT_TOLERANCE:.0e})",
                f"oracle: {self.num_tokens} greedy tokens equal to those recorded",
            ),
        )

    def _first_differing(self, operator_of: Callable[[str], str]) -> str:
        order, _, prompt = min(self.bit_failures)
        tap, layer = list(self._order)[order]
        return (
            f"engine bits differ first at layer {layer}, {tap} ({operator_of(tap)}), "
            f"prompt {prompt}; "
            f"{len(self.bit_failures)} of {self.num_bits} taps differ"
        )


@functools.cache
def _signs(width: int) -> np.ndarray:
    """Signs [NUM_PROJECTIONS, width] from raw Philox words, which no numpy release may change."""
    num_words = (NUM_PROJECTIONS * width + 63) // 64
    words = np.random.Philox(key=PROJECTION_SEED).random_raw(num_words).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: NUM_PROJECTIONS * width]
    return bits.reshape(NUM_PROJECTIONS, width).astype(np.float64) * 2.0 - 1.0


def _short(value: object) -> str:
    """A hash by its first digits, anything else as it is."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _relative(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return float(difference / size) if size else float("inf")
