from engine.sequence import Sequence


def test_one_step_of_priority_is_worth_a_thousand_arrivals():
    # Operators count on it: a number that drifts changes who waits for how long.
    low = Sequence("low", [1], 2, arrival=0, priority=1)
    before, after = (Sequence("high", [1], 2, arrival=i) for i in (999, 1000))

    assert before.order < low.order < after.order
