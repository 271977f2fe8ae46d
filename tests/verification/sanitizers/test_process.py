"""The tool's processes: what it started ends with it, at its time limit and at Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from verification.interrupts import INTERRUPTED
from verification.sanitizers import process
from verification.sanitizers.process import KILLED, TIMED_OUT, Processes, Sanitizer

# A tool that says its process id and that of a child, and ends only by force.
ENDLESS = """#!/bin/sh
sleep 60 &
echo $$ $!
wait
"""
# make sanitize with tools that are made up; what it writes goes elsewhere.
COMMAND = """
import signal, sys
from pathlib import Path
from verification.sanitizers import __main__ as command
from verification.sanitizers.lanes import CONTROLS
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored
folder = Path(sys.argv[1])
command.OUTPUT, command.LOGS = folder / "sanitize.json", folder / "logs"
command.translate = lambda root, target, nvcc, output: Path(output("sleep", "60") or "none")
names = [*CONTROLS.values(), *(lane.planted for lane in command.LANES)]
command.build_planted = lambda nvcc, target: {name: folder / name for name in names}
sys.exit(command.main())
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def is_running(process_id: int) -> bool:
    state = Path(f"/proc/{process_id}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 30.0):
    """What the condition gives once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def process_ids(logs: Path) -> list[int]:
    return [int(word) for log in logs.glob("*.log") for word in log.read_text().split()]


def test_a_tool_that_does_not_end_is_ended_with_what_it_started(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(process, "PLANTED_TIMEOUT", 0.5)
    tool = program(tmp_path / "tool", ENDLESS)

    status, said = Sanitizer(str(tool), tmp_path, Processes())("memcheck", (), ["program"])

    ids = [int(word) for word in said.splitlines()[0].split()]
    assert status == TIMED_OUT and "no end within 0.5 s" in said
    wait_until(lambda: len(ids) == 2 and not any(map(is_running, ids)))


def test_stopping_ends_what_runs_and_lets_nothing_begin(tmp_path: Path):
    processes, ended = Processes(), []
    run = Sanitizer(str(program(tmp_path / "tool", ENDLESS)), tmp_path, processes)
    thread = threading.Thread(target=lambda: ended.append(run("memcheck", (), ["program"])))
    thread.start()
    ids = wait_until(lambda: process_ids(tmp_path))

    processes.stop()
    thread.join(10)

    assert [status for status, _ in ended] == [KILLED]
    wait_until(lambda: not any(map(is_running, ids)))
    assert run("memcheck", (), ["another"]) == (KILLED, "")
    assert processes.output("echo", "said") == ""


def test_what_a_command_prints_is_read_whatever_its_status():
    assert Processes().output("sh", "-c", "echo out; echo err >&2; exit 3") == "out\nerr\n"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="requires /proc")
def test_ctrl_c_ends_every_tool_and_what_they_started(tmp_path: Path):
    program(tmp_path / "compute-sanitizer", ENDLESS)
    program(tmp_path / "cuobjdump", "#!/bin/sh\n")
    program(tmp_path / "nvcc", "#!/bin/sh\n")
    logs = tmp_path / "logs"
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tmp_path)],
        env={**os.environ, "NVCC": str(tmp_path / "nvcc")},
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # as a terminal has it: Ctrl-C goes to the command's own group
    )
    try:
        # Of every lane one planted kernel and its workload at least; racecheck has controls too.
        ids = wait_until(lambda: found if len(found := process_ids(logs)) >= 2 * 16 else None)
        os.killpg(command.pid, signal.SIGINT)
        said, _ = command.communicate(timeout=20)
    finally:
        command.kill()

    assert command.returncode == INTERRUPTED, said
    assert said.strip().splitlines()[-1].startswith("interrupted: "), said
    wait_until(lambda: not any(map(is_running, ids)))
    assert not (tmp_path / "sanitize.json").exists()
