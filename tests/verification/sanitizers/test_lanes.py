"""Lanes against a tool that is made up: every way in which a lane must not pass."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.verification.sanitizers.test_findings import CLEAN, MEMCHECK
from verification.mutants.catalogue import CatalogueError
from verification.sanitizers.lanes import CONTROLS, LANES, Lane, opcodes_of, read_sass, run_lane

PLANTED = {name: Path(name) for name in ("out_of_bounds", "bulk_copy_control", "missing_barrier")}
PARTS = ("workload",)
LANE = Lane("memcheck", "out_of_bounds", "Invalid __global__ write")
RACES = Lane("racecheck", "missing_barrier", "Race reported", controls=("ring",))
CODE = {0x10: "UBLKCP", 0x20: "LDSM", 0x30: "STS"}


def race(function: str, write: int, read: int) -> str:
    return (
        f"========= Error: Race reported between Write access at {function}(int *)+{write:#x}\n"
        f"=========     and Read access at {function}(int *)+{read:#x} [8 hazards]\n=========\n"
    )


def racecheck(*races: str, end: str = "3 cases ran\n") -> str:
    summary = f"========= RACECHECK SUMMARY: {len(races)} hazards displayed ({len(races)} errors)\n"
    return end + "".join(races) + summary


def run(lane: Lane, said: dict[str, tuple[int, str]]):
    """The lane's result where each program says what is given for it, by name or mode."""

    def tool(name, arguments, program):
        assert name == lane.tool
        return said[program[-1]]

    return run_lane(lane, tool, PLANTED, ("run",), PARTS, lambda function, offset: CODE.get(offset))


def test_a_lane_that_caught_its_defect_and_found_nothing_passes():
    result = run(LANE, {"out_of_bounds": (0, MEMCHECK), "workload": (0, CLEAN)})

    assert (result.status, result.cases, result.findings) == ("pass", 12, {})


@pytest.mark.parametrize(
    "blind", [CLEAN, "", "sh: compute-sanitizer: not found", "========= Error: no device\n"]
)
def test_a_lane_that_misses_its_planted_defect_fails(blind: str):
    result = run(LANE, {"out_of_bounds": (0, blind), "workload": (0, CLEAN)})

    assert result.status == "fail"
    assert "does not catch planted out_of_bounds" in result.problems[0]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (1, CLEAN),
        (0, CLEAN.replace("12 cases ran", "")),
        (0, CLEAN.replace("12 cases ran", "0 cases ran")),
        (124, "case linear\nno end within 280 s"),
        (0, "12 cases ran\n"),
    ],
)
def test_a_workload_that_did_not_end_well_fails(status: int, said: str):
    result = run(LANE, {"out_of_bounds": (0, MEMCHECK), "workload": (status, said)})

    assert result.status == "fail"
    assert "workload did not end" in result.problems[0]


def test_every_part_must_end_and_what_they_find_is_added_up():
    dirty = (0, MEMCHECK + "12 cases ran\n")
    said = {"out_of_bounds": (0, MEMCHECK), "one": dirty, "two": dirty, "three": (1, "")}

    def tool(name, arguments, program):
        return said[program[-1]]

    parts, apart = ("one", "two", "three"), replace(LANE, is_apart=True)
    result = run_lane(apart, tool, PLANTED, ("run",), parts, lambda function, offset: None)

    assert result.cases == 24
    assert any("2 x Invalid __global__ write" in problem for problem in result.problems)
    assert any("three did not end" in problem for problem in result.problems)


def test_a_quick_tool_runs_all_parts_in_one_process():
    programs = []

    def tool(name, arguments, program):
        programs.append(list(program))
        return (0, MEMCHECK if len(program) == 1 else CLEAN)

    result = run_lane(LANE, tool, PLANTED, ("run",), ("one", "two"), lambda function, offset: None)

    assert sorted(programs) == [["out_of_bounds"], ["run", "one", "two"]]
    assert (result.status, result.cases) == ("pass", 12)


def test_a_finding_fails_the_lane_and_is_named():
    dirty = MEMCHECK.replace("2 errors", "2 errors") + "12 cases ran\n"

    result = run(LANE, {"out_of_bounds": (0, MEMCHECK), "workload": (0, dirty)})

    assert result.status == "fail"
    assert any("Invalid __global__ write" in problem for problem in result.problems)


def test_a_finding_that_the_summary_counts_and_nobody_read_fails():
    hidden = CLEAN.replace("0 errors", "3 errors")

    result = run(LANE, {"out_of_bounds": (0, MEMCHECK), "workload": (0, hidden)})

    assert result.problems == ["workload: 3 findings by the summary, 0 read"]


