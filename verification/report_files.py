"""Writes a run's results: verify.json for machines, and any report, whole or not at all.

Knows files and the form of the JSON; knows nothing of what a report says.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from engine.errors import EngineError


class ReportUnwritten(EngineError):
    """A report could not be written; the message names the file and the system's reason."""


def write_whole(path: Path, text: str) -> None:
    """Writes a file, or leaves what was there.

    Raises:
        ReportUnwritten: the disk is full, the directory is read-only, or the like.
    """
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise ReportUnwritten(f"{path} was not written: {error.strerror}") from error


def json_text(results: dict) -> str:
    """verify.json: one line per part, and one per row of the parts that are lists of rows.

    The cells, some sixty thousand, do not repeat their fields' names in every row: they are
    {"columns": [names], "rows": [[values], ...]}, with six digits of what is measured.
    """
    parts = []
    for key, part in results.items():
        if key == "cells" and part:
            columns = json.dumps(list(part[0]))
            rows = _json_rows([_digits(value) for value in cell.values()] for cell in part)
            text = f'{{"columns": {columns}, "rows": {rows}}}'
        elif isinstance(part, list) and part:
            text = _json_rows(part)
        else:
            text = json.dumps(part, allow_nan=False)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _json_rows(rows: Iterable[object]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]"


def _digits(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value
