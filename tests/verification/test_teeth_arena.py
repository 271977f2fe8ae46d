"""The run: what is planted, built and asked, in which order, and what is kept of it."""

import pytest

from tests.verification.planted import ONE, SILU, answer, of_catalogue, row
from verification.evidence import this_place
from verification.mutants.build import ROOT
from verification.mutants.faults import CPU, Edit
from verification.teeth import arena, checks, trees
from verification.teeth.arena import ALIVE, KILLED, Cache, Result, TeethError
from verification.teeth.plan import GENERATED, Planted
from verification.teeth.report import record


def made(before: str, after: str, *asked: checks.Check, file: str = SILU) -> Planted:
    # no group of its own: what does not compile may be there
    return Planted(f"{before} {after}", GENERATED, CPU, Edit(file, before, after, 0), "", asked)


OWN = checks.tests("tests/twin/test_silu_and_mul.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    lines = (ROOT / SILU).read_text().split("\n")
    line = next(each.strip() for each in lines if "contract_exp2(-" in each)
    changes = {
        "killed": line.replace("1.0f +", "1.5f +"),
        "stillborn": line.replace("contract_exp2", "no_such_function"),
        "equal": line.replace("1.0f", "1.00f"),
        "crash": "__builtin_trap(); " + line,
        "endless": "volatile int is_done = 0; while (!is_done) {} " + line,
    }
    planted = [made(line, after, OWN) for after in changes.values()]
    changes["late"] = "pass"
    tested_by = ("batch", "answer_text", "block_manager", "running_batch")
    asked = [checks.tests(f"tests/engine/test_{name}.py") for name in tested_by]
    planted.append(made("break", "pass", *asked, file="engine/block_manager.py"))
    cache = tmp_path_factory.mktemp("teeth") / "cache.jsonl"
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(arena, "LIMIT_FACTOR", 2)
        impatient.setattr(arena, "LIMIT_SECONDS", 1)
        found = arena.run(planted, CPU, Cache(cache), jobs=2)
    return dict(zip(changes, found, strict=True)), planted, cache


class TestTheArena:
    def test_a_fault_is_killed_by_the_test_that_fails(self, results):
        (only,) = results[0]["killed"].answers

        assert (only.status, only.label) == (KILLED, OWN.label)
        assert only.by.startswith("tests/twin/test_silu_and_mul.py::test_")
        assert "differ" in only.why

    def test_what_does_not_compile_and_what_compiles_to_the_same_is_not_asked(self, results):
        assert results[0]["stillborn"] == Result(results[0]["stillborn"].id, trees.STILLBORN, ())
        assert results[0]["equal"].build == trees.EQUAL

    def test_checks_on_idle_servers_are_counted_in_order_up_to_the_first_that_kills(self, results):
        found = results[0]["late"].answers

        assert [(a.label.split("_", 1)[1], a.status) for a in found] == [
            ("batch.py", ALIVE),
            ("answer_text.py", ALIVE),
            ("block_manager.py", KILLED),
        ]

    def test_an_object_is_compared_without_the_names_of_nvccs_temporary_files(self, tmp_path):
        contents = (b"code tmpxft_0000016d_00000000-6", b"code tmpxft_00007ec6_00000000-6", b"CODE")
        for folder, content in zip("abc", contents, strict=True):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "x.cu.o").write_bytes(content)

        assert trees._same_objects(tmp_path / "a", tmp_path / "b")
        assert not trees._same_objects(tmp_path / "a", tmp_path / "c")

    def test_a_crash_and_an_endless_loop_are_answers(self, results):
        for name, by in (("crash", "crash"), ("endless", "crash")):
            (only,) = results[0][name].answers
            assert (only.status, only.by) == (KILLED, by), only
        assert "CPU time limit" in results[0]["endless"].answers[0].why

    def test_a_second_run_takes_every_answer_from_the_first(self, results, monkeypatch):
        found, planted, cache = results
        monkeypatch.setattr(arena.trees, "pristine_tree", None)  # nothing may be built

        assert arena.run(planted, CPU, Cache(cache)) == list(found.values())

    def test_an_answer_says_where_it_was_found_wherever_it_is_judged(self, results, monkeypatch):
        found, planted, path = results
        cache = Cache(path)
        elsewhere = {"machine": {"cpu": "another"}, "versions": {"torch": "0"}}

        again = arena.run(planted, CPU, cache, place=lambda: elsewhere)

        (place,) = {answer.place for result in again for answer in result.answers}
        assert cache.get(place) == this_place()
        rows = [row(of_catalogue(), answer("verify"))]
        merged = record(rows, (), (), ONE, CPU, 0.0, [cache.get(place), elsewhere])
        assert merged.machine["cpu"] == f"{this_place()['machine']['cpu']} and another"

    def test_a_line_half_written_is_asked_again(self, results, tmp_path):
        path = tmp_path / "cache.jsonl"
        path.write_text(results[2].read_text() + '{"key": "x", "content": {"a": {}')
        Cache(path).put("y", {})

        assert Cache(path).get("x") is None
        assert Cache(path).get("y") == {}

    def test_what_has_not_begun_in_time_is_left_out_and_told(self, results):
        _, planted, cache = results

        assert arena.run(planted, CPU, Cache(cache), seconds=-1) == []
        made = record([row(of_catalogue(), answer("verify"))], (), (), ONE, CPU, 0.0, (), planted)
        assert made.tables[0].rows == ((GENERATED, len(planted)),)

    def test_a_check_that_fails_without_a_fault_ends_the_run(self, tmp_path):
        missing = checks.tests("tests/no_such_test.py")
        planted = made("break", "pass", missing, file="engine/block_manager.py")

        with pytest.raises(TeethError, match="gives no answer") as raised:
            arena.run([planted], CPU, Cache(None))
        assert raised.value.results == [] and raised.value.num_problems == 1
