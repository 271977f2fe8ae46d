"""What is planted: every source of faults applies, and what is malformed is refused."""

import os

import pytest

from tests.verification.planted import TESTED, of_catalogue
from verification.mutants.build import ROOT
from verification.mutants.catalogue import CatalogueError
from verification.mutants.faults import CPU, GPU, load_faults
from verification.teeth import arena
from verification.teeth.__main__ import main, whole_plan
from verification.teeth.arena import Cache
from verification.teeth.matrix import Tally, rows_of
from verification.teeth.museum import Exhibit, hang, load_exhibits
from verification.teeth.plan import CATALOGUE, GENERATED, MUSEUM, check_plan, from_tested


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
