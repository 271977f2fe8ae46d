import math

import pytest
import torch

from verification import measure
from verification.measure import bounded, replayed, worst_bounded, worst_explained, worst_replayed
from verification.replay import Replayed
from verification.rounding import half_spacing, neighbour, to_bf16
from verification.signed_statistics import (
    MAX_Z_CELL,
    MAX_Z_COLUMN,
    MAX_Z_ROW,
    first_occurrences,
)

ROWS, WIDTH = 400, 512


def truth(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)


def of(value: torch.Tensor, got: torch.Tensor, **options: object) -> measure.Measured:
    return bounded(value, lambda rows: half_spacing(value[rows].float()), got, **options)


def test_a_rounded_result_is_within_its_budget_and_points_nowhere():
    value = truth()
    measured = of(value, to_bf16(value))

    assert float(measured.ratio.max()) <= 1.0
    assert int(measured.differing.sum()) == 0
    assert measured.histogram == [ROWS * WIDTH, 0, 0, 0, 0]
    assert measured.z_sums.total(torch.arange(ROWS)) < 4
    assert float(measured.z_row.max()) < 6
    assert float(measured.z_column.max()) < 6


def test_a_gain_far_below_the_budget_is_seen_by_its_sign():
    value = truth()
    got = to_bf16(value * (1 - 2.0**-12))
    measured = of(value, got)

    assert float(measured.ratio.max()) < 1.2  # no single error gives it away
    assert measured.z_sums.total(torch.arange(ROWS)) > MAX_Z_CELL


def test_truncation_is_seen_by_its_sign():
    value = truth()
    got = (value.float().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)

    assert of(value, got).z_sums.total(torch.arange(ROWS)) > 10 * MAX_Z_CELL


def test_a_biased_row_is_seen_in_that_row_alone():
    value = truth()
    scale = torch.ones(ROWS, 1, dtype=torch.float64)
    scale[37] = 1 - 2.0**-9
    measured = of(value, to_bf16(value * scale))

    assert int(measured.z_row.argmax()) == 37
    assert float(measured.z_row[37]) > MAX_Z_ROW
    assert int((measured.z_row > MAX_Z_ROW).sum()) == 1


def test_a_biased_column_is_seen_in_that_column_alone():
    value = truth()
    scale = torch.ones(WIDTH, dtype=torch.float64)
    scale[5] = 1 - 2.0**-8
    measured = of(value, to_bf16(value * scale))

    assert int(measured.z_column.argmax()) == 5
    assert float(measured.z_column[5]) > MAX_Z_COLUMN
    assert int((measured.z_column > MAX_Z_COLUMN).sum()) == 1


def test_repeated_rows_are_no_evidence():
    value = truth()
    value[1:] = value[0]  # every row rounds alike, so every column's errors are equal
    measured = of(value, to_bf16(value))

    assert float(measured.z_column.max()) <= math.sqrt(3.0) * 1.01
    assert measured.z_sums.total(torch.arange(ROWS)) < 4


def test_rows_that_nearly_repeat_are_no_evidence_either():
    value = truth()
    value[1:] = value[0] * (1 + 1e-4 * truth(1)[1:])
    keep = first_occurrences(value)

    assert int(keep.sum()) == 1
    assert bool(keep[0])


def test_other_rows_all_count():
    assert bool(first_occurrences(truth()).all())


def test_a_head_that_repeats_does_not_silence_the_others():
    value = truth()
    value[:, :64] = value[0, :64]
    keep = first_occurrences(value, WIDTH // 64)

    assert int(keep[:, 0].sum()) == 1
    assert bool(keep[:, 1:].all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_far(bad):
    value = truth()
    got = to_bf16(value)
    got[3, 4] = bad
    measured = of(value, got)

    assert float(measured.ratio[3]) == math.inf
    assert float(measured.z_row[3]) == math.inf
    assert measured.z_sums.total(torch.arange(ROWS)) == math.inf
    assert float(measured.ratio[2]) <= 1


def test_an_expected_zero_that_comes_back_is_no_error_and_no_evidence():
    value = torch.zeros(2, 64, dtype=torch.float64)
    measured = bounded(value, lambda rows: torch.zeros(2, 64), to_bf16(value))

    assert float(measured.ratio.max()) == 0
    assert float(measured.z_column.max()) == 0


def test_a_value_where_the_budget_is_zero_is_infinitely_over_it():
    value = torch.zeros(1, 64, dtype=torch.float64)
    got = to_bf16(value)
    got[0, 1] = 1e-30
    measured = bounded(value, lambda rows: torch.zeros(1, 64), got, is_signed=False)

    assert float(measured.ratio[0]) == math.inf


def test_the_block_size_does_not_enter_the_numbers(monkeypatch):
    value = truth()
    whole = of(value, to_bf16(value))
    monkeypatch.setattr(measure, "VALUES_AT_ONCE", 3 * WIDTH)
    parts = of(value, to_bf16(value))

    assert torch.equal(parts.ratio, whole.ratio)
    # as many float32 additions as rows, in another order, each off by 2^-24 of a partial sum: of
    # summands up to sqrt(3) and of either sign, those reach sqrt(rows); z divides by more than 1
    apart = len(value) * 2.0**-24 * math.sqrt(3) * math.sqrt(len(value))
    assert torch.allclose(parts.z_column, whole.z_column, rtol=0, atol=apart)


def test_differing_values_are_counted_by_row():
    expected = to_bf16(truth())
    got = expected.clone()
    got[2, :3] = neighbour(got[2, :3], 1)
    got[5, 9] = neighbour(got[5, 9], -7)
    measured = replayed(Replayed(expected), got)

    assert measured.differing.nonzero()[:, 0].tolist() == [2, 5]
    assert measured.differing[2] == 3
    assert (int(measured.max_ulp[2]), int(measured.max_ulp[5])) == (1, 7)
    assert measured.histogram == [ROWS * WIDTH - 4, 3, 0, 0, 1]


def test_the_sign_of_a_zero_is_a_difference():
    measured = replayed(Replayed(torch.zeros(1, 4).bfloat16()), -torch.zeros(1, 4).bfloat16())

    assert int(measured.differing[0]) == 4


def test_the_worst_elements_are_found_with_their_place():
    value = truth()
    got = to_bf16(value)
    got[7, 11] = neighbour(got[7, 11], 9)
    rows = slice(5, 10)
    budget = half_spacing(value[rows].float())
    element = worst_bounded(value, budget, got, rows)

    assert (element.row, element.column, element.ulps) == (7, 11, 9)
    assert element.got == float(got[7, 11])
    element = worst_replayed(to_bf16(value), got, rows)
    assert (element.row, element.column, element.ulps, element.budget) == (7, 11, 9, None)


def test_the_element_shown_is_one_that_no_rounding_explains():
    value = torch.ones(4, 8).bfloat16()

    def explain(got: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return torch.where(where < 12, 1, 2)  # the first row and a half lie at borders

    got = value.clone()
    got[0, 3], got[1, 2], got[1, 6] = 1.5, neighbour(value[1, 2], 1), neighbour(value[1, 6], 1)
    expected = Replayed(value, explain)

    for rows in (slice(0, 4), slice(1, 4)):
        element = worst_explained(expected, got, rows)
        assert (element.row, element.column, element.ulps) == (1, 6, 1)
    assert worst_explained(expected, got, slice(2, 4)).ulps == 0
