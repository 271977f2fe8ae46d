import math

import pytest
import torch

from verification import composition
from verification.composition import (
    TokenVerdict,
    judge_growth,
    judge_logits,
    judge_tap,
    judge_ties,
    judge_tokens,
    logit_errors,
    tap_errors,
)

ROWS, WIDTH = 40, 256


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tap(engine_error: float, rows: int = ROWS) -> composition.TapErrors:
    """A tap whose yardstick is off by 1 % and whose engine by engine_error."""
    oracle = noise(0, rows, WIDTH)
    yardstick = (oracle + 0.01 * noise(1, rows, WIDTH)).bfloat16()
    engine = (oracle + engine_error * noise(2, rows, WIDTH)).bfloat16()
    return tap_errors(engine, yardstick, oracle)


@pytest.mark.parametrize(
    ("error", "passes"), [(0.0, True), (0.01, True), (0.02, True), (0.05, False)]
)
def test_a_tap_may_be_as_far_off_as_the_yardstick_times_the_factor(error, passes):
    verdict, share = judge_tap(tap(error))

    assert verdict.passed == passes
    assert (share <= 1) == passes


def test_one_token_far_off_fails_though_the_rest_is_right():
    oracle = noise(0, ROWS, WIDTH)
    yardstick = (oracle + 0.01 * noise(1, ROWS, WIDTH)).bfloat16()
    engine = oracle.bfloat16()
    engine[7] += 0.1
    verdict, _ = judge_tap(tap_errors(engine, yardstick, oracle))

    assert not verdict.passed
    assert "token" in verdict.reason


def massive(engine_luck: float, yardstick_luck: float) -> composition.TapErrors:
    """Two tokens have one direction of error each; in the second, luck scales it."""
    oracle, direction = noise(0, ROWS, WIDTH), noise(3, WIDTH)

    def off(seed: int, luck: float) -> torch.Tensor:
        error = 0.005 * noise(seed, ROWS, WIDTH)
        error[4] += 0.03 * direction
        error[9] += 0.03 * luck * direction
        return (oracle + error).bfloat16()

    return tap_errors(off(2, engine_luck), off(1, yardstick_luck), oracle)


def test_a_token_in_which_the_yardstick_was_lucky_is_no_fault_of_the_engine():
    errors = massive(engine_luck=1.5, yardstick_luck=0.0)

    assert float(errors.engine[9] / errors.yardstick[9]) > 6
    assert judge_tap(errors)[0].passed
    assert not judge_tap(massive(engine_luck=10.0, yardstick_luck=0.0))[0].passed


def test_few_tokens_are_judged_by_the_worst():
    assert judge_tap(tap(0.04, rows=2))[0].passed
    assert not judge_tap(tap(0.04, rows=composition.MIN_TOKENS))[0].passed
    assert not judge_tap(tap(0.1, rows=2))[0].passed


def test_a_massive_channel_does_not_hide_the_others():
    oracle = noise(0, ROWS, WIDTH)
    oracle[:, 3] *= 1000
    yardstick = (oracle * (1 + 0.004 * noise(1, ROWS, WIDTH))).bfloat16()
    engine = oracle.bfloat16().clone()
    engine[:, 100:] += 0.1  # nothing beside the massive channel's own error

    assert not judge_tap(tap_errors(engine, yardstick, oracle))[0].passed


def test_a_nan_is_no_small_error():
    oracle = noise(0, ROWS, WIDTH)
    engine = oracle.bfloat16()
    engine[1, 1] = math.nan
    verdict, share = judge_tap(tap_errors(engine, oracle.bfloat16(), oracle))

    assert not verdict.passed
    assert share == math.inf


def test_an_exact_tap_passes_where_the_yardstick_is_exact_too():
    oracle = noise(0, ROWS, WIDTH).bfloat16().float()

    assert judge_tap(tap_errors(oracle.bfloat16(), oracle.bfloat16(), oracle)) == (
        composition.PASSED,
        0.0,
    )


def test_a_jump_is_found_in_its_layer():
    steady = [0.01 * 1.1**layer for layer in range(8)]
    jump = [value * (1 if layer < 5 else 2.5) for layer, value in enumerate(steady)]

    assert judge_growth(steady, steady) == []
    assert [layer for layer, _ in judge_growth(jump, steady)] == [5]
    assert [layer for layer, _ in judge_growth([math.nan] * 2, [1.0] * 2)] == [0, 1]


