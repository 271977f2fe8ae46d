"""The command `python -m engine bench`, over the toy."""

import json

import pytest

from engine.__main__ import main

SMALL = ["--model", "toy", "--device", "cpu", "--threads", "1", "--max-model-len", "64"]


def test_throughput_of_both_kinds_of_batching_as_json(capsys):
    arguments = ["--num-prompts", "6", "--input-len", "4:8", "--output-len", "2:9"]

    code = main(
        ["bench", "throughput", *SMALL, *arguments, "--batching", "both", "--max-num-seqs", "2",
         "--json"]
    )  # fmt: skip

    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["static"]["tg_tokens"] == found["continuous"]["tg_tokens"]
    assert found["continuous"]["steps"] <= found["static"]["steps"]
    assert found["device"] == "cpu"
    for kind in ("static", "continuous"):
        assert found[kind]["pure"]["num_seqs"] == 2
        assert 0 < found[kind]["pure_share"] < 10


def test_the_throughput_is_shown_as_a_share_of_the_pure_steps(capsys):
    arguments = ["--num-prompts", "2", "--input-len", "4", "--output-len", "2"]

    assert main(["bench", "throughput", *SMALL, *arguments]) == 0

    shown = capsys.readouterr().out
    assert "% of their throughput" in shown
    assert "2 requests, pp 8 + tg 4 tokens" in shown and "1 sequence at" not in shown
    assert [line for line in shown.splitlines() if len(line) > 100] == []


def test_requests_that_arrive_in_time_have_no_share(capsys):
    arguments = ["--num-prompts", "2", "--input-len", "4", "--output-len", "2", "--json"]

    assert main(["bench", "throughput", *SMALL, *arguments, "--request-rate", "50"]) == 0

    assert "pure" not in json.loads(capsys.readouterr().out)["continuous"]


def test_latency_is_one_batch(capsys):
    code = main(
        ["bench", "latency", *SMALL, "--batch-size", "2", "--input-len", "5", "--output-len", "3"]
    )

    out = capsys.readouterr().out
    assert code == 0
    assert "toy latency: 2 requests, pp 10 + tg 6 tokens" in out
    assert "itl ms" in out
    assert "\n  decode ms     p50" in out


def test_a_context_that_holds_the_workload_and_no_more_is_enough(capsys):
    tight = ["--model", "toy", "--device", "cpu", "--threads", "1", "--max-model-len", "5"]

    assert main(["bench", "latency", *tight, "--input-len", "3", "--output-len", "2"]) == 0
    assert "pp 3 + tg 2 tokens" in capsys.readouterr().out


def test_what_does_not_fit_is_an_error_in_words(capsys):
    code = main(["bench", "latency", *SMALL, "--input-len", "60", "--output-len", "30"])

    assert code == 1
    assert "error: max_tokens must be from 1 to 4" in capsys.readouterr().err


def test_prompts_that_do_not_fit_are_an_error_in_the_callers_words(capsys):
    code = main(["bench", "throughput", *SMALL, "--input-len", "200", "--num-prompts", "1"])

    assert code == 1
    assert "error: prompt must have at most 63 tokens" in capsys.readouterr().err


def test_a_negative_seed_is_an_error_in_words(capsys):
    assert main(["bench", "latency", *SMALL, "--seed", "-1"]) == 1
    assert capsys.readouterr().err == "error: seed must be at least 0, got -1\n"


@pytest.mark.parametrize(
    "arguments",
    [["bench"], ["bench", "latency", "--input-len", "x"], ["generate", "--threads", "x"]],
)
def test_wrong_use_is_wrong_use(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "invalid _" not in capsys.readouterr().err  # the name of a function of ours
