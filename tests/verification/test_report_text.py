import math

import pytest

from engine.config import ModelConfig
from engine.models import resolve
from tests.verification import samples
from verification.probes import probe_group
from verification.prompts import load_specs
from verification.report_text import (
    ANY_PROMPT,
    count,
    largest,
    merged,
    ratio,
    rerun_command,
    summed,
)


def test_the_command_names_the_device_where_it_is_not_the_default():
    run = samples.failing_run()
    run["engine"]["device"] = "cuda"

    assert "DEVICE=cuda" in rerun_command(run)


def test_the_command_has_the_model_as_it_was_asked_for():
    run = samples.failing_run()
    run["model"]["asked_as"] = "/models/my llama"

    assert rerun_command(run) == (
        "make verify MODEL='/models/my llama' ARGS='--prompts markup --layers 7 --taps q_rope'"
    )


def test_a_probe_is_run_again_beside_the_shortest_prompt():
    run = samples.failing_run()
    probe = probe_group(ModelConfig.from_directory(resolve("toy")), 1)[0]
    run["first_failure"].update(prompt=probe.id, tap="logits", layer=0)

    assert rerun_command(run).endswith("ARGS='--prompts len-1 --taps logits'")
    assert ANY_PROMPT in {prompt.id for prompt in load_specs()}


def test_a_wrong_token_is_found_again_by_its_grade_which_no_tap_has():
    run = samples.failing_run()
    run["first_failure"].update(prompt="len-17", tap="logits", layer=0, grade="tokens")

    assert rerun_command(run).endswith("ARGS='--prompts len-17 --grade tokens'")


def test_the_worst_of_prefill_and_decode_decides_a_row():
    rows = [
        {**row, "max_ratio": ratio_, "status": status}
        for row, ratio_, status in zip(
            samples.passing_run()["summary"][:2], (0.3, 7.0), ("pass", "fail"), strict=True
        )
    ]

    both = merged(rows)

    assert (both["status"], both["max_ratio"], both["values"]) == (
        "fail",
        7.0,
        rows[0]["values"] + rows[1]["values"],
    )


def test_a_nan_is_worse_than_any_number():
    rows = [dict(samples.passing_run()["summary"][0]) for _ in range(2)]
    rows[0]["max_ratio"], rows[1]["max_ratio"] = float("nan"), 3.0

    assert ratio(merged(rows)["max_ratio"]) == "nan"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0"), (9999, "9999"), (10_000, "10.0 k"), (46_700_000, "46.7 M")],
)
def test_counts_are_short(value, shown: str):
    assert count(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.0, "0.000"),
        (0.99949, "0.999"),
        (9.9, "9.900"),
        (412.0, "412.0"),
        (9999.4, "9999"),
        (12345.0, "1e4"),
        (float("inf"), "inf"),
        (1e308, "inf"),  # as verify.json writes it
        (float("nan"), "nan"),
    ],
)
def test_ratios_are_short(value, shown: str):
    assert ratio(value) == shown


def test_a_nan_is_the_largest_of_any_numbers():
    assert math.isnan(largest([1.0, math.nan, None]))
    assert (largest([1.0, -2.0, None]), largest([None]), largest([])) == (-2.0, None, None)


def test_what_was_not_counted_adds_nothing_and_alone_is_no_count():
    assert (summed([2, None, 3]), summed([0, None]), summed([None]), summed([])) == (
        5,
        0,
        None,
        None,
    )


def test_a_tap_is_as_good_as_its_worst_phase():
    rows = [
        {"grade": "exact", "status": status, "values": 2, "differing": differing,
         "max_ulp": None, "max_ratio": ratio, "max_z": None}
        for status, differing, ratio in (("pass", None, 0.5), ("pass", 1, math.nan))
    ]  # fmt: skip

    found = merged(rows)

    assert (found["values"], found["differing"], found["max_ulp"]) == (4, 1, None)
    assert math.isnan(found["max_ratio"])
