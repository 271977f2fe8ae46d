"""What the answers are worth: levels, names, survivors, false alarms and the record of all."""

from dataclasses import replace

from tests.verification.planted import ONE, TESTED, answer, of_catalogue, row
from verification.evidence import Score
from verification.mutants.faults import CPU
from verification.teeth import trees
from verification.teeth.arena import ALIVE, Result
from verification.teeth.checks import LEVELS
from verification.teeth.matrix import Tally, rows_of
from verification.teeth.plan import GENERATED, MUSEUM, from_tested
from verification.teeth.report import Controls, record


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
