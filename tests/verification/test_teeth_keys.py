"""What an answer depends on."""

from tests.verification.planted import TESTED
from verification.teeth import checks
from verification.teeth.keys import Keys
from verification.teeth.plan import (
    from_tested,
)


class TestKeys:
    def test_a_changed_test_asks_its_own_checks_again_and_no_others(self, tmp_path):
        for name in ("csrc/a.c", "engine/a.py", "verification/a.py", "golden/a", "Makefile"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("")
        for name in ("test_a.py", "test_b.py", "helper.py"):
            (tmp_path / "tests").mkdir(exist_ok=True)
            (tmp_path / "tests" / name).write_text("")
        planted = from_tested(TESTED)
        asked = [checks.tests("tests/test_a.py"), checks.tests("tests/test_b.py"), checks.verify()]

        def keys() -> list[str]:
            return [Keys(tmp_path).of_answer(planted, check) for check in asked]

        before = keys()
        (tmp_path / "tests" / "test_a.py").write_text("new")
        own = keys()
        (tmp_path / "tests" / "helper.py").write_text("new")
        shared = keys()
        (tmp_path / "csrc" / "a.c").write_text("new")
        product = keys()

        assert [x == y for x, y in zip(before, own, strict=True)] == [False, True, True]
        assert [x == y for x, y in zip(own, shared, strict=True)] == [False, False, True]
        assert not any(x == y for x, y in zip(shared, product, strict=True))


# What make test runs of make teeth: the museum, and a seeded part of the rest.
