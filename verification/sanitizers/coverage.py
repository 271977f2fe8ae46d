"""Which kernels of the library the workload runs: every one, or the missing ones by name.

Reads a listing of cuobjdump and names of launches; runs nothing. A template's instances count one
by one.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

LISTING = ("-res-usage",)  # of cuobjdump: a line "Function NAME:" per kernel


@dataclass(frozen=True)
class Coverage:
    """What is there and what ran, each kernel as C++ writes it."""

    kernels: frozenset[str]
    run: frozenset[str]

    @property
    def problems(self) -> list[str]:
        """Why this is not every kernel."""
        if not self.kernels:
            return ["the library's kernels could not be listed"]
        return [f"kernel {name} was not run" for name in sorted(self.kernels - self.run)]

    def to_json(self) -> dict:
        """As a dict of build/sanitize.json."""
        count = len(self.kernels & self.run)
        return {"kernels": len(self.kernels), "run": count, "problems": self.problems}


def kernels_listed(listing: str) -> list[str]:
    """The linker's names in cuobjdump's listing."""
    return re.findall(r"^\s*Function (\w+):", listing, re.M)


def coverage(kernels: Iterable[str], launched: Iterable[str]) -> Coverage:
    """Both sets, of names in C++'s form; what is launched beside them does not count."""
    plain = [frozenset(map(plain_name, names)) for names in (kernels, launched)]
    return Coverage(*plain)


def plain_name(name: str) -> str:
    """A kernel's name and template arguments, without what demanglers write differently."""
    found = re.match(r"(?:void )?(\w+)(<.*?>)?\(", re.sub(r"\((?:int|bool)\)", "", name.strip()))
    if found is None:
        return name.strip()
    arguments = re.sub(
        r"\s|true|false", lambda of: {"true": "1", "false": "0"}.get(of[0], ""), found[2] or ""
    )
    return found[1] + arguments
