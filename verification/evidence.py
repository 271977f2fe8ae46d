"""Evidence: what a measured run of the suite against itself has shown, as a small file in git.

One run of one question is one record, docs/evidence/<name>.json; `verification.evidence_page` makes
docs/evidence.md of them all. Holds the form of a record and its arithmetic; knows nothing of how
anything is measured. Invariant: a record carries the SHA-256 of its own content, so that one edited
by hand is refused.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.source_stamp import source_stamp
from verification.provenance import cpu_name, software_versions

ROOT = Path(__file__).resolve().parent.parent
EVIDENCE = ROOT / "docs" / "evidence"
SCHEMA = 1
MAX_BYTES = 300_000  # of a record: it lives in git

Z_95 = 1.959963984540054  # the standard normal's 97.5 % point: two-sided 95 %

TableCell = str | int | float | None
Place = dict[str, dict[str, Any]]  # "machine" and "versions", as a record has them


class EvidenceError(EngineError):
    """A record is malformed, too large, or not as it was written; the file is named."""


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson: sensible for 0 and for all, and for few.

    Args:
        hits: 0 <= hits <= total.
        total: at least 1.

    Source: Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    if not 0 <= hits <= total or total < 1:
        raise EvidenceError(f"no share: {hits} of {total}")
    share, z2 = hits / total, Z_95 * Z_95
    centre = share + z2 / (2 * total)
    spread = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    low, high = (centre - spread) / (1 + z2 / total), (centre + spread) / (1 + z2 / total)
    return max(0.0, min(low, share)), min(1.0, max(high, share))


@dataclass(frozen=True)
class Score:
    """A counted share and what was wanted.

    Args:
        what: a sentence's worth: what is counted.
        hits, total: the count.
        at_least, at_most: the goal as a share; None where there is none on that side.
    """

    what: str
    hits: int
    total: int
    at_least: float | None = None
    at_most: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the goal is reached; nothing counted reaches no goal."""
        if self.total < 1:
            return False
        share = self.hits / self.total
        low = 0.0 if self.at_least is None else self.at_least
        high = 1.0 if self.at_most is None else self.at_most
        return low <= share <= high


@dataclass(frozen=True)
class Table:
    """One table; a cell is a word, a number, or None for nothing to say.

    Args:
        note: a sentence under the title.
        is_folded: shown behind a click where the reader allows it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    note: str = ""
    is_folded: bool = False

    def __post_init__(self) -> None:
        """Refuses rows of another length than the heading's."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise EvidenceError(
                    f"table {self.title!r}: a row has {len(row)} cells, "
                    f"the heading {len(self.columns)}"
                )


@dataclass(frozen=True)
class Evidence:
    """One run of one question.

    Args:
        name: of the file, lower-case words with hyphens.
        title: of its section.
        question: what was asked and how it was answered, a short paragraph.
        command: what repeats it.
        scores: the counts, goals first.
        tables: the details.
        seconds: the run took.
        recorded: UTC, to the second.
        csrc_sha256: the source stamp of the C and CUDA that ran.
        suite_sha256: of engine/, verification/ and tests/.
        machine: cpu, cores, and gpu where one was used.
        versions: of torch, transformers, python.
    """

    name: str
    title: str
    question: str
    command: str
    scores: tuple[Score, ...]
    tables: tuple[Table, ...] = ()
    seconds: float = 0.0
    recorded: str = ""
    csrc_sha256: str = ""
    suite_sha256: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def passed(self) -> bool:
        """Whether every goal is reached."""
        return bool(self.scores) and all(score.passed for score in self.scores)


def evidence(
    name: str,
    title: str,
    question: str,
    command: str,
    scores: tuple[Score, ...],
    tables: tuple[Table, ...] = (),
    seconds: float = 0.0,
    places: Sequence[Place] = (),
) -> Evidence:
    """A record of a run that ended now, with this checkout's sources.

    Args:
        places: where answers were found; this machine where none are given.
    """
    places = places or (this_place(),)
    return Evidence(
        name,
        title,
        question,
        command,
        scores,
        tables,
        round(seconds, 1),
        datetime.now(UTC).isoformat(timespec="seconds"),
        source_stamp(ROOT / "csrc"),
        suite_sha256(),
        _joined([place["machine"] for place in places]),
        _joined([place["versions"] for place in places]),
    )


def this_place(gpu: str | None = None) -> Place:
    """This machine, and the software that answers on it."""
    machine = {"cpu": cpu_name(), "cores": os.cpu_count()} | ({} if gpu is None else {"gpu": gpu})
    return {"machine": machine, "versions": software_versions()}


def _joined(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts of several places as one: each value once."""
    if len(facts) == 1:
        return facts[0]
    keys = dict.fromkeys(key for each in facts for key in each)
    return {
        key: " and ".join(dict.fromkeys(str(each[key]) for each in facts if key in each))
        for key in keys
    }


def suite_sha256(root: Path = ROOT) -> str:
    """One hash of every Python source and fault of engine/, verification/ and tests/."""
    digest = hashlib.sha256()
    folders = ("engine", "verification", "tests")
    paths = [path for folder in folders for path in (root / folder).rglob("*")]
    for path in sorted(p for p in paths if p.suffix in (".py", ".toml")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def write(record: Evidence, folder: Path = EVIDENCE) -> Path:
    """Writes docs/evidence/<name>.json.

    Raises:
        EvidenceError: it is larger than what git should hold.
    """
    content = json.loads(json.dumps(asdict(record)))
    text = json.dumps(content | {"sha256": _sha256(content)}, indent=1, ensure_ascii=False) + "\n"
    path = folder / f"{record.name}.json"
    if len(text.encode()) > MAX_BYTES:
        raise EvidenceError(f"{path.name} would have {len(text)} bytes, the limit is {MAX_BYTES}")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path) -> Evidence:
    """Reads a record.

    Raises:
        EvidenceError: it is not of this schema, or not as `write` wrote it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("sha256")
        if content["schema"] != SCHEMA:
            raise EvidenceError(f"{path.name} has schema {content['schema']}, must be {SCHEMA}")
        if digest != _sha256(content):
            raise EvidenceError(f"{path.name} is not as it was written: edited by hand?")
        scores = tuple(Score(**score) for score in content.pop("scores"))
        tables = tuple(_table(table) for table in content.pop("tables"))
        record = Evidence(**content, scores=scores, tables=tables)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvidenceError(f"{path.name} is not a record of evidence: {error}") from error
    if record.name != path.stem:
        raise EvidenceError(f"{path.name} holds the record {record.name!r}")
    return record


def _table(content: dict[str, Any]) -> Table:
    rows = tuple(tuple(row) for row in content.pop("rows"))
    return Table(columns=tuple(content.pop("columns")), rows=rows, **content)


def _sha256(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
