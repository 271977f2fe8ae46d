"""Fork servers: processes that start warm and answer one request at a time.

Knows the pipe and the requests; the other end is fork_server.py, which is run as a script. Knows
nothing of faults or of what an answer is worth.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from engine.errors import EngineError
from verification.mutants.build import Tree
from verification.teeth.checks import Check

FORK_SERVER = Path(__file__).resolve().parent / "fork_server.py"
BROKEN = "broken"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # no answer may depend on which server was free
    "TOKENIZERS_PARALLELISM": "false",
}


class TeethError(EngineError):
    """The run itself is at fault: a check fails without a fault, or gives no answer."""


class Servers:
    """Some servers, each with a core of its own; whoever asks waits for a free one."""

    def __init__(self, servers: list["_Server"]) -> None:
        self._free: SimpleQueue[_Server] = SimpleQueue()
        self._all = servers
        for server in servers:
            self._free.put(server)

    def stop(self) -> None:
        """Ends what is being asked, and asks nothing more: who waits gets a TeethError."""
        for server in self._all:
            server.stop()

    def ask(
        self, tree: Tree, pristine: Tree, check: Check, cpu: float, phase: float | None = None
    ) -> dict[str, Any]:
        """What a check says of a tree.

        Args:
            pristine: the tree without a fault, for checks that compare with it.
            cpu: seconds of processor after which it is ended and counts as killed.
            phase: the same for each single test; None: no such limit.

        Raises:
            TeethError: there is no answer.
        """
        server = self._free.get()
        try:
            found = server.ask(
                {
                    "tree": str(tree.root),
                    "pristine": str(pristine.root),
                    "check": check.request,
                    "cpu": int(cpu),
                    "phase": phase,
                }
            )
        finally:
            self._free.put(server)
        if found["status"] == BROKEN:
            raise TeethError(f"{check.label} gives no answer: {found['why']}")
        return found


@contextmanager
def servers(count: int, has_torch: bool) -> Iterator[Servers]:
    """So many servers; they start when they are first asked and end with the block.

    Args:
        has_torch: whether a check may want torch and transformers.
    """
    cores = sorted(os.sched_getaffinity(0))
    made = [_Server(cores[i % len(cores)], has_torch) for i in range(count)]
    try:
        yield Servers(made)
    finally:
        for server in made:
            server.close()


class _Server:
    """One process, started when it is first asked.

    Its own core: the twin takes as many threads as there are cores, and those of sixteen processes
    on sixteen cores would only wait for each other.
    """

    def __init__(self, core: int, has_torch: bool) -> None:
        shared = "torch" if has_torch else "plain"
        self._command = [sys.executable, str(FORK_SERVER), str(core), shared]
        self._process: subprocess.Popen[str] | None = None
        self._is_stopped = False

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._is_stopped:
            raise TeethError("the run was stopped")
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | ENVIRONMENT,
                process_group=0,  # Ctrl-C is this process's affair, which then ends them
            )
            if self._process.stdout.readline() != "ready\n":
                raise TeethError("the fork server does not start")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise TeethError("the fork server is gone")
        return json.loads(line)

    def stop(self) -> None:
        self._is_stopped = True
        if self._process is not None:
            self._process.terminate()

    def close(self) -> None:
        if self._process is not None:
            with suppress(BrokenPipeError):  # it was stopped while it was being asked
                self._process.stdin.close()
            self._process.wait()
