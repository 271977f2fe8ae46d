from tests.left_out import left_out

NO_GPU = "Skipped: requires a CUDA device"


def test_each_reason_is_a_line_with_its_count_the_most_frequent_first():
    lines = left_out(["Skipped: requires nvcc", *[NO_GPU] * 1200])

    assert lines == [" 1200  requires a CUDA device", "    1  requires nvcc"]


def test_benchmarks_say_how_they_are_run():
    (line,) = left_out(["Skipped: Skipping benchmark (--benchmark-skip active)."])

    assert line == "    1  benchmarks: make bench runs them"


def test_a_long_reason_goes_on_below_itself():
    first, second = left_out([NO_GPU + ", and more words" * 6])

    assert len(first) <= 100 and second.startswith(" " * 7)


def test_where_nothing_was_left_out_nothing_is_said():
    assert left_out([]) == []
