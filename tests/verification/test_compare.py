import math

import pytest

from verification import compare
from verification.compare import (
    FAIL,
    PASS,
    allowed_differing,
    failed,
    first_failure,
    judge_bits,
    judge_bounded,
    judge_columns,
    judge_replayed,
)


@pytest.mark.parametrize(("differing", "status"), [(0, PASS), (1, FAIL)])
def test_bits_means_every_one(differing, status):
    assert judge_bits(differing, 10**9, "them").status == status


@pytest.mark.parametrize(
    ("differing", "num_values", "status"),
    [(0, 1, PASS), (1000, 10**6, PASS), (1001, 10**6, FAIL), (30, 576, FAIL), (1, 576, PASS)],
)
def test_few_values_may_differ_by_one_ulp(differing, num_values, status):
    assert judge_replayed(differing, num_values, 1, "it").status == status


def test_a_single_value_two_ulps_off_is_too_far():
    assert judge_replayed(1, 10**6, 2, "it").status == FAIL


def test_a_small_cell_is_allowed_chance_and_a_large_one_a_thousandth():
    assert allowed_differing(64) < 5  # one eps fault differs in 5 % of values, 3 of 64
    assert allowed_differing(576) < 0.05 * 576 / 4
    for num_values in (10**5, 10**6, 10**7):
        assert allowed_differing(num_values) == num_values // 1000
    assert all(allowed_differing(n) <= allowed_differing(n + 500) for n in range(0, 20000, 500))


@pytest.mark.parametrize("ratio", [1.0001, math.inf, math.nan])
def test_a_ratio_over_one_fails(ratio):
    assert judge_bounded(ratio).status == FAIL


def test_a_ratio_of_one_passes():
    assert judge_bounded(1.0, 6.0, 8.0).passed


@pytest.mark.parametrize(
    ("z_cell", "z_row"), [(6.01, 0.0), (0.0, 8.01), (math.nan, 0.0), (0.0, math.inf)]
)
def test_errors_that_point_one_way_fail(z_cell, z_row):
    assert judge_bounded(0.5, z_cell, z_row).status == FAIL


@pytest.mark.parametrize(("z", "status"), [(10.0, PASS), (10.01, FAIL), (math.nan, FAIL)])
def test_a_channel_has_a_limit_of_its_own(z, status):
    verdict = judge_columns(z, 77)

    assert verdict.status == status
    assert verdict.passed or "77" in verdict.reason


def test_the_first_failure_is_kept():
    assert first_failure(compare.PASSED, failed("a"), failed("b")).reason == "a"
    assert first_failure(compare.PASSED).passed


def test_not_run_is_no_pass():
    assert not compare.Verdict(compare.NOT_RUN, "no device").passed