def test_what_a_correct_control_shows_too_is_counted_as_the_tools_limit():
    said = {
        "missing_barrier": (0, racecheck(race("m", 0x30, 0x30))),
        "ring": (0, racecheck(race("control", 0x10, 0x20))),
        "workload": (0, racecheck(race("engine", 0x10, 0x20))),
    }

    result = run(RACES, said)

    assert result.status == "pass"
    assert list(result.limits.values()) == [1] and result.findings == {}
    assert result.to_json()["tool_limits"] == {
        "Error: Race (Read LDSM with Write UBLKCP) in engine": 1
    }


def test_a_race_is_the_tools_limit_only_if_every_pair_of_it_is():
    both = race("engine", 0x10, 0x20).replace(
        "[8 hazards]",
        "[8 hazards]\n=========     and Read access at engine(int *)+0x30 [8 hazards]",
    )
    said = {
        "missing_barrier": (0, racecheck(race("m", 0x30, 0x30))),
        "ring": (0, racecheck(race("control", 0x10, 0x20))),
        "workload": (0, racecheck(both)),
    }

    assert run(RACES, said).status == "fail"


@pytest.mark.parametrize(("write", "read"), [(0x30, 0x20), (0x10, 0x30), (0x40, 0x50)])
def test_a_race_between_other_instructions_is_a_finding(write: int, read: int):
    said = {
        "missing_barrier": (0, racecheck(race("m", 0x30, 0x30))),
        "ring": (0, racecheck(race("control", 0x10, 0x20), race("control", 0x40, 0x50))),
        "workload": (0, racecheck(race("engine", write, read))),
    }

    result = run(RACES, said)

    assert result.status == "fail" and result.limits == {}


def test_a_control_that_computes_a_wrong_result_fails_the_lane():
    said = {
        "missing_barrier": (0, racecheck(race("m", 0x30, 0x30))),
        "ring": (1, racecheck(end="ring: wrong\n")),
        "workload": (0, racecheck()),
    }

    assert "control ring does not run" in run(RACES, said).problems[0]


def test_a_wrong_kernel_that_the_tool_does_not_report_fails_the_lane():
    lane = replace(RACES, wrong=("unordered",))
    said = {
        "missing_barrier": (0, racecheck(race("m", 0x30, 0x30))),
        "ring": (0, racecheck()),
        "workload": (0, racecheck()),
    }

    caught = run(lane, {**said, "unordered": (0, racecheck(race("control", 0x10, 0x20)))})
    missed = run(lane, {**said, "unordered": (0, racecheck())})

    assert (caught.status, caught.limits) == ("pass", {})
    assert missed.problems == ["does not catch unordered of bulk_copy_control"]


def test_every_mode_is_one_of_its_program():
    folder = Path(__file__).parents[2] / "kernels" / "planted"
    modes = [mode for lane in LANES for mode in (*lane.controls, *lane.wrong)]

    assert set(modes) == set(CONTROLS) and len(set(modes)) == len(modes)
    for mode, name in CONTROLS.items():
        names = re.search(r"kNames\[\] = \{(.*?)\}", (folder / f"{name}.cu").read_text(), re.S)[1]
        assert f'"{mode}"' in names


def test_every_lane_has_its_planted_kernel_and_says_what_it_catches():
    folder = Path(__file__).parents[2] / "kernels" / "planted"
    assert [lane.tool for lane in LANES] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    for lane in LANES:
        assert (
            (folder / f"{lane.planted}.cu")
            .read_text()
            .startswith(f"// {lane.planted}.cu -- planted")
        )
        assert lane.says


def test_opcodes_are_read_from_a_listing():
    listing = """
		Function : _Z3onePi
	.headerflags	@"EF_CUDA_SM90a"
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000fe40000000800 */
        /*0010*/              @!P0 UBLKCP.S.G [UR8], [UR4], UR6 ; /* 0x1 */
        /*0020*/             @UP1  LDSM.16.M88.4 R4, [R2] ;       /* 0x2 */
		Function : _Z3twoPi
        /*0000*/                   EXIT ;                         /* 0x3 */
"""

    assert read_sass(listing) == {
        "_Z3onePi": {0: "LDC", 0x10: "UBLKCP", 0x20: "LDSM"},
        "_Z3twoPi": {0: "EXIT"},
    }