def test_an_engine_better_than_the_yardstick_does_not_jump_back_to_it():
    assert judge_growth([0.1, 1.0], [1.0, 1.0]) == []


def logits(engine_error: float, shift: float = 0.0) -> composition.LogitErrors:
    oracle = 3 * noise(0, 32, 1000)
    yardstick = oracle + 0.05 * noise(1, 32, 1000)
    engine = oracle + engine_error * noise(2, 32, 1000) + shift
    return logit_errors(engine, yardstick, oracle)


@pytest.mark.parametrize(
    ("error", "passes"), [(0.0, True), (0.05, True), (0.07, True), (0.15, False)]
)
def test_logits_may_be_as_far_off_as_the_yardsticks_times_the_factors(error, passes):
    assert judge_logits(logits(error)).verdict.passed == passes


def test_a_shift_of_all_logits_is_no_error():
    result = judge_logits(logits(0.05, shift=4.0))

    assert result.verdict.passed
    assert result.centred_ratio == pytest.approx(1.0, abs=0.05)


def test_one_position_with_another_distribution_fails():
    oracle = 3 * noise(0, 200, 1000)
    yardstick = oracle + 0.05 * noise(1, 200, 1000)
    engine = oracle + 0.05 * noise(2, 200, 1000)
    engine[17, oracle[17].argmax()] -= 3.0
    result = judge_logits(logit_errors(engine, yardstick, oracle))

    assert not result.verdict.passed
    assert "largest KL" in result.verdict.reason or "mean KL" in result.verdict.reason


def test_kl_is_not_judged_on_few_positions_but_the_error_is():
    errors = logits(0.2)
    few = composition.LogitErrors(
        *(
            getattr(errors, f)[:3]
            for f in ("engine", "yardstick", "engine_kl", "yardstick_kl", "agree")
        )
    )
    result = judge_logits(few)

    assert result.kl_mean_ratio is None and result.kl_max_ratio is None
    assert result.verdict.passed  # 4 of the 6 that a single position may
    far = logits(0.5)
    few = composition.LogitErrors(
        *(
            getattr(far, f)[:3]
            for f in ("engine", "yardstick", "engine_kl", "yardstick_kl", "agree")
        )
    )
    assert not judge_logits(few).verdict.passed


def test_a_nan_among_logits_fails():
    oracle = noise(0, 20, 50)
    engine = oracle.clone()
    engine[3, 4] = math.nan

    assert not judge_logits(logit_errors(engine, oracle + 0.01, oracle)).verdict.passed


def tokens_at(gap: float) -> str:
    """The status of choosing the second best, `gap` sigmas below the best."""
    sigma = 0.1
    oracle = torch.zeros(4, 50)
    oracle[:, 7], oracle[:, 9] = 5.0, 5.0 - gap * sigma
    sign = torch.where(torch.arange(50) % 2 == 0, sigma, -sigma)
    return judge_tokens([9] * 4, oracle + sign, oracle)[0].status


@pytest.mark.parametrize(
    ("gap", "status"), [(0.5, "tie"), (5.9, "tie"), (6.1, "fail"), (20.0, "fail")]
)
def test_another_token_is_a_tie_only_within_the_measured_error(gap, status):
    assert tokens_at(gap) == status


def test_the_oracles_token_is_equal():
    oracle = noise(0, 5, 50)
    best = oracle.argmax(-1).tolist()

    assert [t.status for t in judge_tokens(best, oracle + 0.01, oracle)] == ["equal"] * 5


def token(lead: float, status: str) -> TokenVerdict:
    return TokenVerdict(0, 1 if status == "tie" else 0, lead, 1.0, lead, status)


def test_ties_where_the_lead_is_small_are_chance():
    assert judge_ties([token(0.1, "tie"), token(0.2, "equal"), *[token(40.0, "equal")] * 60]).passed


def test_more_ties_than_chance_fail():
    assert not judge_ties([*[token(5.5, "tie")] * 12, *[token(40.0, "equal")] * 60]).passed


def test_no_ties_pass():
    assert judge_ties([token(3.0, "equal")] * 10).passed
