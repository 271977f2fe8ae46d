"""Words and numbers as both reports show them, and one tap's rows as one.

Knows rows of verify.json; knows nothing of terminals or pages.
"""

import math
import re
import shlex
from collections.abc import Iterable

from verification.selection import IN_NO_LAYER, PROBE_PREFIX

ANY_PROMPT = "len-1"  # the shortest that every model has
INFINITE = 1e300  # JSON has no infinity: verify.json writes 1e308
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: object) -> str:
    """Text without control characters, so that a prompt cannot steer the terminal."""
    return _CONTROL.sub("�", str(text))


def rerun_command(results: dict) -> str:
    """The command that runs only what failed first, after the engine is built again."""
    failure, model = results["first_failure"], results["model"]
    words = ["make verify", f"MODEL={shlex.quote(plain(model.get('asked_as', model['name'])))}"]
    if results["engine"]["device"] != "cpu":
        words.append(f"DEVICE={plain(results['engine']['device'])}")
    selection = []
    if (prompt := failure.get("prompt")) is not None:
        is_probe = prompt.startswith(PROBE_PREFIX)  # every run has the probes
        selection.append(f"--prompts {ANY_PROMPT if is_probe else plain(prompt)}")
    if failure["grade"] == "tokens":  # of the whole model: a choice of taps would leave them out
        selection.append("--grade tokens")
    else:
        if failure.get("layer") is not None and failure["tap"] not in IN_NO_LAYER:
            selection.append(f"--layers {failure['layer']}")
        selection.append(f"--taps {plain(failure['tap'])}")
    return " ".join([*words, f"ARGS={shlex.quote(' '.join(selection))}"])


def statuses(results: dict) -> list[str]:
    """The verdict of every check: the rows of the summary, the tokens, the two records.

    A prompt that was not run is one more that is "not run".
    """
    found = [row["status"] for row in results["summary"]]
    if results["tokens"]:
        found.append(tokens_status(results))
    found += ["not run" for _ in results["prompts_not_run"]]
    return found + [results[part]["status"] for part in ("goldens", "gpu_record")]


def tokens_status(results: dict) -> str:
    """The verdict of the greedy tokens: each of them, and no more ties than chance gives."""
    return "fail" if results["failed_checks"].get("tokens") else "pass"


def forward_order(summary: Iterable[dict]) -> list[str]:
    """The taps of a summary in the order of the forward pass, which is the order of its rows."""
    return list(dict.fromkeys(row["tap"] for row in summary))


def merged(rows: list[dict]) -> dict | None:
    """One tap's rows of one mode (prefill, decode) as one: counts added, the worst of the rest.

    A row that was not run adds nothing but `partial`; it has its own line below the table.
    """
    run = [row for row in rows if row["status"] != "not run"]
    if not run:
        return {"status": "not run"} if rows else None
    return {
        "grade": run[0]["grade"],
        "values": sum(row["values"] for row in run),
        "differing": summed(row["differing"] for row in run),
        **{key: largest(row[key] for row in run) for key in ("max_ulp", "max_ratio", "max_z")},
        "status": "fail" if any(row["status"] == "fail" for row in run) else "pass",
        "partial": len(run) < len(rows),
    }


def count(value: int | None) -> str:
    """A count in at most seven characters: 1 234, 46.7 k, 12.3 M."""
    if value is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * (10 if unit == "k" else 1):
            return f"{value / size:.1f} {unit}"
    return str(value)


def counted(number: int, what: str) -> str:
    """A number of things: 1 prompt, 2 prompts."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def ratio(value: float | None) -> str:
    """A ratio in at most six characters; over 9999 as a power of ten."""
    if value is None:
        return "–"
    if math.isnan(value) or value >= INFINITE:
        return "nan" if math.isnan(value) else "inf"
    if value >= 9999.5:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def full(value: float | None) -> str:
    """A value with all the digits that tell one float32 from the next."""
    return "–" if value is None else f"{value:.9g}"


def largest(values: Iterable[float | None]) -> float | None:
    """The largest in size; a NaN is worse than any number, None means nothing was measured."""
    present = [value for value in values if value is not None]
    if any(math.isnan(value) for value in present):
        return math.nan
    return max(present, key=abs, default=None)


def summed(values: Iterable[int | None]) -> int | None:
    """The sum of what was counted; None if nothing was."""
    present = [value for value in values if value is not None]
    return sum(present) if present else None