def test_a_templates_instances_have_code_of_their_own():
    opcode_at = opcodes_of(
        [
            ("void one<(bool)0>(int*)", {0x10: "UBLKCP"}),
            ("void one<(bool)1>(int*)", {0x10: "LDSM", 0x20: "STS"}),
            ("two(int*)", {0x10: "LDS"}),
            ("two(int*)", {0x10: "STS", 0x20: "NOP"}),
        ]
    )

    assert opcode_at("void one<true>(int *)", 0x10) == "LDSM"
    assert opcode_at("void one<(bool)0>(int *)", 0x10) == "UBLKCP"
    assert opcode_at("two(int *)", 0x10) is None  # two kernels of one name: no guess
    assert opcode_at("two(int *)", 0x20) == "NOP"
    assert opcode_at("one(int *)", 0x10) is None


# --- the second opinion: the engine with its barrier in another form

FORM = replace(RACES, translated=("engine",))
CAUGHT = {
    "missing_barrier": (0, racecheck(race("m", 0x30, 0x30))),
    "ring": (0, racecheck(race("control", 0x10, 0x20))),
}
DOUBTED = (0, racecheck(race("engine", 0x30, 0x20)))


def asked_again(first: tuple[int, str], second: tuple[int, str], lane: Lane = FORM):
    """The lane's result where the translated library's report is the second, and the programs."""
    programs = []

    def tool(name, arguments, program):
        programs.append(list(program))
        if "--library" in program:
            return second
        return {**CAUGHT, "workload": first}[program[-1]]

    def translate():
        return ("--library", "other.so"), lambda function, offset: CODE.get(offset)

    lookup = lambda function, offset: CODE.get(offset)  # noqa: E731
    return run_lane(lane, tool, PLANTED, ("run",), PARTS, lookup, translate), programs


def test_what_another_form_of_the_barrier_does_not_show_is_counted_apart():
    result, programs = asked_again(DOUBTED, (0, racecheck()))

    assert (result.status, result.findings) == ("pass", {})
    assert result.to_json()["barrier_form"] == {
        "Error: Race (Read LDSM with Write STS) in engine": 1
    }
    assert programs[-1] == ["run", "--library", "other.so", "workload"]


def test_what_both_forms_show_is_a_finding():
    result, _ = asked_again(DOUBTED, (0, racecheck(race("engine", 0x30, 0x20))))

    assert result.status == "fail" and result.of_form == {}
    assert "1 x Error: Race (Read LDSM with Write STS) in engine" in result.problems


def test_a_pair_that_a_control_explains_does_not_hide_one_that_both_forms_show():
    both = race("engine", 0x10, 0x20).replace(
        "[8 hazards]",
        "[8 hazards]\n=========     and Write access at engine(int *)+0x30 [8 hazards]",
    )

    again, _ = asked_again((0, racecheck(both)), (0, racecheck(both)))
    other, _ = asked_again((0, racecheck(both)), (0, racecheck(race("engine", 0x10, 0x20))))

    assert (again.status, other.status) == ("fail", "pass")


@pytest.mark.parametrize(
    "second",
    [
        (1, racecheck()),
        (0, racecheck(end="")),
        (0, racecheck(end="2 cases ran\n")),
        (0, "3 cases ran\n"),
        (0, racecheck().replace("0 hazards", "3 hazards")),
        (0, racecheck(race("engine", 0x40, 0x50))),
    ],
    ids=["status", "no end", "fewer cases", "no summary", "unread", "unknown instructions"],
)
def test_a_second_opinion_that_did_not_end_well_excuses_nothing(second):
    result, _ = asked_again(DOUBTED, second)

    assert result.status == "fail" and result.of_form == {}


def test_without_a_translation_nothing_is_excused():
    def translate():
        raise CatalogueError("the text occurs 0 times")

    said = {**CAUGHT, "workload": DOUBTED}
    result = run_lane(
        FORM,
        lambda name, arguments, program: said[program[-1]],
        PLANTED,
        ("run",),
        PARTS,
        lambda function, offset: CODE.get(offset),
        translate,
    )

    assert result.status == "fail" and result.of_form == {}
    assert "no second opinion: the text occurs 0 times" in result.problems


def test_a_kernel_without_a_translation_is_not_asked_again():
    result, programs = asked_again(
        DOUBTED, (0, racecheck()), replace(FORM, translated=("another",))
    )

    assert result.status == "fail"
    assert not any("--library" in program for program in programs)


def test_where_nothing_is_doubted_nothing_is_asked_again():
    result, programs = asked_again((0, racecheck(race("engine", 0x10, 0x20))), (1, ""))

    assert result.status == "pass"
    assert not any("--library" in program for program in programs)


def test_an_access_without_a_known_instruction_is_a_finding_in_either_form():
    result, _ = asked_again((0, racecheck(race("engine", 0x40, 0x50))), (0, racecheck()))

    assert result.status == "fail" and result.of_form == {}
