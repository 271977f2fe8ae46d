"""The stranger's operations, called in a process of their own.

Knows how a process ends; judges no result. Whatever the object does, the caller gets a KernelError
that says it in words. The next call finds a fresh process, until the object has ended MAX_ENDINGS
of them or has not returned in time: then it is not called again.
"""

import contextlib
import signal
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

import numpy as np

from engine.errors import EngineError
from engine.foreign import POISONS

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 120.0  # seconds for one call: a naive kernel on one core needs a few
START_TIMEOUT = 120.0  # seconds for Python to start
MAX_ENDINGS = 3


class KernelError(EngineError):
    """The stranger's operation crashed, hung, refused its input or harmed memory."""


class Kernel:
    """One operation of a shared object. Close it, or use it in a with statement.

    Args:
        path: the shared object.
        operation: a method of engine.ops.Ops; op_<operation> is what is called.
        timeout: seconds that one call may take.

    Raises:
        KernelError: the object cannot be opened.
    """

    def __init__(self, path: Path, operation: str, timeout: float = TIMEOUT) -> None:
        self.operation = operation
        self._path = path
        self._timeout = timeout
        self._child: subprocess.Popen | None = None
        self._endings = 0
        self._start()

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; closing twice is allowed."""
        child, self._child = self._child, None
        if child is not None:
            self._connection.close()
            child.kill()
            child.wait()

    def __call__(self, *arguments: object, poison: str = "NaN") -> np.ndarray:
        """Calls the operation.

        Args:
            arguments: as of the method of engine.ops.Ops.
            poison: what lies around every array and in the result before the call.

        Raises:
            KernelError: in words what the operation did.
        """
        if self._endings >= MAX_ENDINGS:
            raise KernelError(f"op_{self.operation} is not called again")
        if self._child is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):  # how it has ended, the answer says
            self._connection.send((self.operation, arguments, POISONS[poison]))
        kind, result, complaints = self._answer(self._timeout)
        if kind == "broken":
            raise AssertionError(f"op_{self.operation} could not be called: {result}")
        if kind == "error":
            raise KernelError(f"op_{self.operation}: {result}")
        if complaints:
            raise KernelError(f"op_{self.operation}: {'; '.join(dict.fromkeys(complaints))}")
        return result

    def _start(self) -> None:
        self._connection, other = Pipe()
        command = (sys.executable, "-m", "verification.verify_op.server", str(self._path))
        self._child = subprocess.Popen(
            [*command, str(other.fileno())], pass_fds=[other.fileno()], cwd=ROOT
        )
        other.close()
        kind, words, _ = self._answer(START_TIMEOUT)
        if kind == "error":
            self.close()
            raise KernelError(words)

    def _answer(self, timeout: float) -> tuple[str, object, list[str]]:
        assert self._child is not None
        try:
            if not self._connection.poll(timeout):
                self.close()
                self._endings = MAX_ENDINGS
                raise KernelError(f"op_{self.operation} did not return in {timeout:g} s")
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            status = self._child.wait()
            self.close()
            self._endings += 1
            raise KernelError(f"op_{self.operation} {_ending(status)}") from None


def _ending(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"crashed with signal {-status}, {name} ({signal.strsignal(-status)})"
    return f"ended the process with status {status}"
