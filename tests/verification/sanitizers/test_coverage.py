from verification.sanitizers.coverage import coverage, kernels_listed

LISTING = """
Fatbin elf code:
Resource usage:
 Common:
  GLOBAL:0
 Function _Z13argmax_kernelPiPKfi:
  REG:40 STACK:0 SHARED:0
 Function _Z11many_kernelILi8EEvPf:
  REG:90 STACK:0 SHARED:0
"""
KERNELS = [
    "argmax_kernel(int*, float const*, int)",
    "void many_kernel<8, false>(float*)",
    "void many_kernel<StoreSums<true> >(ManyMaps, StoreSums<true>)",
]


def test_kernels_are_read_from_the_listing():
    assert kernels_listed(LISTING) == ["_Z13argmax_kernelPiPKfi", "_Z11many_kernelILi8EEvPf"]


def test_every_kernel_that_was_launched_is_covered_whatever_else_ran():
    found = coverage(KERNELS, [*KERNELS, "Memcpy HtoD (Pageable -> Device)"])

    assert found.problems == []
    assert found.to_json() == {"kernels": 3, "run": 3, "problems": []}


def test_two_demanglers_name_the_same_kernel():
    launched = [
        "argmax_kernel(int *, const float *, int)",
        "void many_kernel<(int)8, (bool)0>(float *)",
        "void many_kernel<StoreSums<(bool)1>>(ManyMaps, StoreSums<(bool)1>)",
    ]

    assert coverage(KERNELS, launched).problems == []


def test_an_instance_of_a_template_that_did_not_run_is_named():
    found = coverage(KERNELS, [KERNELS[0], "void many_kernel<4, false>(float*)", KERNELS[2]])

    assert found.problems == ["kernel many_kernel<8,0> was not run"]
    assert found.to_json()["run"] == 2


def test_a_library_whose_kernels_could_not_be_listed_is_a_problem():
    assert coverage([], KERNELS).problems
