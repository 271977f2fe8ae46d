import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from tests.verification import samples
from verification.report_terminal import NARROW, print_report
from verification.terminal import WIDTH

VERDICTS = r"pass\*?|FAIL|not run"


def printed(results: dict, *, colour: bool = False, width: int = WIDTH) -> str:
    out = io.StringIO()
    system = "standard" if colour else None
    console = Console(file=out, width=width, force_terminal=colour, color_system=system)
    print_report(results, console)
    return out.getvalue()


def row_of(text: str, tap: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"{tap} "))


def test_a_passing_run_ends_in_pass_with_its_counts_and_seconds():
    text = printed(samples.passing_run())

    assert text.splitlines()[-1].split() == (
        "PASS 39 checks passed, 0 failed, 1 not run; 26.6 M values in 93.4 s".split()
    )
    assert "FAIL" not in text
    assert "first failure" not in text


@pytest.mark.parametrize("width", [100, 80])
def test_a_residual_stream_of_nan_is_infinitely_far(width: int):
    run = samples.failing_run()
    run["residual_growth"]["engine"][4] = None  # as JSON has it

    assert "error at most inf × yardstick, layer 4" in printed(run, width=width)


def test_a_failing_run_names_operator_place_and_the_command_to_run_it_again():
    text = printed(samples.failing_run())

    assert "FAIL" in row_of(text, "q_rope")
    for fact in (
        "rotary_embedding",
        "model.layers.7.self_attn",
        "twin_rotary_embedding in csrc/twin/rotary_embedding.c",
        "token 3, head 2, channel 33",
        "-1.2578125   expected 1.2578125",
        "make verify MODEL=smollm2-135m ARGS='--prompts markup --layers 7 --taps q_rope'",
    ):
        assert fact in text


def test_a_local_failure_does_not_colour_the_local_verdict_of_other_taps():
    text = printed(samples.failing_run())

    verdicts = row_of(text, "k_rope").split()

    assert "pass" in verdicts  # local
    assert verdicts[-1] == "FAIL"  # accumulated, downstream of the fault


def test_what_was_not_run_is_said_with_its_reason_and_never_as_a_pass():
    text = printed(samples.not_run())

    assert row_of(text, "attn").split().count("not") == 2
    assert "pass" not in row_of(text, "attn")
    assert "transformers is not installed" in text
    assert "no goldens for this model" in text
    assert "0 checks passed, 0 failed, 39 not run" in text


def test_a_tap_of_which_a_part_was_not_run_carries_a_star():
    text = printed(samples.passing_run())

    assert "pass*" in row_of(text, "logits")
    assert "not run *" in text
    assert "decode of the longest prompt needs 4 GiB" in text


def test_colour_adds_nothing_that_words_do_not_say():
    plain = printed(samples.failing_run())
    coloured = printed(samples.failing_run(), colour=True)

    assert "\x1b[" in coloured
    assert "\x1b" not in plain
    assert Text.from_ansi(coloured).plain.split() == plain.split()


def test_the_report_fits_its_width():
    text = printed(samples.failing_run())

    table = text[: text.index("not run *")].splitlines()

    assert max(len(line) for line in table) == WIDTH
    assert not any(line.endswith(" ") for line in table)


@pytest.mark.parametrize("run", [samples.passing_run, samples.failing_run, samples.not_run])
def test_a_terminal_of_80_columns_shows_every_verdict_in_lines_that_fit(run):
    text, wide = (printed(run(), width=width) for width in (80, WIDTH))

    table = text[: text.index("not run *")].splitlines()

    assert max(len(line) for line in table[2:]) == NARROW
    for tap, _, _ in samples.TAPS:
        narrow_row, wide_row = (re.findall(VERDICTS, row_of(each, tap)) for each in (text, wide))
        assert narrow_row == wide_row
        assert len(narrow_row) == 2


@pytest.mark.parametrize("width", [80, WIDTH])
def test_a_long_reason_goes_on_below_and_loses_nothing(width: int):
    run = samples.failing_run()
    run["goldens"]["reason"] = reason = " ".join(f"word-{number}" for number in range(30))

    text = printed(run, width=width)

    lines = text[text.index("goldens") :].splitlines()
    assert lines[0].endswith("FAIL")
    assert reason in " ".join(text.replace("FAIL", "").split())


def test_the_first_failure_says_what_was_done_instead():
    text = printed(samples.failing_run())

    assert "diagnosis" in text
    assert "your output equals transformers with adjacent-pair RoPE" in text


def test_text_from_a_prompt_cannot_steer_the_terminal():
    run = samples.failing_run()
    run["first_failure"]["message"] = "bell \x07, clear \x1b[2J, [bold]markup[/bold], \u202egnp"

    text = printed(run)

    assert not {"\x07", "\x1b", "\u202e"} & set(text)
    assert "[bold]markup[/bold]" in text


def test_a_prompt_that_was_not_run_is_named_with_its_reason_and_counted():
    run, before = samples.passing_run(), verdict_of(samples.passing_run())
    reason = "longer than the 496 tokens that the model takes"
    run["prompts_not_run"] = [{"prompt": "long-1100", "reason": reason}]

    line = next(line for line in printed(run).splitlines() if reason in line)

    assert line.startswith("not run *") and line.endswith("prompt long-1100")
    assert (before, verdict_of(run)) == (1, 2)


def verdict_of(run: dict) -> int:
    """Checks that the last line counts as not run."""
    return int(re.search(r"(\d+) not run", printed(run)).group(1))


def test_one_prompt_is_not_called_prompts():
    run = samples.passing_run()
    run["logits"] = run["logits"][:1]

    assert re.search(r"^logits +1 prompt; ", printed(run), re.MULTILINE)


def test_more_ties_than_chance_gives_fail_the_tokens_though_none_is_wrong():
    run = samples.passing_run()
    run["failed_checks"] = {"tokens": 1}

    line = next(line for line in printed(run).splitlines() if line.startswith("tokens"))

    assert line.endswith("FAIL") and "0 wrong; more ties than chance gives" in line
    assert re.search(r"\b1 failed", printed(run))
