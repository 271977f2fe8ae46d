"""Operations of a stranger's shared object, called with guarded memory.

Knows the C signatures of ops.h by way of `Library` and `Ops`; decides nothing about results. Every
array that crosses to C is a copy inside a larger block whose margins, and whose content where it is
a result, hold a pattern: so a write beside an array, a changed input and a value that was never
written are all seen.
"""

from pathlib import Path

import numpy as np

from engine.bindings import DEVICES, Library
from engine.errors import EngineError
from engine.ops import Ops

MARGIN = 4096  # bytes on either side of an array; a multiple of every alignment a kernel may want

# Patterns for memory that the operation must not read, as uint16 (two make a float32 or int32).
POISONS = {"NaN": 0x7FC1, "infinity": 0x7F80, "1e30": 0x7149}


class ForeignLibrary(Library):
    """A shared object with some of the operations of ops.h, and nothing else that is promised.

    Args:
        path: the shared object.

    Raises:
        EngineError: it is missing or cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise EngineError(f"no such file: {path}")
        self._load(path)
        self.poison = POISONS["NaN"]
        self._guarded: list[tuple[np.ndarray, np.ndarray, str]] = []  # array, its block, name

    def has(self, function: str) -> bool:
        """Whether the object exports a function of ops.h or engine.h."""
        try:
            getattr(self.lib, function)
        except AttributeError:
            return False
        return True

    def check(self, status: int) -> None:
        """Raise for a failed status, in the library's words where it has engine_last_error."""
        if status == 0 or self.has("engine_last_error"):
            super().check(status)
        else:
            raise EngineError(f"it returned status {status}")

    def _memory(self, values: np.ndarray, name: str) -> np.ndarray:
        """A guarded copy of an array; `settle` copies results back."""
        size = 2 * MARGIN + values.nbytes
        block = np.full(size // 2, self.poison, np.uint16).view(np.uint8)
        start = MARGIN - block.ctypes.data % 256  # as aligned as a GPU's memory would be
        inside = block[start : start + values.nbytes]
        if self._guarded:  # Ops names the result first; it is not shown what was there
            inside[:] = values.reshape(-1).view(np.uint8)
        self._guarded.append((values, block, name))
        return inside

    def settle(self) -> list[str]:
        """Copies results back after a call.

        Returns:
            What the call did to memory that it should have left alone, in words.
        """
        complaints = []
        for number, (values, block, name) in enumerate(self._guarded):
            start = MARGIN - block.ctypes.data % 256
            inside = block[start : start + values.nbytes]
            end = start + values.nbytes
            for side, margin in (("before", block[:start]), ("after", block[end:])):
                if not (margin.view(np.uint16) == self.poison).all():
                    complaints.append(f"it wrote {side} {name}")
            if number == 0:
                values.reshape(-1).view(np.uint8)[:] = inside
            elif not np.array_equal(inside, values.reshape(-1).view(np.uint8)):
                complaints.append(f"it changed its input {name}")
        self._guarded.clear()
        return complaints


class ForeignOps(Ops):
    """The operations of a stranger.

    The context is null, unless the object exports op_context_create: then it is what that gives.

    Args:
        library: the opened object.
    """

    def __init__(self, library: ForeignLibrary) -> None:
        self.library = library
        self.complaints: list[str] = []
        context = library.ffi.new("OpContext **")
        self._owns = library.has("op_context_create")
        if self._owns:
            library.check(library.lib.op_context_create(DEVICES["cpu"], 1, context))
        self._context = context[0]

    def close(self) -> None:
        """Give the context back where the object made one."""
        if self._owns:
            super().close()

    def _call(self, function: str, *arguments: object) -> None:
        if not self.library.has(function):
            raise EngineError(f"{self.library.path.name} does not export {function}")
        try:
            super()._call(function, *arguments)
        finally:
            self.complaints += self.library.settle()
