"""What is seen of a list that grows: its beginning, as a tuple of it would be."""

from hypothesis import given
from hypothesis import strategies as st

from engine.outputs import Beginning

ITEMS = st.lists(st.integers(0, 9), max_size=6)
PLACES = st.none() | st.integers(-8, 8)


@given(ITEMS, ITEMS, PLACES, PLACES, st.none() | st.sampled_from([-2, -1, 1, 3]))
def test_a_beginning_is_the_tuple_of_what_was_there(items, later, start, stop, step):
    expected, growing = tuple(items), list(items)
    beginning = Beginning(growing)
    growing += later

    assert tuple(beginning) == expected and list(reversed(beginning)) == [*reversed(expected)]
    assert len(beginning) == len(expected) and repr(beginning) == repr(expected)
    assert beginning[start:stop:step] == expected[start:stop:step]
    assert [i in beginning for i in range(10)] == [i in expected for i in range(10)]
    assert hash(beginning) == hash(expected)
    for place in range(-len(expected) - 1, len(expected) + 1):
        try:
            item = expected[place]
        except IndexError:
            item = None
        try:
            assert beginning[place] == item
        except IndexError:
            assert item is None


@given(ITEMS, ITEMS)
def test_equal_beginnings_and_tuples_are_equal(items, others):
    growing = list(items)
    beginning = Beginning(growing)
    growing.append(3)

    for other in (tuple(others), Beginning(others)):
        assert (beginning == other) is (other == beginning) is (tuple(items) == tuple(others))
    assert beginning == Beginning(items) and beginning != items
