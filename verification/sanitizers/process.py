"""Processes that end together, and programs under compute-sanitizer among them.

Knows commands, time limits and log files; knows no lane and reads no report. Each process has a
session of its own, so that what it has started ends with it. Ctrl-C does not reach another session:
whoever is interrupted calls `stop`.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

TIMEOUT = 150  # seconds, of the tool over the workload
PLANTED_TIMEOUT = 60  # of the tool over one small kernel
TIMED_OUT = 124  # as timeout(1) says it
KILLED = -signal.SIGKILL
# Hazards that racecheck keeps in one process; 10 million else, and what comes after is lost.
HAZARDS = {"NV_COMPUTE_SANITIZER_MAX_RACECHECK_HAZARDS": "60000000"}
PRINTING = ("--print-limit", "100000", "--show-backtrace", "device")


class Processes:
    """Runs commands; many threads may ask, another may stop all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._is_stopped = False

    def run(
        self,
        command: Sequence[str],
        said: TextIO,
        limit: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """The exit status; TIMED_OUT after `limit` seconds, KILLED where all was stopped.

        Args:
            said: takes what it prints.
            environment: beside this process's.
        """
        with self._lock:
            if self._is_stopped:
                return KILLED
            process = subprocess.Popen(
                command,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
            self._running.add(process)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return TIMED_OUT
        finally:
            with self._lock:
                self._running.remove(process)

    def output(self, *command: str) -> str:
        """What a command prints, whatever its exit status."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            self.run(command, said)
            said.seek(0)
            return said.read()

    def stop(self) -> None:
        """Ends what runs, with what it started, and lets nothing more begin."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


class Sanitizer:
    """Runs a program under one tool of compute-sanitizer.

    Args:
        path: of compute-sanitizer.
        logs: where each report is kept as the tool printed it.
        processes: what it is one of.
    """

    def __init__(self, path: str, logs: Path, processes: Processes) -> None:
        self._path = path
        self._logs = logs
        self._processes = processes

    def __call__(
        self, tool: str, arguments: Sequence[str], program: Sequence[str]
    ) -> tuple[int, str]:
        """Exit status and output."""
        words = [tool, *arguments[:1], Path(program[0]).name, *program[1:][-1:]]
        words += ["translated"] if "--library" in program else []  # beside the first report
        name = "-".join(word.strip("-") for word in words)
        log = self._logs / f"{name.replace(' ', '_')}.log"
        command = [self._path, "--tool", tool, *arguments, *PRINTING, *program]
        limit = TIMEOUT if program[0] == sys.executable else PLANTED_TIMEOUT
        with log.open("w", encoding="utf-8") as said:
            status = self._processes.run(command, said, limit, HAZARDS)
        text = log.read_text(encoding="utf-8", errors="replace")
        return status, text if status != TIMED_OUT else f"{text}\nno end within {limit} s\n"
