import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from verification.evidence import Score, this_place
from verification.mutants.build import ROOT, Tree
from verification.mutants.catalogue import CatalogueError, load_catalogue
from verification.mutants.faults import CPU, GPU, Edit, TestedFault, load_faults
from verification.teeth import arena, checks, fork_server, trees
from verification.teeth.__main__ import main, whole_plan
from verification.teeth.arena import ALIVE, KILLED, Answer, Cache, Result, TeethError
from verification.teeth.checks import LEVELS
from verification.teeth.keys import Keys
from verification.teeth.matrix import Row, Tally, rows_of
from verification.teeth.museum import Exhibit, hang, load_exhibits
from verification.teeth.plan import (
    CATALOGUE,
    GENERATED,
    MUSEUM,
    Planted,
    check_plan,
    from_mutant,
    from_tested,
)
from verification.teeth.report import Controls, record
from verification.teeth.servers import servers

ONE = Controls(1)
SILU = "csrc/twin/silu_and_mul.c"
TESTED = TestedFault(
    "tested", "engine/batch.py", "a fault", "a", "b", ("tests/engine/test_batch.py", "tests/system")
)


def of_catalogue(**changes) -> Planted:
    return replace(from_mutant(load_catalogue()[0]), **changes)


def answer(label: str, status: str = KILLED, named=None, levels=(), by: str = "") -> Answer:
    return Answer(label, status, by, "", named, levels, 0.1)


def row(planted: Planted, *answers: Answer, build: str = trees.OK, equivalent: bool = False) -> Row:
    return Row(planted, Result(planted.id, build, answers), equivalent)


class TestTheWholePlan:
    @pytest.mark.parametrize("device", [CPU, GPU])
    def test_every_fault_of_every_source_applies(self, device: str):
        assert whole_plan(ROOT, device, 50)

    def test_it_is_as_large_as_promised(self):
        planted = whole_plan(ROOT, CPU, 50)
        groups = [each.group for each in planted]

        on_the_twin = [p for p in planted if p.group != GENERATED and p.expected is not None]
        assert len(on_the_twin) >= 60
        assert groups.count(MUSEUM) >= 20

    def test_every_exhibit_says_whose_bug_it_was_and_where_to_read_of_it(self):
        for exhibit in load_exhibits():
            assert len(exhibit.bug.split()) > 4 and len(exhibit.source.split()) > 1, exhibit.bug

    def test_an_exhibit_without_its_fault_and_a_fault_without_its_exhibit_are_refused(self):
        exhibit = Exhibit("x", "a bug", "issue 1", "nowhere")
        with pytest.raises(CatalogueError, match="without their fault: nowhere"):
            hang([exhibit], [])
        with pytest.raises(CatalogueError, match="without an exhibit: tested"):
            hang([], [from_tested(TESTED, MUSEUM)])

    def test_two_faults_of_one_id_are_refused(self):
        with pytest.raises(CatalogueError, match="ids used twice: "):
            check_plan([of_catalogue(), of_catalogue()], ROOT)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ('[[fault]]\nid = "a"\ncolour = 1\n', "unknown field 'colour'"),
            ('[[fault]]\nid = "a"\n', "fault a: "),
            (
                '[[fault]]\nid = "a"\nfile = "x"\nfault = "x"\nbefore = "a"\nafter = "b"\n'
                "tests = []\n",
                "no tests to find it",
            ),
        ],
    )
    def test_a_malformed_fault_is_refused(self, tmp_path, text: str, words: str):
        path = tmp_path / "faults.toml"
        path.write_text(text)

        with pytest.raises(CatalogueError, match=words):
            load_faults(path)

    def test_wrong_use_leaves_with_2(self):
        with pytest.raises(SystemExit) as left:
            main(["--groups", "unknown"])
        assert left.value.code == 2


