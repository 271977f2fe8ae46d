"""A file of answers that grows by a line at a time, and survives a run that is stopped anywhere.

Knows lines and JSON; knows nothing of what is kept. Invariant: a line counts once its line break is
there; what a stopped run began to write is cut off before anything is written behind it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import EngineError


class JsonLinesError(EngineError):
    """A whole line of such a file is not a JSON object; file and line are named."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, none if there is no file; a rest without its line break is cut.

    Raises:
        JsonLinesError: somebody else wrote to it.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole, line_break, rest = content.rpartition(b"\n")
    if rest:
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(line_break))
    entries = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise JsonLinesError(f"{path} line {number}: {error}; delete it to go on") from error
        if not isinstance(entry, dict):
            raise JsonLinesError(f"{path} line {number}: no JSON object; delete it to go on")
        entries.append(entry)
    return entries


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Writes one more line, all of it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
