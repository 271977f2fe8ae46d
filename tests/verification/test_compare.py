import math

import pytest

from verification import compare
from verification.compare import (
    FAIL,
    PASS,
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


def test_values_that_one_rounding_explains_may_differ():
    assert judge_replayed(30, 576, 1, "it").status == PASS


def test_a_single_value_that_none_explains_fails():
    assert judge_replayed(1, 10**6, 2, "it").status == FAIL


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
