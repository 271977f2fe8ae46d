import pytest
import torch

from verification.elements import (
    num_differing,
    position_of,
    segment_of,
    shifted,
    worst_element,
    worst_of_channel,
)
from verification.expected import Bounded
from verification.passes import Pass, Segment
from verification.replay import Replayed
from verification.rounding import half_spacing, neighbour, to_bf16

ROWS, WIDTH = 6, 8
KEY = ("q", 0)


def a_pass(**fields: object) -> Pass:
    segments = (
        Segment("a", slice(0, 2), slice(0, 1), 5),
        Segment("b", slice(2, 6), slice(1, 3), 0),
    )
    defaults = {
        "mode": "local",
        "phase": "prefill",
        "segments": segments,
        "token_ids": torch.zeros(ROWS, dtype=torch.int64),
        "positions": torch.tensor([5, 6, 0, 1, 2, 3]),
        "logit_rows": torch.tensor([1, 2, 5]),
        "inputs": {},
        "outputs": {},
        "keys": None,
    }
    return Pass(**(defaults | fields))


@pytest.fixture
def value() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).double()


def bounded(value: torch.Tensor) -> Bounded:
    return Bounded(value, lambda rows: half_spacing(value[rows].float()))


def test_the_worst_against_truth_is_shown(value):
    got = to_bf16(value)
    got[3, 2] = neighbour(got[3, 2], 5)
    element = worst_element(bounded(value), got, a_pass(), KEY, slice(2, 6))

    assert (element.row, element.column, element.ulps) == (3, 2, 5)


@pytest.mark.parametrize("field", ["reference", "twin"])
def test_where_truth_holds_what_should_repeat_is_shown(value, field):
    got = to_bf16(value)
    other = got.clone()
    other[4, 1] = neighbour(other[4, 1], 1)
    run = a_pass(**{field: {KEY: other}})
    for expected in (bounded(value), Replayed(got)):
        element = worst_element(expected, got, run, KEY, slice(2, 6))
        assert (element.row, element.column) == (4, 1)
        assert element.expected == float(other[4, 1])


@pytest.mark.parametrize("field", ["reference", "twin"])
def test_what_a_rounding_explains_does_not_hide_what_should_repeat(value, field):
    got, other = to_bf16(value), to_bf16(value)
    other[4, 1] = neighbour(other[4, 1], 1)
    got[2, 3] = other[2, 3] = neighbour(got[2, 3], 1)
    run = a_pass(**{field: {KEY: other}})
    for ulps, place in ((1, (4, 1)), (2, (2, 3))):
        expected = Replayed(to_bf16(value), lambda got, where, u=ulps: torch.full_like(where, u))
        element = worst_element(expected, got, run, KEY, slice(2, 6))
        assert (element.row, element.column) == place


def test_the_worst_of_a_channel_is_in_that_channel(value):
    got = to_bf16(value)
    got[0, 1] = neighbour(got[0, 1], 900)
    got[5, 6] = neighbour(got[5, 6], 3)
    element = worst_of_channel(bounded(value), got, 6)

    assert (element.row, element.column, element.ulps) == (5, 6, 3)
    assert shifted(element, 100).column == 106


def test_rows_are_traced_to_their_tokens():
    run = a_pass()

    assert [position_of(run, "q", row) for row in range(ROWS)] == [5, 6, 0, 1, 2, 3]
    assert [position_of(run, "logits", row) for row in range(3)] == [6, 0, 3]
    assert [segment_of(run, "q", row).prompt for row in (0, 1, 2, 5)] == ["a", "a", "b", "b"]
    assert [segment_of(run, "final_norm", row).prompt for row in (0, 1, 2)] == ["a", "b", "b"]


def test_differing_counts_bits():
    assert num_differing(torch.zeros(3).bfloat16(), -torch.zeros(3).bfloat16()) == 3
