import pytest

from verification.sanitizers.findings import Kind, read_report

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at out_of_bounds_kernel(int *, int)+0x90
=========     by thread (32,0,0) in block (0,0,0)
=========     Address 0x7f0000000080 is out of bounds
=========     and is 1 bytes after the nearest allocation
=========         Host Frame: main [0x1234] in program
=========
========= Program hit cudaErrorLaunchFailure (error 719) on CUDA API call to cudaFree.
=========     Saved host backtrace up to driver entry point at error
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
right
========= Error: Race reported between Write access at void many<(int)8>(float *)+0x70
=========     and Read access at void many<(int)8>(float *)+0x110 [124 hazards]
=========
========= Warning: Race reported between Write access at one(int *)+0x70
=========     and Write access at one(int *)+0x90 [3 hazards]
=========
========= Warning: Race reported between Write access at one(int *)+0x70
=========     and Write access at one(int *)+0x90 [12 hazards]
=========
========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n12 cases ran\n========= ERROR SUMMARY: 0 errors\n"


def test_a_clean_report_has_no_findings():
    report = read_report(CLEAN)

    assert (report.total, report.kinds) == (0, {})


def test_a_report_without_a_summary_is_no_report():
    assert read_report("12 cases ran\n").total is None
    assert read_report("========= Error: Device not supported\n").total is None


def test_each_finding_is_named_by_its_words_and_its_kernel():
    report = read_report(MEMCHECK)

    assert report.total == 2
    assert report.kinds == {
        Kind("Invalid __global__ write of size # bytes", "out_of_bounds_kernel"): 1,
        Kind("Program hit cudaErrorLaunchFailure (error #) on CUDA API call to cudaFree.", ""): 1,
    }


def test_races_of_one_kind_are_counted_together_with_their_instructions():
    code = {0x70: "UBLKCP", 0x110: "LDSM", 0x90: "STS"}

    report = read_report(RACECHECK, lambda function, offset: code[offset])

    assert report.total == 3
    assert report.kinds == {
        Kind("Error: Race", "many", ("Read LDSM with Write UBLKCP",)): 1,
        Kind("Warning: Race", "one", ("Write STS with Write UBLKCP",)): 2,
    }


def test_a_race_of_several_reads_with_one_write_is_so_many_pairs():
    text = RACECHECK.replace(
        "[124 hazards]",
        "[9 hazards]\n=========     and Read access at many(float *)+0x90 [9 hazards]",
    )
    code = {0x70: "UBLKCP", 0x110: "LDSM", 0x90: "LDS"}

    kinds = read_report(text, lambda function, offset: code[offset]).kinds

    assert ("Read LDS with Write UBLKCP", "Read LDSM with Write UBLKCP") in [k.pairs for k in kinds]


def test_what_the_tool_says_in_unknown_words_counts_as_a_finding():
    report = read_report("========= A new kind of trouble\n========= ERROR SUMMARY: 1 error\n")

    assert report.kinds == {Kind("A new kind of trouble", ""): 1}


@pytest.mark.parametrize("kernel", ["many", "one"])
def test_a_kind_reads_as_one_line(kernel: str):
    kinds = read_report(RACECHECK).kinds

    assert any(str(kind).endswith(f" in {kernel}") for kind in kinds)
    assert all("\n" not in str(kind) for kind in kinds)
