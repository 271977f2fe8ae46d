import copy
import json

import pytest

from tests.benchmarks import compare, table


def spread(median: float) -> dict:
    return {"median": median, "p10": median * 0.999, "p90": median * 1.001, "rounds": 7}


def run(ours: float = 1.0, noise: float = 0.01, **others: dict) -> dict:
    point = {
        "name": "decode B=1, 128",
        "kind": "decode",
        "target": 0.72,
        "floor": 0.548,
        "share_of_limit": 0.5,
        "noise": noise,
        "contestants": {"touchstone": spread(ours), "touchstone again": spread(ours), **others},
    }
    return {
        "points": [point],
        "limits": {"read": 4.5e12, "multiply": 787e12},
        "first_token": {"load": 1.0, "total": 2.0},
        "memory": {"beyond": 3e8},
        "clocks_before": {"clocks.sm": "1980 MHz"},
        "clocks_after": {"clocks.sm": "1980 MHz"},
    }


@pytest.fixture
def command(tmp_path):
    def call(new: dict, old: dict | None) -> int:
        (tmp_path / "new.json").write_text(json.dumps(new))
        against = []
        if old is not None:
            (tmp_path / "old.json").write_text(json.dumps(old))
            against = ["--against", str(tmp_path / "old.json")]
        return compare.main(["--run", str(tmp_path / "new.json"), *against])

    return call


def test_a_run_as_fast_as_the_stored_one_passes(command):
    assert command(run(1.0), {"benchmarks": run(1.0)}) == 0
    assert command(run(0.5), run(1.0)) == 0


def test_a_slower_run_passes_within_the_noise_of_both_and_fails_beyond_it(command, capsys):
    assert command(run(1.019), run(1.0)) == 0
    assert command(run(1.021), run(1.0)) == 1
    assert command(run(1.014, noise=0), run(1.0, noise=0)) == 0
    assert command(run(1.016, noise=0), run(1.0, noise=0)) == 1
    assert "SLOWER, stored run" in capsys.readouterr().out


# One build's medians at four points, ms, by two engines in each of two processes on one H200; its
# noise there, and the medians with a pause of 0.06 ms put into the kernel of the first two points.
SAME_BUILD = (
    (0.70025, 0.69947, 0.6966, 0.0027),
    (0.99310, 1.00563, 1.0060, 0.0030),
    (1.09447, 1.08967, 1.0904, 0.0013),
    (8.42929, 8.23730, 8.5085, 0.0257),
)
SLOWED = (0.7219, 1.0500)


@pytest.mark.parametrize("medians", SAME_BUILD, ids=["B1", "B8", "B32", "prefill"])
def test_two_engines_of_one_build_are_no_change(command, medians):
    *same, noise = medians

    for old in same:
        for new in same:
            assert command(run(new, noise), run(old, noise)) == 0
    in_one_process = same[:2]
    assert command(run(in_one_process[0], noise, base=spread(in_one_process[1])), None) == 0
    assert command(run(in_one_process[1], noise, base=spread(in_one_process[0])), None) == 0


@pytest.mark.parametrize(("medians", "slowed"), [*zip(SAME_BUILD[:2], SLOWED, strict=True)])
def test_a_slowed_build_is_named_against_each_of_them(command, capsys, medians, slowed):
    *same, noise = medians

    for old in same:
        assert command(run(slowed, noise), run(old, noise)) == 1
        assert command(run(slowed, noise, base=spread(old)), None) == 1
    assert capsys.readouterr().out.count("SLOWER") == 2 * len(same)


def test_a_run_that_is_not_there_is_said_in_words(tmp_path, capsys):
    assert compare.main(["--run", str(tmp_path / "bench.json")]) == 1

    assert capsys.readouterr().out.startswith("error: bench.json is not there: no GPU was timed")


def test_a_base_in_the_same_run_is_what_counts(command, capsys):
    assert command(run(1.0, base=spread(0.9)), None) == 1
    assert "SLOWER, base in the same run" in capsys.readouterr().out
    assert command(run(1.0, base=spread(1.0)), None) == 0


def test_a_stored_run_that_is_named_counts_beside_a_base(command, capsys):
    assert command(run(1.0, base=spread(1.0)), run(0.1)) == 1
    assert "SLOWER, stored run" in capsys.readouterr().out


def test_a_point_that_was_not_timed_again_is_no_pass(command, capsys):
    stored = run()
    stored["points"].append({**stored["points"][0], "name": "decode B=8, 512"})

    assert command(run(0.5), stored) == 1
    assert "decode B=8, 512" in capsys.readouterr().out


def test_a_run_that_failed_is_no_pass(command, capsys):
    assert command({**run(0.5), "status": "fail"}, run()) == 1
    assert "the run failed" in capsys.readouterr().out


def test_nothing_to_compare_is_no_pass(command, capsys):
    other = run()
    other["points"][0]["name"] = "another"

    assert command(run(), other) == 1
    assert "no point in common" in capsys.readouterr().out
    assert command(run(), {"benchmarks": {"reason": "none"}}) == 1
    assert "no benchmark points: none" in capsys.readouterr().out


def test_the_table_shows_a_miss_and_who_did_not_run(tmp_path):
    peers = {
        "fast": {**spread(0.9), "outputs": "ok"},
        "absent": {"not run": "no compiler"},
        "odd": {**spread(0.4), "outputs": "differ"},
    }

    text = table.markdown(run(1.0, **peers))

    row = text.splitlines()[2]
    assert "**1.000** ± 0.001" in row and "≤ 0.72 (missed)" in row
    assert "| 0.900 | not run | 0.400 (other output) |" in row
    assert "4.50 TB/s" in text and "300 MB" in text
    assert "(missed)" not in table.markdown(run(0.7))


def test_the_plot_is_the_same_file_for_the_same_run(tmp_path):
    pytest.importorskip("matplotlib", reason="requires matplotlib")
    result = run(1.0, fast={**spread(0.9), "outputs": "ok"}, absent={"not run": "x"})
    for name in ("one", "two"):
        table.plot(copy.deepcopy(result), tmp_path / f"{name}.svg")

    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "touchstone" in (tmp_path / "one.svg").read_text()
