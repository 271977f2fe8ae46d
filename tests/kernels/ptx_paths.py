"""A kernel's instructions and where each may go next, read from PTX; what may hold on its paths.

Knows jumps, not values: a path that no thread takes is a path. It refuses calls and jump tables.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

ENTRY = re.compile(r"(?:\.visible )?\.entry (\w+)\(")
GUARD = re.compile(r"@!?%?\w+\s+")


@dataclass
class Kernel:
    """The instructions of an entry, guards and labels taken off.

    Args:
        after: for each instruction those that may come next.
    """

    name: str
    code: list[str] = field(default_factory=list)
    after: list[list[int]] = field(default_factory=list)


def read_kernels(ptx: str) -> Iterator[Kernel]:
    """Every entry of a file; nvcc has inlined what it calls."""
    kernel, depth = None, 0
    for raw in ptx.splitlines():
        line = raw.partition("//")[0].strip()
        if entry := ENTRY.match(line):
            kernel, labels, jumps = Kernel(entry[1]), {}, {}
        elif kernel is None or not line or line[0] == ".":
            continue
        elif line in ("{", "}"):
            depth += 1 if line == "{" else -1
            if depth == 0:
                for place, label in jumps.items():
                    kernel.after[place].append(labels[label])
                yield kernel
                kernel = None
        elif depth and line[-1] == ":":
            labels[line[:-1]] = len(kernel.code)
        elif depth:
            _append(kernel, line.rstrip("; \t"), labels, jumps)


def _append(kernel: Kernel, line: str, labels: dict[str, int], jumps: dict[int, str]) -> None:
    guard = GUARD.match(line)
    code = line[guard.end() :] if guard else line
    assert not code.startswith(("call", "brx")), f"{kernel.name}: where does {code} go?"
    place = len(kernel.code)
    ends = re.match(r"(bra|ret|exit|trap)\b", code)
    after = [] if ends and not guard else [place + 1]
    if ends and ends[1] == "bra":
        label = code.split()[-1]
        if label.startswith("$"):
            jumps[place] = label
        else:  # of an asm statement: its name may come again, and it jumps back
            after.append(labels[label])
    kernel.code.append(code)
    kernel.after.append(after)


def states(kernel: Kernel, start: object, step: Callable, join: Callable) -> list:
    """What may hold before each instruction; None where none ever comes.

    Args:
        step: (instruction, what holds before it) -> what holds after it.
        join: of two paths that meet; it may only grow.
    """
    found = [None] * len(kernel.code)
    # Round loops again and again: it ends since what holds may only grow, and finitely far.
    found[0], todo = start, deque([0])
    while todo:
        place = todo.popleft()
        out = step(kernel.code[place], found[place])
        for after in kernel.after[place]:
            joined = out if found[after] is None else join(found[after], out)
            if joined != found[after]:
                found[after] = joined
                todo.append(after)
    return found