class TestTheMatrix:
    def test_a_fault_of_the_catalogue_dies_where_its_entry_says_and_nowhere_else(self):
        named = of_catalogue().expected
        by_verify = answer("verify", named=named, levels=("local", "layers"))
        unseen = answer("verify", ALIVE)
        by_bits = answer("bits", named=named)

        assert row(of_catalogue(), by_verify, by_bits).is_killed
        assert row(of_catalogue(), by_verify, by_bits).is_named
        assert not row(of_catalogue(), unseen, by_bits).is_killed
        assert row(of_catalogue(dies_at="system"), unseen, by_bits).is_killed

    def test_another_operator_tap_or_layer_is_no_name(self):
        operator, tap, layer = of_catalogue().expected
        for wrong in (("linear", tap, layer), (operator, "q", layer), (operator, tap, layer + 1)):
            killed = answer("verify", named=wrong, levels=("local",))
            assert row(of_catalogue(), killed).is_named is False

    def test_the_level_is_the_lowest_that_failed(self):
        free = answer("verify", named=of_catalogue().expected, levels=("layers", "tokens"))
        mine = row(of_catalogue(), free)

        assert mine.level == "layer"
        assert [mine.cell(level) for level in LEVELS] == [
            *("alive", "killed", "alive", "alive", "killed"),
            None,
        ]
        assert Tally((mine,)).at_their_level == 0

    def test_a_tested_fault_is_named_by_its_own_tests_alone(self):
        planted = from_tested(TESTED)
        own, other = (check.label for check in planted.checks)

        assert row(planted, answer(own)).is_named
        late = row(planted, answer(own, ALIVE), answer(other))
        assert late.is_killed and late.is_named is False
        assert not row(planted, answer(own, ALIVE), answer(other, ALIVE)).is_killed

    def test_a_fault_whose_tests_are_nobodys_own_is_killed_and_neither_named_nor_misnamed(self):
        anywhere = replace(from_tested(TESTED), own=())
        killed = row(anywhere, answer(anywhere.checks[0].label, ALIVE), answer("tests/system"))
        own = row(from_tested(TESTED), answer(TESTED.tests[0], ALIVE), answer("tests/system"))

        assert killed.is_killed and killed.is_named is None
        assert Tally((killed, own)).misnamed == (own,)
        assert Tally((killed, own)).named == (0, 1)

    def test_a_legal_variant_that_fails_for_its_numbers_is_a_false_alarm(self):
        legal = of_catalogue(is_legal=True, dies_at="system")
        bits = answer("bits", named=legal.expected)

        assert not row(legal, answer("verify", ALIVE), bits).is_false_alarm
        assert row(legal, answer("verify", levels=("local",)), bits).is_false_alarm

    def test_what_cannot_be_found_is_not_counted(self):
        generated = replace(from_tested(TESTED), group=GENERATED)
        label = generated.checks[0].label
        assert row(generated, answer(label)).is_named
        assert row(replace(generated, own=()), answer(label)).is_named is None
        tally = Tally(
            (
                row(generated, build=trees.EQUAL),
                row(generated, build=trees.STILLBORN),
                row(generated, answer(label, ALIVE), equivalent=True),
                row(generated, answer(label)),
                row(generated, answer(label, ALIVE)),
            )
        )

        assert (tally.killed, len(tally.counted), len(tally.survivors)) == (1, 2, 1)
        assert tally.wrongly_listed == ()

    def test_a_listed_equivalent_that_is_killed_is_told(self):
        generated = replace(from_tested(TESTED), group=GENERATED)
        killed = row(generated, answer(generated.checks[0].label), equivalent=True)

        made = record([killed, killed], (), (), ONE, CPU, 0.0)

        assert Tally((killed,)).wrongly_listed == (killed,)
        assert not made.passed

    def test_a_survivor_is_listed_with_what_would_kill_it(self):
        generated = replace(from_tested(TESTED), group=GENERATED)
        alive = Result(generated.id, trees.OK, (answer(generated.checks[0].label, ALIVE),))
        others = replace(generated, edit=replace(generated.edit, after="c"))

        rows = rows_of([generated, others], [alive, alive], [], {generated.edit: "a longer row"})

        made = record(rows, (), (), ONE, CPU, 0.0)
        table = next(table for table in made.tables if "survived" in table.title)
        assert [cells[2] for cells in table.rows] == ["a longer row", None]

    def test_groups_that_were_not_run_are_told(self):
        killed = answer("verify", named=of_catalogue().expected, levels=("local",))

        made = record([row(of_catalogue(), killed)], (), (), ONE, CPU, 0.0)

        assert (made.name, made.title) == ("teeth-cpu-hand", "Kill matrix, CPU lane: hand")
        assert made.command == 'make teeth ARGS="--groups hand --record"'
        again = record([row(of_catalogue(), killed)], (), (), ONE, CPU, 0.0, sample="--count 9")
        assert again.command == 'make teeth ARGS="--groups hand --count 9 --record"'
        assert made.tables[0].title == "Not run"
        assert made.tables[0].rows == ((MUSEUM,), (GENERATED,))

    def test_a_check_that_failed_without_a_fault_fails_the_record_of_the_rest(self):
        good = row(
            of_catalogue(), answer("verify", named=of_catalogue().expected, levels=("local",))
        )

        made = record([good], (), (), Controls(3, 1), CPU, 0.0)

        assert not made.passed
        words = "checks that fail without a fault, or do not answer"
        assert Score(words, 1, 4, at_most=0.0) in made.scores

    def test_one_survivor_of_the_catalogue_fails_the_record(self):
        good = row(
            of_catalogue(), answer("verify", named=of_catalogue().expected, levels=("local",))
        )
        bad = row(of_catalogue(), answer("verify", ALIVE), answer("bits", ALIVE))

        assert record([good], (), (), ONE, CPU, 0.0).passed
        made = record([good, bad], (), (), ONE, CPU, 0.0)
        assert not made.passed
        assert Score("hand catalogue: killed", 1, 2, at_least=1.0) in made.scores


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
        path.write_text(results[2].read_text() + '{"key": "x", "content": {"a"')

        assert Cache(path).get("x") is None

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
        assert "ZeroDivisionError" in found["why"] and "test_teeth.py" in found["why"]

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
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_museum_and_a_seeded_part_of_the_rest_die_and_are_named():
    planted = whole_plan(ROOT, CPU, 50)
    museum = [each for each in planted if each.group == MUSEUM]
    chosen = museum + [each for each in planted if each.group == CATALOGUE][3::9]

    rows = rows_of(chosen, arena.run(chosen, CPU, Cache(None), os.cpu_count()), [])

    tally = Tally(tuple(rows))
    assert len(rows) >= 25
    assert [each.planted.id for each in tally.survivors] == []
    assert [each.planted.id for each in tally.misnamed] == []
    assert not any(each.is_false_alarm for each in rows)
