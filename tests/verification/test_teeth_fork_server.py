"""The processes that answer: crashes, hangs, limits and errors are answers like any other."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from verification.mutants.build import Tree
from verification.teeth import checks, fork_server
from verification.teeth.arena import ALIVE, KILLED, TeethError
from verification.teeth.servers import servers

PROFILE = "from hypothesis import settings\nsettings.register_profile('mutants')\n"


class TestTheForkServer:
    @pytest.fixture
    def impatient(self, monkeypatch):
        monkeypatch.setattr(fork_server, "IDLE_SECONDS", 0.4)
        monkeypatch.setattr(fork_server, "LOOK_SECONDS", 0.1)

    def ask(self, tmp_path, monkeypatch, check) -> dict:
        monkeypatch.setitem(fork_server.CHECKS, "check", lambda request: check())
        request = {"tree": str(tmp_path), "check": {"kind": "check"}, "cpu": 2}
        return fork_server._in_a_child(request)

    def test_who_waits_for_ever_is_ended(self, tmp_path, monkeypatch, impatient):
        found = self.ask(tmp_path, monkeypatch, lambda: time.sleep(60))

        assert (found["status"], found["by"]) == (KILLED, "limit")

    def test_a_run_that_was_suspended_ends_nobody(self, tmp_path, monkeypatch):
        hours = iter(range(0, 10**6, 3600))
        monkeypatch.setattr(fork_server, "LOOK_SECONDS", 0.1)
        monkeypatch.setattr(fork_server.time, "monotonic", lambda: next(hours))

        def work():
            time.sleep(0.35)
            return {"status": ALIVE, "by": "me"}

        assert self.ask(tmp_path, monkeypatch, work)["status"] == ALIVE

    def test_who_is_slow_but_works_is_not(self, tmp_path, monkeypatch, impatient):
        def work():
            end = time.monotonic() + 1.2
            while time.monotonic() < end:
                pass
            return {"status": ALIVE, "by": "me"}

        assert self.ask(tmp_path, monkeypatch, work)["status"] == ALIVE

    def test_an_error_of_the_check_is_an_answer_with_its_place(self, tmp_path, monkeypatch):
        found = self.ask(tmp_path, monkeypatch, lambda: 1 // 0)

        assert (found["status"], found["by"]) == (KILLED, "error")
        assert "ZeroDivisionError" in found["why"] and os.path.basename(__file__) in found["why"]

    def test_one_test_of_many_that_never_ends_is_ended_by_its_own_limit(self, tmp_path):
        spins = "def test_b():\n    while True:\n        pass\n"
        (tmp_path / "conftest.py").write_text(PROFILE)
        (tmp_path / "test_right.py").write_text("def test_a():\n    sum(range(10**6))\n")
        (tmp_path / "test_wrong.py").write_text("def test_a():\n    pass\n\n\n" + spins)
        tree = Tree(tmp_path)
        with servers(1, has_torch=False) as asked:
            right = asked.ask(tree, tree, checks.tests("test_right.py"), 60, 1)
            wrong = asked.ask(tree, tree, checks.tests("test_wrong.py"), 60, 1)

        assert right["status"] == ALIVE and 0 < right["phase"] < 1
        assert (wrong["status"], wrong["by"]) == (KILLED, "crash")
        assert wrong["cpu"] < 10

    def test_a_stopped_run_waits_for_nobody(self, tmp_path):
        (tmp_path / "conftest.py").write_text(PROFILE)
        (tmp_path / "test_slow.py").write_text("import time\ndef test_it():\n    time.sleep(600)\n")
        check, tree = checks.tests("test_slow.py"), Tree(tmp_path)
        with servers(1, has_torch=False) as asked, ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(asked.ask, tree, tree, check, 60) for _ in range(2)]
            time.sleep(1)
            asked.stop()

            for each in waiting:
                with pytest.raises((TeethError, OSError), match="gone|stopped|pipe|does not start"):
                    each.result(timeout=20)

    def test_who_leaves_without_an_answer_is_broken(self, tmp_path, monkeypatch):
        assert self.ask(tmp_path, monkeypatch, lambda: os._exit(3))["status"] == "broken"
