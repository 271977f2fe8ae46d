"""Reads the report of compute-sanitizer: what kinds of findings, where, how many.

Knows the tool's text; knows no lanes and no verdict. What it does not recognise counts as a
finding.
Invariant: a report without the tool's own summary line is no report.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PREFIX = "========="
_SUMMARY = re.compile(
    r"^=+ (?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed)", re.M
)
# Lines of the tool's own that open no finding.
_CHATTER = re.compile(
    r"COMPUTE-SANITIZER|\w+ SUMMARY:|Target application|LEAK SUMMARY|Saved|"
    r"Program hit .* on CUDA API call to cudaGetLastError"
)
_SIDE = re.compile(r"(Read|Write|Atomic|Barrier \w+|\w+) access at (.+?)\+(0x[0-9a-f]+)")
_AT = re.compile(r"\bat (.+?)\+(0x[0-9a-f]+)")

# (function as the tool prints it, offset) -> opcode of the instruction there, or None
OpcodeAt = Callable[[str, int], str | None]


@dataclass(frozen=True)
class Kind:
    """A class of findings.

    Args:
        what: the tool's words, numbers and addresses taken out.
        function: the kernel it is in.
        pairs: of a race, which accesses met, each with its instruction: "Read LDSM with Write
            UBLKCP"; in alphabetical order.
    """

    what: str
    function: str
    pairs: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line: what, between which accesses, where."""
        between = f" ({', '.join(self.pairs)})" if self.pairs else ""
        return f"{self.what}{between} in {self.function or 'no kernel'}"


@dataclass(frozen=True)
class Report:
    """One run of the tool.

    Args:
        total: findings by the tool's own summary; None where it printed none.
        kinds: how many of each kind were read.
    """

    total: int | None
    kinds: dict[Kind, int]


def read_report(text: str, opcode_at: OpcodeAt = lambda function, offset: None) -> Report:
    """The findings of one run's output."""
    summary = _SUMMARY.search(text)
    kinds: dict[Kind, int] = {}
    for block in _blocks(text):
        kind = _kind(block, opcode_at)
        kinds[kind] = kinds.get(kind, 0) + 1
    return Report(int(summary[1] or summary[2]) if summary else None, kinds)


def _blocks(text: str) -> Iterator[list[str]]:
    """The lines of each finding: one that is not indented opens it, indented ones follow."""
    block: list[str] = []
    for line in text.splitlines():
        if not line.startswith(PREFIX):
            continue
        body = line[len(PREFIX) :]
        if body.startswith("     ") or not body.strip():
            if block:
                block.append(body.strip())
            continue
        if block:
            yield block
        block = [] if _CHATTER.search(body) else [body.strip()]
    if block:
        yield block


def _kind(block: list[str], opcode_at: OpcodeAt) -> Kind:
    text = "\n".join(block)
    what = re.sub(r"0x[0-9a-f]+|\d+", "#", re.split(r" between | reported ", block[0])[0])
    sides = []
    for access, function, offset in _SIDE.findall(text):
        opcode = opcode_at(function, int(offset, 16))
        sides.append(f"{access} {opcode}" if opcode else access)
    at = _AT.search(text)
    pairs = {" with ".join(sorted((sides[0], other))) for other in sides[1:]}
    return Kind(what, _bare(at[1]) if at else "", tuple(sorted(pairs)))


def _bare(function: str) -> str:
    """A kernel's name without its return type, template and parameters."""
    found = re.search(r"([A-Za-z_]\w*)\s*(?:<.*>)?\s*\(", function)
    return found[1] if found else function.strip()
